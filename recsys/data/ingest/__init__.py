# SPDX-License-Identifier: Apache-2.0
"""A user's own events and items become a data set: one door, and every treatment is counted."""

from datetime import datetime
from pathlib import Path

from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest.canonical import canonicalise
from recsys.data.ingest.source import RawTable, read_table
from recsys.data.ingest.store import read_dataset, refuse_existing, write_dataset
from recsys.data.ingest.streaming import ingest_partitioned

__all__ = ["RawTable", "canonicalise", "ingest", "ingest_partitioned", "read_dataset", "write_dataset"]


def ingest(
    interactions_path: str | Path,
    items_path: str | Path,
    users_path: str | Path | None,
    schema: DatasetSchema,
    out_dir: str | Path,
    *,
    now: datetime | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Read Parquet, CSV or TSV files, make them canonical (see `canonicalise`), and write them to ``out_dir``.

    The directory holds ``interactions.parquet`` (sorted by ``event_time``, then ``ingest_seq``), ``items.parquet``, ``users.parquet``
    where there are users, ``schema.yaml``, and ``dataset.json`` with the fingerprint and the report. The data set takes its name.

    Raises:
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
        DataError: a source cannot be read, breaks a rule that dropping rows cannot repair, or ``out_dir`` exists (see `write_dataset`).
    """
    out = Path(out_dir).resolve()
    refuse_existing(out, overwrite=overwrite)
    interactions = read_table(Path(interactions_path), schema.interactions.sources)
    items = read_table(Path(items_path), schema.items.sources)
    users = None if users_path is None else read_table(Path(users_path), schema.users.sources if schema.users else {})
    dataset = canonicalise(out.name, schema, interactions, items, users, now=now)
    write_dataset(dataset, out, overwrite=overwrite)
    return dataset
