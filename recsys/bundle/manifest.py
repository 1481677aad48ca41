# SPDX-License-Identifier: Apache-2.0
"""What a bundle says of itself. Every field is required: a bundle that cannot say where it comes from cannot be registered."""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, PrivateAttr

from recsys.bundle.formats import FORMAT, Stored, known, migrate
from recsys.bundle.signature import Signature
from recsys.core.config import Config, parse
from recsys.core.errors import BundleError
from recsys.core.files import read_json, sha256_file, sha256_json, write_json

MANIFEST = "manifest.json"
PARTS = (
    "features.json",
    "settings.json",
    "calibration.json",
    "metrics.json",
    "items.arrow",
    "catalogue.arrow",
    "encoder/encoder.json",
    "ranker/model.safetensors",
    "retriever/model.safetensors",
    "index/index.json",
)
"""What no bundle lacks."""


class FileEntry(Config):
    """One file of a bundle."""

    sha256: str
    bytes: int


class _Listed(Config):
    """What every format of a manifest has."""

    model_config = ConfigDict(extra="ignore")

    format: int
    files: dict[str, FileEntry]


class Manifest(Config):
    """The identity of a bundle.

    Attributes:
        format: the layout's version, see `recsys.bundle.formats`.
        name: the registered model's name.
        created: UTC.
        code_commit: the commit of the code that trained it, with ``+dirty`` where the tree had changes; ``unknown`` outside git.
        data_snapshot: the fingerprint of the data set.
        feature_versions: the version hash of each feature service that serving must offer.
        encoder: the encoder's fingerprint.
        tokenizer: the fingerprint of the item tokenizer; null where no model reads codes of items.
        signature: what clients send and get.
        seed: the run's seed.
        environment: versions of the libraries that wrote it.
        recipe: the resolved recipe.
        files: every file below the bundle's directory, but this manifest.
    """

    format: Literal[3] = FORMAT
    name: str
    created: datetime
    code_commit: str
    data_snapshot: str
    feature_versions: dict[str, str]
    encoder: str
    tokenizer: str | None
    signature: Signature
    seed: int
    environment: dict[str, str]
    recipe: dict[str, Any]
    files: dict[str, FileEntry]

    _written: str | None = PrivateAttr(default=None)  # the hash of an older manifest as it stands in its file; no file can set it

    @property
    def sha256(self) -> str:
        """The bundle's content address: a hash over every field, and so over every file's hash. A migration does not change it."""
        return self._written or sha256_json(self.model_dump(mode="json"))


def verify(directory: Path) -> Manifest:
    """The manifest of a bundle, once every file has been found to have its hash.

    Raises:
        BundleError: the format is unknown; names the file that is absent, foreign or changed, and both hashes where they differ.
        ConfigError: names the field that the manifest lacks or that has another type.
    """
    return _verified(directory)[0]


@contextmanager
def opened(directory: Path) -> Iterator[tuple[Manifest, Path]]:
    """The manifest of a verified bundle, and a directory that holds it in today's format.

    That is its own, or, for an older bundle, a temporary one of links to its files and of the documents that were migrated.

    Raises:
        BundleError, ConfigError: see `verify`.
    """
    manifest, migrated = _verified(directory)
    if not migrated:
        yield manifest, directory
        return
    with tempfile.TemporaryDirectory(prefix="bundle-") as name:
        root = Path(name)
        for file in manifest.files.keys() - migrated.keys():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).symlink_to((directory / file).resolve())
        for file, content in migrated.items():
            write_json(root / file, content)
        yield manifest, root


def hash_files(root: Path) -> dict[str, FileEntry]:
    """Every file below a bundle's directory but its manifest, by its relative path."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST)
    return {p.relative_to(root).as_posix(): FileEntry(sha256=sha256_file(p), bytes=p.stat().st_size) for p in files}


def _verified(directory: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest in today's format, and the documents that its migration changed or added."""
    path = directory / MANIFEST
    content = _read(path)
    listed = parse(_Listed, content, source=str(path))
    if listed.format not in known():
        raise BundleError(f"{path}: format: expected one of {', '.join(map(str, known()))}, got {listed.format}: it needs newer code")
    _check_files(directory, listed.files)
    if listed.format == FORMAT:
        _check_parts(directory, listed.files)
        return parse(Manifest, content, source=str(path)), {}
    stored = Stored(content, {name: read_json(directory / name) for name in listed.files if name.endswith(".json")})
    try:
        migrated = migrate(stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{directory}: not of the format {listed.format} that it names: {type(error).__name__}: {error}") from None
    manifest = parse(Manifest, migrated.manifest, source=str(path))
    manifest._written = sha256_json(content)
    changed = {name: after for name, after in migrated.documents.items() if stored.documents.get(name) != after}
    _check_parts(directory, {**listed.files, **changed})
    return manifest, changed


def _read(path: Path) -> Any:
    if not path.is_file():
        raise BundleError(f"{path.parent}: not a bundle: no {MANIFEST}")
    try:
        return read_json(path)
    except json.JSONDecodeError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from None


def _check_files(directory: Path, files: Mapping[str, FileEntry]) -> None:
    present = hash_files(directory)
    for name, entry in files.items():
        if name not in present:
            raise BundleError(f"{directory}: {name} is absent")
        if present[name] != entry:
            raise BundleError(f"{directory}: {name} was changed: sha256 {present[name].sha256}, expected {entry.sha256}")
    if foreign := sorted(present.keys() - files.keys()):
        raise BundleError(f"{directory}: {foreign[0]} is not part of the bundle")


def _check_parts(directory: Path, names: Collection[str]) -> None:
    if lacking := [name for name in PARTS if name not in names]:
        raise BundleError(f"{directory}: {lacking[0]} is absent: {MANIFEST} does not list it")
