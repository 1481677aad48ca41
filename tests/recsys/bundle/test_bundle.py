# SPDX-License-Identifier: Apache-2.0
"""A bundle is whole, unchanged and knows where it comes from, or it is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from recsys.bundle.bundle import Bundle
from recsys.bundle.manifest import MANIFEST, Manifest, verify
from recsys.core import components
from recsys.core.errors import BundleError, ConfigError


@pytest.fixture
def directory(tiny_run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.directory / "bundle", tmp_path / "bundle"))


def test_every_file_is_in_the_manifest(directory: Path) -> None:
    manifest = verify(directory)
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {MANIFEST}
    assert set(manifest.files) == present
    assert {"ranker/model.safetensors", "retriever/model.safetensors", "catalogue.arrow", "features.json", "metrics.json"} <= present
    assert not {p for p in present if p.endswith((".pkl", ".pt", ".pickle", ".joblib"))}


@pytest.mark.parametrize("name", ["platt", "isotonic", "none"])
def test_a_calibrator_comes_back_to_the_bit(directory: Path, tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    probabilities = random.random(500).astype(np.float32)
    bundle = Bundle.load(directory)
    cls = components.get("calibration", name)
    bundle.calibration = cls(cls.Config()).fit(random.random(500) < probabilities**2, probabilities)
    bundle.save(tmp_path / "copy")
    loaded = Bundle.load(tmp_path / "copy").calibration
    assert type(loaded) is cls and loaded.config == bundle.calibration.config
    assert np.array_equal(loaded.apply(probabilities), bundle.calibration.apply(probabilities))


@pytest.mark.parametrize("name", ["ranker/model.safetensors", "metrics.json", "calibration.json", "catalogue.arrow"])
def test_one_changed_bit_is_refused(directory: Path, name: str) -> None:
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(bytes(content))
    with pytest.raises(BundleError, match=f"{name} was changed: sha256"):
        Bundle.load(directory)


def test_an_absent_and_a_foreign_file_are_named(directory: Path) -> None:
    (directory / "extra.json").write_text("{}")
    with pytest.raises(BundleError, match=r"extra\.json is not part of the bundle"):
        verify(directory)
    (directory / "extra.json").unlink()
    (directory / "settings.json").unlink()
    with pytest.raises(BundleError, match=r"settings\.json is absent"):
        verify(directory)


@pytest.mark.parametrize("name", list(Manifest.model_fields))
def test_a_manifest_without_a_field_is_refused(directory: Path, name: str) -> None:
    content = json.loads((directory / MANIFEST).read_text())
    del content[name]
    (directory / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"{name}: is required, but missing"):
        verify(directory)


@pytest.mark.parametrize("name", ["calibration.json", "metrics.json", "features.json", "index/index.json"])
def test_a_bundle_that_does_not_list_a_part_is_refused(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is absent"):
        verify(directory)
    content = json.loads((directory / MANIFEST).read_text())
    del content["files"][name]
    (directory / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"{name} is absent: manifest.json does not list it"):
        verify(directory)


def test_a_manifest_that_speaks_of_other_parts_is_refused(directory: Path) -> None:
    content = json.loads((directory / MANIFEST).read_text())
    for name, other in (("tokenizer", "abc"), ("signature", content["signature"] | {"tasks": ["buy"]})):
        (directory / MANIFEST).write_text(json.dumps(content | {name: other}))
        with pytest.raises(BundleError, match=f"manifest.json says {name}"):
            Bundle.load(directory)


def test_what_is_no_bundle_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle: no manifest\.json"):
        verify(tmp_path)


def test_the_hash_covers_every_field(directory: Path) -> None:
    manifest = verify(directory)
    assert manifest.sha256 == Manifest(**manifest.model_dump()).sha256
    assert manifest.model_copy(update={"seed": manifest.seed + 1}).sha256 != manifest.sha256


def test_histories_of_codes_must_be_of_the_bundles_tokenizer(directory: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(directory)
    history = next(feature for view in bundle.features["views"] for feature in view["features"] if feature["kind"] == "last_n")
    history["tokenizer"] = "abc"
    with pytest.raises(BundleError, match=f"feature {history['name']!r} holds codes of the tokenizer abc, but the bundle has None"):
        bundle.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    del history["tokenizer"]
    bundle.save(tmp_path / "copy")
