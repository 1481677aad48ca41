# SPDX-License-Identifier: Apache-2.0
"""What a bundle says of itself. Every field is required: a bundle that cannot say where it comes from cannot be registered."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from recsys.core.config import Config, parse
from recsys.core.errors import BundleError
from recsys.core.files import read_json, sha256_file, sha256_json

MANIFEST = "manifest.json"


class FileEntry(Config):
    """One file of a bundle."""

    sha256: str
    bytes: int


class Manifest(Config):
    """The identity of a bundle.

    Attributes:
        format: the layout's version.
        name: the registered model's name.
        created: UTC.
        code_commit: the commit of the code that trained it, with ``+dirty`` where the tree had changes; ``unknown`` outside git.
        data_snapshot: the fingerprint of the data set.
        feature_versions: the version hash of each feature service that serving must offer.
        encoder: the encoder's fingerprint.
        seed: the run's seed.
        environment: versions of the libraries that wrote it.
        recipe: the resolved recipe.
        files: every file below the bundle's directory, but this manifest.
    """

    format: Literal[2] = 2
    name: str
    created: datetime
    code_commit: str
    data_snapshot: str
    feature_versions: dict[str, str]
    encoder: str
    seed: int
    environment: dict[str, str]
    recipe: dict[str, Any]
    files: dict[str, FileEntry]

    @property
    def sha256(self) -> str:
        """The bundle's content address: a hash over every field, and so over every file's hash."""
        return sha256_json(self.model_dump(mode="json"))


def verify(directory: Path) -> Manifest:
    """The manifest of a bundle, once every file has been found to have its hash.

    Raises:
        BundleError: names the file, and both hashes where they differ.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise BundleError(f"{directory}: not a bundle: no {MANIFEST}")
    try:
        manifest = parse(Manifest, read_json(path), source=str(path))
    except json.JSONDecodeError as error:
        raise BundleError(f"{path}: not valid JSON: {error}") from None
    present = hash_files(directory)
    for name, entry in manifest.files.items():
        if name not in present:
            raise BundleError(f"{directory}: {name} is absent")
        if present[name] != entry:
            raise BundleError(f"{directory}: {name} was changed: sha256 {present[name].sha256}, expected {entry.sha256}")
    if foreign := sorted(present.keys() - manifest.files.keys()):
        raise BundleError(f"{directory}: {foreign[0]} is not part of the bundle")
    return manifest


def hash_files(root: Path) -> dict[str, FileEntry]:
    """Every file below a bundle's directory but its manifest, by its relative path."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST)
    return {p.relative_to(root).as_posix(): FileEntry(sha256=sha256_file(p), bytes=p.stat().st_size) for p in files}
