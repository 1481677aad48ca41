# SPDX-License-Identifier: Apache-2.0
"""A data set on disk: Parquet tables, the schema as YAML, and a manifest with the fingerprint and the report."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.config import Config, parse
from recsys.core.errors import DataError
from recsys.core.files import new_directory, read_json, write_bytes, write_json
from recsys.data.dataset import Dataset, IngestReport
from recsys.data.dataset_schema import DatasetSchema

MANIFEST, SCHEMA = "dataset.json", "schema.yaml"
_FORMAT = 1
_ROW_GROUP = 100_000


class Manifest(Config):
    """The content of ``dataset.json``."""

    format: int = _FORMAT
    dataset: str
    fingerprint: str
    report: IngestReport


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise a `DataError` where ``out`` must not be written: it exists, and nobody asked to replace it or it holds no data set."""
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists already: overwrite it on purpose (--overwrite), or choose another name")
    if out.exists() and not (out / MANIFEST).is_file():
        raise DataError(f"{out} is not a data set (it has no {MANIFEST}), and is not overwritten")


def write_dataset(dataset: Dataset, out: Path, *, overwrite: bool = False) -> None:
    """Write a data set as a new directory, which appears under its name only once it is whole.

    Raises:
        DataError: ``out`` exists, and ``overwrite`` is not said or it holds something else than a data set.
    """
    refuse_existing(out, overwrite=overwrite)
    whole, old = (out.with_name(f".{out.name}.{os.getpid()}.{part}") for part in ("new", "old"))
    with new_directory(whole) as directory:
        for name, (table, columns) in dataset.tables().items():
            pq.write_table(columns.conform(table, what=name), directory / f"{name}.parquet", row_group_size=_ROW_GROUP, compression="zstd")
        write_bytes(directory / SCHEMA, dataset.schema.dump().encode())
        manifest = Manifest(dataset=dataset.name, fingerprint=dataset.fingerprint(), report=dataset.report)
        write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    if overwrite and out.exists():
        out.rename(old)
    whole.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def read_dataset(path: Path, *, verify: bool = True) -> Dataset:
    """Read a directory that `write_dataset` wrote.

    Raises:
        DataError: it is not there, incomplete, of another format, or its content does not have the fingerprint of its manifest.
    """
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} is not a data set: it has no {MANIFEST}")
    try:
        manifest = parse(Manifest, read_json(path / MANIFEST), source=str(path / MANIFEST))
    except ValueError as error:
        raise DataError(f"{path / MANIFEST}: not valid JSON: {error}") from None
    if manifest.format != _FORMAT:
        raise DataError(f"{path / MANIFEST}: format: expected {_FORMAT}, got {manifest.format}")
    schema = DatasetSchema.load(path / SCHEMA)
    features = {"interactions": schema.interactions.features, "items": schema.items.features}
    if schema.users is not None:
        features["users"] = schema.users.features
    try:
        tables = {
            name: columns.conform(pq.read_table(path / f"{name}.parquet"), what=str(path / f"{name}.parquet"))
            for name, columns in features.items()
        }
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    dataset = Dataset(manifest.dataset, tables["interactions"], tables["items"], tables.get("users"), schema, manifest.report)
    if verify and (found := dataset.fingerprint()) != manifest.fingerprint:
        raise DataError(f"{path}: the tables have the fingerprint {found}, but {MANIFEST} says {manifest.fingerprint}: they were changed")
    return dataset
