# SPDX-License-Identifier: Apache-2.0
"""Features as of points in time for a spine and logs that do not fit in memory.

Every entity type is looked up in parts of its own: the spine's rows and the logs are scattered by a hash of that entity's key
(`recsys.core.scatter`), so that a part holds all events of its entities, and `OfflineReader` answers for a part as it does for a whole
log. What it gives is scattered again by where the row belongs in the result, and there put beside the features of other entity types.

The memory is that of the largest part of a log and of what `OfflineReader` makes of it, ``slice_rows`` rows of features, and of a part of
the result. One key's events are never divided: an item with a tenth of all events makes a part of at least that size.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_store import partition_tasks as tasks
from feature_store.definitions import FeatureRepo
from feature_store.partition_plan import JoinConfig, Plan
from recsys.core.engine import Engine, Progress, run_tasks, started
from recsys.core.errors import DataError
from recsys.core.scatter import Chunk, chunks
from recsys.core.workspace import RESULT, workspace

__all__ = ["JoinConfig", "JoinReport", "join_features"]

_READ_DONE = "read.done"


@dataclass(frozen=True)
class JoinReport:
    """What a join wrote: so many rows, as many as the spine has, in so many parts."""

    rows: int
    parts: int


def join_features(
    repo: FeatureRepo,
    tables: Mapping[str, Path],
    services: Sequence[str],
    spine: Path,
    out: Path,
    config: JoinConfig | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> JoinReport:
    """Write the spine with the features of ``services`` to the folder ``out``, in bounded memory.

    Every row has what `OfflineReader.read` gives for it: the columns of the spine, then the features of each service and their statuses. It
    is in ``out/part=NNNN/rows.parquet``; `JoinConfig.order` says in which part and in which order. As many rows come out as go in.

    A run that was killed goes on where it was, if it is called again with the same arguments and files, on any engine; the result is the
    same, to the byte. What is done so far is kept beside ``out`` until the end.

    Args:
        repo: the definitions.
        tables: the sources' tables by their names: a Parquet file, a folder of them, or a version of a Delta table (``table@v7``) each.
        services: what to read; they may be of different entity types. Features of the request are made of the columns of the spine.
        spine: a Parquet file or a folder of them: the keys of the services' entities, ``request_time``, and whatever is to be kept.
        out: a folder that does not exist.
        config: how the work is cut.
        engine: where it is done; all workers must see all files under the same paths.
        progress: see `recsys.core.engine.Progress`.

    Raises:
        ConfigError: there is no such service, two of them share a view, or the engine is not installed.
        DataError: ``out`` exists; a table was not given, cannot be read, or breaks a rule of its source.
        SchemaError: a column is absent or of another type, or has the name of a feature.
    """
    if out.exists():
        raise DataError(f"{out} exists already: choose another name")
    config, engine, out = config or JoinConfig(), engine or Engine(), out.resolve()
    spine_chunks = chunks(spine, config.chunk_rows)
    plan = Plan.make(repo, tables, services, spine, config, sum(chunk.rows for chunk in spine_chunks))
    with started(engine), workspace(out, plan.model_dump(mode="json")) as work:
        _run(plan, work, spine_chunks, engine, progress)
    return JoinReport(plan.rows, config.partitions)


def _run(plan: Plan, work: Path, spine_chunks: list[Chunk], engine: Engine, progress: Progress | None) -> None:
    parts = range(plan.config.partitions)
    scattered = [place for place in range(len(plan.groups)) if place or not plan.carries_last]
    if not (work / _READ_DONE).exists():
        run_tasks(engine, "scatter the spine", tasks.scatter_spine, _spine_tasks(plan, work, spine_chunks), progress)
        run_tasks(engine, "scatter the logs", tasks.scatter_log, _log_tasks(plan, work), progress)
        places = [(place, part) for place in scattered for part in parts if not tasks.read_file(work, place, part).exists()]
        todo: list[Any] = [{"work": str(work), "group": place, "part": part} for place, part in places]
        run_tasks(engine, "read features", tasks.read_part, todo, progress)
        (work / _READ_DONE).touch()
    for place in scattered:  # what was read is not needed again: room for the result
        for folder in (tasks.spine_file(work, place, 0).parent, tasks.log_folder(work, place)):
            shutil.rmtree(folder, ignore_errors=True)
    todo = [{"work": str(work), "part": part} for part in parts if not tasks.result_file(work / RESULT, part).exists()]
    run_tasks(engine, "write the result", tasks.write_part, todo, progress)


def _spine_tasks(plan: Plan, work: Path, spine_chunks: list[Chunk]) -> list[Any]:
    return [
        {"work": str(work), "place": place, "chunk": chunk.model_dump(mode="json")}
        for place, chunk in enumerate(spine_chunks)
        if not all(tasks.spine_file(work, group, place).exists() for group in range(len(plan.groups)))
    ]


def _log_tasks(plan: Plan, work: Path) -> list[Any]:
    return [
        {"work": str(work), "group": group, "table": table, "place": place, "chunk": chunk.model_dump(mode="json")}
        for group, of in enumerate(plan.groups)
        for table in of.tables
        for place, chunk in enumerate(chunks(Path(plan.tables[table]), plan.config.chunk_rows))
        if not tasks.log_file(plan, work, group, table, place).exists()
    ]
