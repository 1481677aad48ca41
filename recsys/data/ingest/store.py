# SPDX-License-Identifier: Apache-2.0
"""A data set on disk: Parquet tables, the schema as YAML, and a manifest with the fingerprint and the report."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.config import Config, parse
from recsys.core.errors import DataError
from recsys.core.files import canonical_json, new_directory, new_file, read_json, replace_directory, write_bytes, write_json
from recsys.core.scatter import HASH
from recsys.core.schema import EVENT_TIME, INGEST_SEQ, USER, FeatureSchema
from recsys.data.dataset import Dataset, IngestReport, update_digest
from recsys.data.dataset_schema import DatasetSchema

MANIFEST, SCHEMA = "dataset.json", "schema.yaml"
ROW_GROUP = 100_000
_FORMAT = 1


class Partitions(Config):
    """How the events of a data set are divided over parts.

    Attributes:
        key: the column that decides.
        count: how many parts there are.
        hash: how the key decides, see `recsys.core.scatter.HASH`.
        rows: the events in each part.
        digests: of the content of each part.
    """

    key: str = USER
    count: int
    hash: str = HASH
    rows: tuple[int, ...]
    digests: tuple[str, ...]


class Manifest(Config):
    """The content of ``dataset.json``.

    Attributes:
        dataset: the data set's name.
        fingerprint: `Dataset.fingerprint`; of a data set in parts, the one of `parts_fingerprint`.
        report: how the sources became the tables.
        partitions: of the events, where they are divided.
    """

    format: int = _FORMAT
    dataset: str
    fingerprint: str
    report: IngestReport
    partitions: Partitions | None = None


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
    whole = out.with_name(f".{out.name}.{os.getpid()}.new")
    with new_directory(whole) as directory:
        for name, (table, columns) in dataset.tables().items():
            write_table(directory / f"{name}.parquet", columns.conform(table, what=name))
        write_bytes(directory / SCHEMA, dataset.schema.dump().encode())
        manifest = Manifest(dataset=dataset.name, fingerprint=dataset.fingerprint(), report=dataset.report)
        write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    replace_directory(whole, out)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table whole or not at all."""
    with new_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd")


def table_paths(path: Path) -> dict[str, Path]:
    """The Parquet file, or the folder of them, of each table of a data set; `DataError` where there is no data set."""
    manifest, schema = read_manifest(path)
    names = ("interactions", "items") if schema.users is None else ("interactions", "items", "users")
    return {name: path / name if name == "interactions" and manifest.partitions else path / f"{name}.parquet" for name in names}


def part_file(directory: Path, part: int) -> Path:
    """The events of a part, of a data set in parts."""
    return directory / "interactions" / f"part={part:04d}" / "events.parquet"


def parts_fingerprint(digests: Sequence[str], dataset: Dataset) -> str:
    """What stands for `Dataset.fingerprint` where events are divided: over the digests of the parts, and items and users.

    Args:
        digests: of the parts, in order.
        dataset: whose interactions are not looked at.
    """
    digest = hashlib.sha256(canonical_json(list(digests)))
    for name, (table, columns) in dataset.tables().items():
        if name != "interactions":
            update_digest(digest, name, table, columns)
    return digest.hexdigest()


def read_manifest(path: Path) -> tuple[Manifest, DatasetSchema]:
    """The manifest and the schema of a data set.

    Raises:
        DataError: there is none, or it is of another format.
    """
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path} is not a data set: it has no {MANIFEST}")
    try:
        manifest = parse(Manifest, read_json(path / MANIFEST), source=str(path / MANIFEST))
    except ValueError as error:
        raise DataError(f"{path / MANIFEST}: not valid JSON: {error}") from None
    if manifest.format != _FORMAT:
        raise DataError(f"{path / MANIFEST}: format: expected {_FORMAT}, got {manifest.format}")
    return manifest, DatasetSchema.load(path / SCHEMA)


def read_dataset(path: Path, *, verify: bool = True) -> Dataset:
    """Read a directory that `write_dataset` or `ingest_partitioned` wrote, into memory.

    Raises:
        DataError: it is not there, incomplete, of another format, or its content does not have the fingerprint of its manifest.
    """
    manifest, schema = read_manifest(path)
    features = {"items": schema.items.features}
    if schema.users is not None:
        features["users"] = schema.users.features
    try:
        tables = {name: _read(path / f"{name}.parquet", columns) for name, columns in features.items()}
        if manifest.partitions is None:
            parts = [_read(path / "interactions.parquet", schema.interactions.features)]
        else:
            parts = [_read(part_file(path, part), schema.interactions.features) for part in range(manifest.partitions.count)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    whole = (
        parts[0] if manifest.partitions is None else pa.concat_tables(parts).sort_by([(EVENT_TIME, "ascending"), (INGEST_SEQ, "ascending")])
    )
    dataset = Dataset(manifest.dataset, whole, tables["items"], tables.get("users"), schema, manifest.report)
    if verify:
        found = (
            dataset.fingerprint() if manifest.partitions is None else parts_fingerprint([part_digest(p, schema) for p in parts], dataset)
        )
        if found != manifest.fingerprint:
            raise DataError(
                f"{path}: the tables have the fingerprint {found}, but {MANIFEST} says {manifest.fingerprint}: they were changed"
            )
    return dataset


def part_digest(events: pa.Table, schema: DatasetSchema) -> str:
    """Of the content of a part."""
    digest = hashlib.sha256()
    update_digest(digest, "interactions", events, schema.interactions.features)
    return digest.hexdigest()


def _read(path: Path, columns: FeatureSchema) -> pa.Table:
    return columns.conform(pq.ParquetFile(path).read(), what=str(path))
