# SPDX-License-Identifier: Apache-2.0
"""The tasks of `feature_store.partitions`: each reads files below a workspace and writes one, and can be run again.

The files: ``spine/G/`` and ``log/G/T/`` hold the spine and table T scattered by the key of group G, ``read/G/`` the features of each part
of group G scattered by where their rows belong, ``result/`` what is asked for.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.offline import OfflineReader
from feature_store.partition_plan import DESTINATION, ROW, Group, Plan
from recsys.core.config import parse
from recsys.core.errors import DataError
from recsys.core.files import new_file, read_json
from recsys.core.scatter import Chunk, Scattered, gather, gather_table, part_of, read_chunk, regroup, scattered_files, schema_of
from recsys.core.workspace import PLAN, RESULT

_PLACE = pa.schema([pa.field(ROW, pa.int64()), pa.field(DESTINATION, pa.uint16())])


def spine_file(work: Path, group: int, chunk: int) -> Path:
    """Where a chunk of the spine is scattered for a group."""
    return work / "spine" / f"{group}" / f"{chunk:06d}.parquet"


def log_folder(work: Path, group: int) -> Path:
    """Where the logs of a group are scattered."""
    return work / "log" / f"{group}"


def log_file(plan: Plan, work: Path, group: int, table: str, chunk: int) -> Path:
    """Where a chunk of a table is scattered for a group."""
    return log_folder(work, group) / f"{list(plan.groups[group].tables).index(table)}" / f"{chunk:06d}.parquet"


def read_file(work: Path, group: int, part: int) -> Path:
    """Where the features of a group's part are scattered."""
    return work / "read" / f"{group}" / f"{part:04d}.parquet"


def result_file(out: Path, part: int) -> Path:
    """The file of a part of the result."""
    return out / f"part={part:04d}" / "rows.parquet"


def scatter_spine(task: dict[str, Any]) -> None:
    """One chunk of the spine, for every group."""
    work, plan = _opened(task)
    chunk = parse(Chunk, task["chunk"], source="task")
    schema, parts = schema_of(Path(plan.spine)), plan.config.partitions
    with ExitStack() as stack:
        writers = []
        for place, group in enumerate(plan.groups):
            columns = pa.schema([*(schema.field(name) for name in group.spine), *_PLACE])
            writers.append(stack.enter_context(Scattered(spine_file(work, place, task["place"]), columns, parts)))
        for first, piece in read_chunk(chunk, schema, rows=plan.config.chunk_rows):
            rows = np.arange(first, first + piece.num_rows)
            part = [part_of(piece.column(group.entity), parts) for group in plan.groups]
            destination = part[0] if plan.carries_last else (rows * parts // max(plan.rows, 1)).astype(np.uint16)
            placed = piece.append_column(_PLACE.field(0), pa.array(rows)).append_column(_PLACE.field(1), pa.array(destination))
            for writer, group, mine in zip(writers, plan.groups, part, strict=True):
                writer.write(placed.select([*group.spine, *_PLACE.names]), mine)


def scatter_log(task: dict[str, Any]) -> None:
    """One chunk of a table, for one group. Rows without its entity are left out, as the reader would do."""
    work, plan = _opened(task)
    chunk = parse(Chunk, task["chunk"], source="task")
    group = plan.groups[task["group"]]
    whole = schema_of(Path(plan.tables[task["table"]]))
    schema = pa.schema([whole.field(name) for name in group.tables[task["table"]]])
    with Scattered(log_file(plan, work, task["group"], task["table"], task["place"]), schema, plan.config.partitions) as writer:
        for _, piece in read_chunk(chunk, schema, rows=plan.config.chunk_rows):
            keyed = piece.filter(pc.is_valid(piece.column(group.entity)))
            writer.write(keyed, part_of(keyed.column(group.entity), plan.config.partitions))


def read_part(task: dict[str, Any]) -> None:
    """The features of one part of a group, scattered by where their rows belong."""
    work, plan = _opened(task)
    place, part, parts = task["group"], task["part"], plan.config.partitions
    with ExitStack() as stack:
        writer: Scattered | None = None
        for table in _features(plan, work, place, part):
            kept = table if place == 0 else table.drop_columns(list(plan.groups[place].spine))
            if writer is None:
                writer = stack.enter_context(Scattered(read_file(work, place, part), kept.schema, parts))
            writer.write(kept, np.asarray(kept.column(DESTINATION)))


def write_part(task: dict[str, Any]) -> None:
    """One part of the result."""
    work, plan = _opened(task)
    part = task["part"]
    beside = [_in_order(work, place, part, plan) for place in range(1, len(plan.groups))]
    carrier = _features(plan, work, 0, part) if plan.carries_last else iter([_in_order(work, 0, part, plan)])
    with new_file(result_file(work / RESULT, part)) as temporary, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        done = 0
        for table in carrier:
            for other in beside:
                table = _beside(table, other.slice(done, table.num_rows))
            done += table.num_rows
            result = table.select(list(plan.columns))
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(temporary, result.schema, compression="zstd"))
            writer.write_table(result, row_group_size=plan.config.row_group)


def _opened(task: dict[str, Any]) -> tuple[Path, Plan]:
    work = Path(task["work"])
    return work, parse(Plan, read_json(work / PLAN), source=str(work / PLAN))


def _features(plan: Plan, work: Path, place: int, part: int) -> Iterator[pa.Table]:
    """The rows of one part of a group in the order of the spine, with the features of its services, in slices."""
    group, parts = plan.groups[place], plan.config.partitions
    files = scattered_files(spine_file(work, place, 0).parent)
    reader = OfflineReader(plan.repo, _tables(plan, work, place, part), ignore_available_time=plan.config.ignore_available_time)
    schema = pq.read_schema(files[0])
    for piece in regroup(gather(files, part, parts), schema, plan.config.slice_rows):
        yield _read(reader, group, piece)


def _read(reader: OfflineReader, group: Group, piece: pa.Table) -> pa.Table:
    """Each service reads the same rows, so that none sees another's features."""
    result = piece
    for service in group.services:
        read = reader.read(service, piece)
        for field, column in zip(list(read.schema)[piece.num_columns :], read.columns[piece.num_columns :], strict=True):
            result = result.append_column(field, column)
    return result


def _tables(plan: Plan, work: Path, place: int, part: int) -> dict[str, pa.Table]:
    tables = plan.groups[place].tables
    folders = {table: log_file(plan, work, place, table, 0).parent for table in tables}
    return {table: gather_table(scattered_files(folder), part, plan.config.partitions) for table, folder in folders.items()}


def _in_order(work: Path, place: int, part: int, plan: Plan) -> pa.Table:
    """What was read of a group for one part of the result, in the order of the spine."""
    table = gather_table(scattered_files(read_file(work, place, 0).parent), part, plan.config.partitions)
    return table.take(pa.array(np.argsort(np.asarray(table.column(ROW)), kind="stable")))


def _beside(table: pa.Table, other: pa.Table) -> pa.Table:
    if not np.array_equal(table.column(ROW), other.column(ROW)):
        raise DataError("the parts of the spine and of its features are not of the same rows: files of the workspace were changed")
    for field, column in zip(other.schema, other.columns, strict=True):
        if field.name not in _PLACE.names:
            table = table.append_column(field, column)
    return table
