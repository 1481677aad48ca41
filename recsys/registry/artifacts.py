# SPDX-License-Identifier: Apache-2.0
"""The files of registered bundles: in a folder or an S3-compatible bucket, and downloaded ones in a cache.

An artifact is an MLflow model with the bundle in it (`recsys.registry.pyfunc`). It is named by the bundle's sha256, and the bundle is not
written to once it is registered. A downloaded bundle takes its place in the cache only when all of its files have been found to have the
hashes of its manifest.
"""

import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from recsys.bundle.manifest import MANIFEST, verify
from recsys.core.errors import RecsysError, RegistryError
from recsys.core.files import new_directory, read_json
from recsys.registry.location import Location, masked
from recsys.registry.pyfunc import BUNDLE, write_flavor

_SHA256 = re.compile(r"[0-9a-f]{64}")
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class Artifacts:
    """The store of registered bundles.

    Args:
        location: where artifacts and cache are.
        client: MLflow's.

    Raises:
        RegistryError: the artifacts are in a bucket, and the library for it is absent.
    """

    def __init__(self, location: Location, client: Any) -> None:
        if location.artifacts.startswith("s3://") and find_spec("boto3") is None:
            raise RegistryError(f"artifacts {masked(location.artifacts)!r}: no driver for S3: boto3 is absent; install the extra [s3]")
        self._location = location
        self._client = client

    def put(self, directory: Path, sha256: str, run_id: str) -> str:
        """Copy a verified bundle among the artifacts of an MLflow run, as a model; returns its address.

        The copy of the bundle is read-only. Its folder is not, since MLflow's clients write a file of theirs beside ``MLmodel``.
        """
        name = f"models/{sha256}"
        address = f"{self._client.get_run(run_id).info.artifact_uri}/{name}"
        local = local_path(address)
        if local is not None and _is_whole(local, sha256):
            return address
        with tempfile.TemporaryDirectory() as folder:
            write_flavor(Path(folder), directory, self._location, run_id)
            self._client.log_artifacts(run_id, folder, name)
        self._client.log_artifacts(run_id, str(directory), f"{name}/{BUNDLE}")
        if local is not None:
            set_writable(local / BUNDLE, False)
        return address

    def get(self, address: str, sha256: str) -> Path:
        """The local directory of a bundle. Only what had to be downloaded has been verified; `recsys.bundle.Bundle.load` verifies anyway.

        Raises:
            RegistryError: the artifact is absent, or is another bundle.
            BundleError: a file of the artifact was changed.
        """
        local = local_path(address)
        if local is not None:
            return _bundle(local)
        if not _SHA256.fullmatch(sha256):
            raise RegistryError(f"{masked(address)}: expected a sha256 of 64 hexadecimal digits, got {sha256!r}")
        target = self._location.cache / sha256
        if not _is_whole(target, sha256):
            shutil.rmtree(target, ignore_errors=True)
            self._download(address, sha256, target)
        return _bundle(target)

    def manifest(self, address: str, sha256: str) -> dict[str, Any]:
        """A bundle's manifest as it was written, whatever its format; no other file is downloaded.

        Raises:
            RegistryError: there is none.
        """
        local = local_path(address)
        if local is None and (self._location.cache / sha256).is_dir():
            local = self._location.cache / sha256
        try:
            content = read_json(_bundle(local) / MANIFEST) if local is not None else self._read_remote(address)
        except (OSError, ValueError) as error:
            raise RegistryError(f"{masked(address)}: no manifest to read: {error}") from None
        result: dict[str, Any] = content
        return result

    def size(self, address: str) -> int:
        """Bytes of all files at an address."""
        return sum(size or 0 for size in self._sizes(address))

    def delete(self, address: str) -> None:
        """Delete everything at an address; what is gone already is no error."""
        local = local_path(address)
        if local is not None:
            remove(local)
        else:
            self._repository(address).delete_artifacts()

    def _download(self, address: str, sha256: str, target: Path) -> None:
        from mlflow.exceptions import MlflowException

        try:
            with new_directory(target) as root:
                self._repository(address).download_artifacts("", dst_path=str(root))
                found = verify(_bundle(root)).sha256
                if found != sha256:
                    raise RegistryError(f"{masked(address)}: the artifact has sha256 {found}, but {sha256} was registered: refused")
        except MlflowException as error:
            raise RegistryError(f"{masked(address)}: not downloaded: {masked(str(error.message))}") from None
        except OSError:
            if not _is_whole(target, sha256):  # else another process was faster
                raise

    def _read_remote(self, address: str) -> Any:
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                return read_json(Path(self._repository(address).download_artifacts(f"{BUNDLE}/{MANIFEST}", dst_path=folder)))
            except MlflowException as error:
                raise RegistryError(f"{masked(address)}: no manifest to read: {masked(str(error.message))}") from None

    def _sizes(self, address: str) -> Iterator[int | None]:
        repository = self._repository(address)
        folders: list[str | None] = [None]
        while folders:
            for found in repository.list_artifacts(folders.pop()):
                if found.is_dir:
                    folders.append(found.path)
                else:
                    yield found.file_size

    def _repository(self, address: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(address, tracking_uri=self._location.tracking_uri)


def local_path(address: str) -> Path | None:
    """The path of an address on this machine; None for one elsewhere."""
    parts = urlparse(address)
    if parts.scheme not in ("", "file"):
        return None
    return Path(url2pathname(parts.path)) if parts.scheme else Path(address)


def set_writable(root: Path, writable: bool) -> None:
    """Let the files and folders below a directory be written, or not."""
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | stat.S_IWUSR if writable else mode & ~_WRITABLE)


def remove(path: Path) -> None:
    """Delete a file or a directory, read-only or not, if it is there."""
    if path.is_dir() and not path.is_symlink():
        set_writable(path, True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _bundle(root: Path) -> Path:
    """The bundle below an artifact: what was registered by an earlier version is the bundle itself."""
    return root / BUNDLE if (root / BUNDLE).is_dir() else root


def _is_whole(target: Path, sha256: str) -> bool:
    try:
        return target.is_dir() and verify(_bundle(target)).sha256 == sha256
    except RecsysError:
        return False
