# SPDX-License-Identifier: Apache-2.0
"""A registry whose log and store are in PostgreSQL and whose artifacts are in a bucket."""

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlparse

import boto3
import pytest

from recsys.bundle.manifest import verify
from recsys.core.errors import BundleError, RegistryError
from recsys.registry import Location, Registry
from recsys.registry.artifacts import Artifacts
from recsys.registry.collect import collect
from tests.recsys.registry.small import BETTER, promote, register, write_bundle


@pytest.fixture
def home(tmp_path: Path, postgres_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With nothing local but caches: where the rest is, the environment says."""
    monkeypatch.setenv("RECSYS_TRACKING_URI", postgres_url)
    monkeypatch.setenv("RECSYS_ARTIFACTS", f"{bucket}/{tmp_path.name}")
    return tmp_path / "home"


@pytest.fixture
def remote(home: Path, tmp_path: Path) -> Registry:
    registry = Registry(Location.under(home))
    for number in (1, 2):
        write_bundle(tmp_path / f"bundle{number}", auc=0.6 + number / 100, features=f"f{number}")
        register(registry, tmp_path / f"bundle{number}")
    return registry


def objects(registry: Registry, version: int) -> dict[str, bytes]:
    """What the bucket has of a version."""
    address, client = urlparse(registry.version("m", version).source), boto3_client()
    listed = client.list_objects_v2(Bucket=address.netloc, Prefix=address.path.lstrip("/")).get("Contents", [])
    return {found["Key"]: client.get_object(Bucket=address.netloc, Key=found["Key"])["Body"].read() for found in listed}


def boto3_client():
    return boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])


def replace(registry: Registry, version: int, name: str, content: bytes | None) -> None:
    """Change one object of a version behind the registry's back, or delete it."""
    (key,) = [key for key in objects(registry, version) if key.endswith(name)]
    if content is None:
        boto3_client().delete_object(Bucket="models", Key=key)
    else:
        boto3_client().put_object(Bucket="models", Key=key, Body=content)


def test_the_road_there_and_back(remote: Registry, home: Path, tmp_path: Path) -> None:
    sha256 = [verify(tmp_path / f"bundle{number}").sha256 for number in (1, 2)]
    promote(remote, 1, None)
    promote(remote, 2, 1, BETTER)
    assert remote.rollback("m", reason="x").to_version == 1
    assert remote.resolve("models:/m@champion") == ("m", 1, sha256[0])
    directory = remote.download("m", 1)
    assert directory.is_relative_to(home / "cache" / sha256[0]) and verify(directory).sha256 == sha256[0]
    assert not list(home.glob("*.db")), "nothing of the registry is local"


def test_a_download_is_kept_and_a_damaged_one_is_fetched_again(remote: Registry) -> None:
    directory = remote.download("m", 1)
    before = (directory / "metrics.json").stat().st_ino
    assert remote.download("m", 1) == directory and (directory / "metrics.json").stat().st_ino == before
    (directory / "metrics.json").write_text("{}")
    assert verify(remote.download("m", 1)).name == "m"


@pytest.mark.parametrize("content", [b"{}", None], ids=["changed", "deleted"])
def test_a_tampered_object_is_refused_and_leaves_nothing_in_the_cache(remote: Registry, home: Path, content: bytes | None) -> None:
    replace(remote, 1, "metrics.json", content)
    with pytest.raises(BundleError, match=r"metrics\.json (was changed|is absent)"):
        remote.download("m", 1)
    assert not list((home / "cache").iterdir())


def test_an_artifact_that_is_gone_is_refused(remote: Registry, home: Path) -> None:
    for name in objects(remote, 1):
        replace(remote, 1, name, None)
    with pytest.raises((RegistryError, BundleError), match=r"no manifest\.json|not downloaded"):
        remote.download("m", 1)
    assert not list((home / "cache").iterdir())


def test_a_version_vouched_for_by_nothing_but_a_forged_tag_is_refused(remote: Registry, tmp_path: Path) -> None:
    source = remote.version("m", 1).source
    forged = remote._client.create_model_version("m", source, tags={"bundle_sha256": "../../outside"})
    with pytest.raises(RegistryError, match="expected a sha256 of 64 hexadecimal digits"):
        remote.download("m", int(forged.version))


def test_garbage_in_the_bucket_is_collected(remote: Registry, home: Path) -> None:
    promote(remote, 2, None)
    remote.download("m", 1)
    kept, source = objects(remote, 2), remote.version("m", 1)
    sizes = sum(map(len, objects(remote, 1).values()))
    found = {(garbage.kind, garbage.name): garbage.bytes for garbage in collect(remote, 1)}
    assert found["bundle", "m/1"] == sizes
    assert [kind for kind, _ in found] == ["bundle", "download"]
    address = urlparse(source.source)
    assert "Contents" not in boto3_client().list_objects_v2(Bucket=address.netloc, Prefix=address.path.lstrip("/"))
    assert objects(remote, 2) == kept
    shutil.rmtree(home / "cache")
    assert [g.name for g in collect(remote, 1)] == [] and not (home / "cache").exists(), "the manifest alone was read"


def test_without_its_library_a_bucket_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(RegistryError, match=r"boto3 is absent; install the extra \[s3\]"):
        Artifacts(Location.under(tmp_path).model_copy(update={"artifacts": bucket}), None)
