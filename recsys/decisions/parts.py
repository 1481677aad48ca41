# SPDX-License-Identifier: Apache-2.0
"""Decisions as rows of a Parquet part.

A part has one row for each decision. ``shown`` and ``candidates`` are lists of structs; the features that were served are Arrow IPC streams
of their own, since bundles that read other features share a part, and since their bits must come back as they were. ``candidates``,
``wanted``, ``user``, ``items`` and ``seen`` are null where the evidence was not kept.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import SchemaError
from recsys.core.files import canonical_json
from recsys.core.part_log import part_files, read_part
from recsys.core.schema import TIME
from recsys.decisions.decision import CANDIDATES, SHOWN, Decision, Evidence

FORMAT_KEY, FORMAT = b"recsys.decisions", b"1"
PART = "decision part"
SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("time", TIME),
        ("user_id", pa.string()),
        ("k", pa.int32()),
        ("kind", pa.string()),
        ("explain", pa.bool_()),
        ("model", pa.string()),
        ("bundle", pa.string()),
        ("version", pa.int64()),
        ("feature_versions", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("shown", pa.list_(pa.struct(list(SHOWN)))),
        ("candidates", pa.list_(pa.struct(list(CANDIDATES)))),
        ("wanted", pa.int32()),
        ("user", pa.binary()),
        ("items", pa.binary()),
        ("seen", pa.list_(pa.string())),
    ]
)


def to_table(decisions: Sequence[Decision]) -> pa.Table:
    """One row for each decision."""
    kept = [decision.evidence for decision in decisions]
    columns = {
        "request_id": [decision.request_id for decision in decisions],
        "time": [decision.time for decision in decisions],
        "user_id": [decision.user_id for decision in decisions],
        "k": [decision.k for decision in decisions],
        "kind": [decision.kind for decision in decisions],
        "explain": [decision.explain for decision in decisions],
        "model": [decision.model for decision in decisions],
        "bundle": [decision.bundle for decision in decisions],
        "version": [decision.version for decision in decisions],
        "feature_versions": [canonical_json(dict(decision.feature_versions)).decode() for decision in decisions],
        "flags": [list(decision.flags) for decision in decisions],
        "shown": _lists([decision.shown for decision in decisions], SHOWN),
        "candidates": _lists([None if each is None else each.candidates for each in kept], CANDIDATES),
        "wanted": [None if each is None else each.wanted for each in kept],
        "user": [None if each is None else _stream(each.user) for each in kept],
        "items": [None if each is None else _stream(each.items) for each in kept],
        "seen": [None if each is None or each.seen is None else each.seen.to_pylist() for each in kept],
    }
    return pa.table(columns, schema=SCHEMA.with_metadata({FORMAT_KEY: FORMAT}))


def from_table(part: pa.Table) -> Iterator[Decision]:
    """The decisions of the rows of a part."""
    plain = part.select([name for name in SCHEMA.names if name not in ("shown", "candidates")]).to_pylist()
    for row, shown, candidates in zip(plain, part.column("shown"), part.column("candidates"), strict=True):
        evidence = None
        if candidates.is_valid:
            seen = None if row["seen"] is None else pa.array(row["seen"], pa.string())
            evidence = Evidence(_rows(candidates, CANDIDATES), row["wanted"], _table(row["user"]), _table(row["items"]), seen)
        own = {name: row[name] for name in ("request_id", "time", "user_id", "k", "kind", "explain", "model", "bundle", "version")}
        versions = json.loads(row["feature_versions"])
        yield Decision(**own, feature_versions=versions, flags=tuple(row["flags"]), shown=_rows(shown, SHOWN), evidence=evidence)


def read_decisions_part(path: Path, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """A part of a decision log, with some of its columns.

    Raises:
        DataError: it is damaged, of an unknown version or something else; names the file.
        SchemaError: it lacks a column, or has it with another type; names the file.
    """
    part = read_part(path, FORMAT_KEY, FORMAT, PART, list(columns))
    for name in columns:
        if name not in part.column_names:
            raise SchemaError(f"{PART} {path}: missing column: expected {name!r} among {', '.join(part.column_names)}")
        if part.schema.field(name).type != SCHEMA.field(name).type:
            raise SchemaError(f"{PART} {path}: column {name!r}: expected {SCHEMA.field(name).type}, got {part.schema.field(name).type}")
    return part


def read_decisions(folder: Path) -> Iterator[Decision]:
    """All decisions of a log, in the order in which they were written, one part in memory at a time.

    Raises:
        DataError, SchemaError: see `read_decisions_part`.
    """
    for path in part_files(folder):
        yield from from_table(read_decisions_part(path))


def decisions_of(folder: Path, bundle: str) -> Iterator[Decision]:
    """The decisions of a log that one bundle made, in the order in which they were written; parts without any are not read whole.

    Args:
        folder: of the log.
        bundle: its SHA-256.

    Raises:
        DataError, SchemaError: see `read_decisions_part`.
    """
    for path in part_files(folder):
        if pc.any(pc.equal(read_decisions_part(path, ("bundle",)).column("bundle"), bundle)).as_py():
            part = read_decisions_part(path)
            yield from from_table(part.filter(pc.equal(part.column("bundle"), bundle)))


def _lists(tables: Sequence[pa.Table | None], schema: pa.Schema) -> pa.Array:
    """Each table as one list of structs, null for None."""
    lengths = [0 if table is None else table.num_rows for table in tables]
    whole = pa.concat_tables([schema.empty_table(), *(table for table in tables if table is not None)])
    structs = pa.StructArray.from_arrays([column.combine_chunks() for column in whole.columns], fields=list(schema))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, structs, mask=pa.array([table is None for table in tables]))


def _rows(value: Any, schema: pa.Schema) -> pa.Table:
    """The structs of one list as a table."""
    return pa.Table.from_arrays(value.values.flatten(), schema=schema)


def _stream(table: pa.Table | None) -> bytes | None:
    if table is None:
        return None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(content: bytes | None) -> pa.Table | None:
    return None if content is None else pa.ipc.open_stream(content).read_all()
