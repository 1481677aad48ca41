# SPDX-License-Identifier: Apache-2.0
"""Bundles of older formats load as they did, keep their files and their hash; unknown formats are refused."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.bundle.bundle import Bundle
from recsys.bundle.formats import FORMAT, known
from recsys.bundle.manifest import MANIFEST, hash_files, opened, verify
from recsys.core.config import parse
from recsys.core.errors import BundleError, ConfigError
from recsys.core.files import read_json, sha256_json, write_json
from recsys.data.datasets.synthetic import Synthetic
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def today(tiny_run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.directory / "bundle", tmp_path / "today"))


def rewritten(directory: Path, manifest: dict[str, Any]) -> Path:
    """The directory with another manifest, which lists the files that are there now."""
    files = {name: entry.model_dump() for name, entry in hash_files(directory).items()}
    write_json(directory / MANIFEST, manifest | {"files": files})
    return directory


def of_format_2(directory: Path) -> Path:
    """A bundle as format 2 had it: a manifest without tokenizer and signature, no calibration, no recorded requests."""
    (directory / "calibration.json").unlink()
    (directory / "golden.json").unlink()
    shutil.rmtree(directory / "golden")
    manifest = read_json(directory / MANIFEST)
    kept = {name: value for name, value in manifest.items() if name not in ("tokenizer", "signature")}
    return rewritten(directory, kept | {"format": 2})


def of_format_1(directory: Path) -> Path:
    """A bundle as format 1 had it: besides, an index that names one user state and the model whose vectors it holds."""
    of_format_2(directory)
    index = read_json(directory / "index" / "index.json")
    meta = index["meta"]
    old = {"accepts": meta["accepts"][0], "model_hash": meta["content_hash"], "dim": meta["width"]}
    kept = {name: meta[name] for name in ("rows", "catalogue_version", "ids_digest")}
    write_json(directory / "index" / "index.json", {"config": {"name": "dense"}, "meta": old | kept})
    return rewritten(directory, read_json(directory / MANIFEST) | {"format": 1})


OLDER = {1: of_format_1, 2: of_format_2}


def lists(bundle: Bundle) -> list[list[tuple[str, float]]]:
    dataset = Synthetic(Synthetic.Config()).load()
    tables: dict[str, pa.Table] = {"interactions": dataset.interactions, "items": dataset.items, "users": dataset.users}
    reader = OfflineReader(parse(FeatureRepo, bundle.features, source="features.json"), tables)
    answers = Recommender(bundle, reader).recommend([Request(user_id=user, k=5, at=NOW) for user in ("1", "2", "who?")])
    return [[(item.item_id, item.score) for item in answer.items] for answer in answers]


def test_every_older_format_is_tried_here() -> None:
    assert known() == (*OLDER, FORMAT)


@pytest.mark.parametrize("version", OLDER)
def test_an_older_bundle_answers_as_todays(today: Path, tmp_path: Path, version: int) -> None:
    old = OLDER[version](Path(shutil.copytree(today, tmp_path / "old")))
    expected = Bundle.load(today)
    expected.calibration = Bundle.load(old).calibration
    assert expected.calibration.apply([0.1, 0.7]).tolist() == [0.1, 0.7]
    assert lists(Bundle.load(old)) == lists(expected)
    assert Bundle.load(old).golden is None


@pytest.mark.parametrize("version", OLDER)
def test_a_migration_changes_neither_files_nor_hash(today: Path, version: int) -> None:
    old = OLDER[version](today)
    before, content = hash_files(old), read_json(old / MANIFEST)
    manifest = Bundle.load(old).manifest
    assert manifest.sha256 == verify(old).sha256 == sha256_json(content)
    assert manifest.format == FORMAT and manifest.files == before
    assert hash_files(old) == before and read_json(old / MANIFEST) == content
    assert manifest.signature.tasks == ("like",) and manifest.tokenizer is None


@pytest.mark.parametrize("version", OLDER)
def test_a_migrated_bundle_is_saved_as_one_of_today(today: Path, tmp_path: Path, version: int) -> None:
    old = OLDER[version](today)
    saved = Bundle.load(old).save(tmp_path / "saved")
    assert saved.sha256 != verify(old).sha256
    assert read_json(tmp_path / "saved" / MANIFEST)["format"] == FORMAT
    assert verify(tmp_path / "saved").sha256 == saved.sha256 == sha256_json(read_json(tmp_path / "saved" / MANIFEST))
    assert lists(Bundle.load(tmp_path / "saved")) == lists(Bundle.load(old))


@pytest.mark.parametrize("version", OLDER)
def test_an_older_bundle_is_verified_as_todays(today: Path, version: int) -> None:
    old = OLDER[version](today)
    content = json.loads((old / "features.json").read_text())
    write_json(old / "features.json", content | {"views": []})
    with pytest.raises(BundleError, match=r"features\.json was changed: sha256"):
        Bundle.load(old)
    write_json(old / "features.json", content)
    verify(old)
    (old / "golden.json").write_text("{}")
    with pytest.raises(BundleError, match=r"golden\.json is not part of the bundle"):
        verify(old)


def test_an_older_bundle_that_is_none_is_refused(today: Path) -> None:
    old = of_format_1(today)
    write_json(old / "index" / "index.json", {"config": {"name": "dense"}, "meta": {"rows": 3}})
    rewritten(old, read_json(old / MANIFEST))
    with pytest.raises(BundleError, match=r"not of the format 1 that it names: KeyError: 'accepts'"):
        verify(old)


@pytest.mark.parametrize("version", [0, 4, 99])
def test_an_unknown_format_is_refused_by_name(today: Path, version: int) -> None:
    rewritten(today, read_json(today / MANIFEST) | {"format": version})
    with pytest.raises(BundleError, match=rf"format: expected one of 1, 2, 3, got {version}"):
        Bundle.load(today)


def test_an_older_manifest_without_a_field_is_refused(today: Path) -> None:
    old = of_format_2(today)
    content = read_json(old / MANIFEST)
    del content["seed"]
    write_json(old / MANIFEST, content)
    with pytest.raises(ConfigError, match="seed: is required, but missing"):
        verify(old)


def test_no_manifest_can_name_its_own_hash(today: Path) -> None:
    content = read_json(today / MANIFEST)
    for name in ("_written", "sha256"):
        write_json(today / MANIFEST, content | {name: "a"})
        with pytest.raises(ConfigError, match=name):
            verify(today)


def test_todays_bundle_is_opened_where_it_is(today: Path, tmp_path: Path) -> None:
    with opened(today) as (_, root):
        assert root == today
    old = of_format_1(today)
    with opened(old) as (_, root):
        assert root != old and read_json(root / "index" / "index.json")["meta"]["accepts"] == ["SlotVectors"]
        assert read_json(root / "calibration.json")["config"] == {"name": "none"}
    assert not root.exists()
