# SPDX-License-Identifier: Apache-2.0
"""Features of every event of a data set on disk, in bounded memory."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from feature_store.definitions import FeatureRepo
from feature_store.partitions import JoinConfig, JoinReport, join_features
from pipelines.steps.prepared import as_impressions
from recsys.core.config import Config
from recsys.core.engine import Engine, Progress, run_tasks, started
from recsys.core.errors import DataError
from recsys.core.files import new_file
from recsys.core.scatter import Chunk, chunks, read_chunk, schema_of
from recsys.data.datasets import Ingested
from recsys.data.ingest.store import read_manifest, table_paths

_ROW_GROUP = 1 << 17


def join_events(
    features: FeatureRepo,
    dataset: Config,
    out: Path,
    *,
    services: Sequence[str],
    config: JoinConfig,
    spine: Path | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> JoinReport:
    """See `feature_store.partitions.join_features`; the tables are those of a data set that `recsys ingest` wrote.

    Args:
        features: the definitions.
        dataset: the section of a recipe; it must be of the kind ``ingested``.
        out: a folder that does not exist.
        services: what to read.
        config: how the work is cut.
        spine: whose rows are to have features; by default those of `write_impressions` of all events, kept beside ``out`` until the end.
        engine: where the work is done.
        progress: see `recsys.core.engine.Progress`.

    Raises:
        DataError: the data set is of another kind or not there, or what `join_features` says.
    """
    if not isinstance(dataset, Ingested.Config):
        name = getattr(dataset, "name", "")
        raise DataError(f"dataset: expected {{name: ingested, path: ...}}, since others are made in memory; got {name!r}")
    tables, engine = table_paths(dataset.path), engine or Engine()
    if out.exists():
        raise DataError(f"{out} exists already: choose another name")
    with started(engine):
        if spine is not None:
            return join_features(features, tables, services, spine, out, config, engine=engine, progress=progress)
        fingerprint = read_manifest(dataset.path)[0].fingerprint
        own = out.resolve().with_name(f".{out.name}.spine-{fingerprint[:12]}")
        write_impressions(tables["interactions"], own, config.chunk_rows, engine, progress)
        report = join_features(features, tables, services, own, out, config, engine=engine, progress=progress)
    shutil.rmtree(own)
    return report


def write_impressions(interactions: Path, out: Path, rows: int, engine: Engine, progress: Progress | None = None) -> None:
    """All events as rows to be ranked (see `pipelines.steps.prepared.as_impressions`), in a folder with one file for each chunk of the log.

    Args:
        interactions: the canonical events: a Parquet file or a folder of them.
        out: a folder; the files that an earlier run has written there are kept.
        rows: how many make a chunk.
        engine: where the work is done.
        progress: see `recsys.core.engine.Progress`.
    """
    source = interactions.resolve()
    files = {out / f"{place:06d}.parquet": chunk for place, chunk in enumerate(chunks(source, rows))}
    tasks: list[Any] = [
        {"source": str(source), "file": str(file), "chunk": chunk.model_dump(mode="json")}
        for file, chunk in files.items()
        if not file.exists()
    ]
    run_tasks(engine, "write the spine", write_chunk, tasks, progress)


def write_chunk(task: dict[str, Any]) -> None:
    """The impressions of one chunk of events."""
    schema = schema_of(Path(task["source"]))
    with new_file(Path(task["file"])) as temporary, pq.ParquetWriter(temporary, as_impressions(schema.empty_table()).schema) as writer:
        for _, piece in read_chunk(Chunk.model_validate(task["chunk"]), schema):
            writer.write_table(as_impressions(piece), row_group_size=_ROW_GROUP)
