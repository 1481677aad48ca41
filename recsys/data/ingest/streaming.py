# SPDX-License-Identifier: Apache-2.0
"""Ingest of events that do not fit in memory: the same rules and counts, applied to chunks of the source and to parts of the users.

What a rule decides by a row alone is decided chunk by chunk. Repeated rows are of one user, so that they are found within a part, which
holds all events of its users. Items and users are held in memory.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.engine import Engine, Progress, run_tasks, started
from recsys.core.errors import DataError
from recsys.core.files import read_json, write_bytes, write_json
from recsys.core.scatter import CHUNK_ROWS, Chunk, Scattered, chunks, gather_table, part_of, read_chunk, scattered_files, schema_of
from recsys.core.schema import EVENT_TIME, ITEM, USER
from recsys.core.workspace import PLAN, RESULT, stamps, work_folder, workspace
from recsys.data.dataset import TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.frames import from_arrow, to_arrow
from recsys.data.ingest import rules
from recsys.data.ingest.canonical import instant
from recsys.data.ingest.entities import Entities
from recsys.data.ingest.ledger import ROW, Ledger, sum_treatments, summary
from recsys.data.ingest.source import RawTable, read_table, refuse_delta, require
from recsys.data.ingest.store import (
    MANIFEST,
    SCHEMA,
    Manifest,
    Partitions,
    part_digest,
    part_file,
    parts_fingerprint,
    refuse_existing,
    write_table,
)

_ITEMS = "items.parquet"


def ingest_partitioned(
    interactions_path: str | Path,
    items_path: str | Path,
    users_path: str | Path | None,
    schema: DatasetSchema,
    out_dir: str | Path,
    *,
    partitions: int,
    chunk_rows: int = CHUNK_ROWS,
    engine: Engine | None = None,
    now: datetime | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """What `ingest` does, with one chunk of the events or one part of them in memory at a time.

    The directory holds ``interactions/part=NNNN/events.parquet``, in which part p has the events of the users that belong there, sorted by
    ``event_time``, then ``ingest_seq``; the rest is as `ingest` writes it, but for the fingerprint, which is over the parts one by one.
    `read_dataset` reads it as one data set, equal to the one that `ingest` makes, where that fits in memory.

    A run that was killed goes on where it was, if it is called again with equal arguments and files; where ``now`` is not given, with the
    present of the run that began. The result is the same.

    Args:
        interactions_path: a Parquet file or a folder of them.
        items_path: as for `ingest`.
        users_path: as for `ingest`.
        schema: the roles of the source columns.
        out_dir: where to.
        partitions: into how many parts the users are divided.
        chunk_rows: how many rows of the events are cast and checked at once.
        engine: where the work is done; all workers must see all files under the same paths.
        now: the latest time at which an event can have happened; by default the present.
        overwrite: replace the data set in ``out_dir``.
        progress: see `recsys.core.engine.Progress`.

    Raises:
        ConfigError: the engine is not installed.
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
        DataError: a source cannot be read, breaks a rule that dropping rows cannot repair, or ``out_dir`` exists (see `write_dataset`).
    """
    out, engine, source = Path(out_dir).resolve(), engine or Engine(), Path(interactions_path)
    refuse_existing(out, overwrite=overwrite)
    refuse_delta(source)
    require(str(source), schema.interactions.sources, schema_of(source).names)
    entities = _entities(out.name, schema, Path(items_path), None if users_path is None else Path(users_path))
    plan = {
        "name": out.name,
        "schema": schema.model_dump(mode="json"),
        "source": str(source),
        "resolved": str(source.resolve()),
        "items": str(items_path),
        "partitions": partitions,
        "chunk_rows": chunk_rows,
        "now": (_began(out) if now is None else instant(now)).isoformat(),
        "sources": [stamps(Path(path)) for path in (interactions_path, items_path, users_path) if path is not None],
    }
    with started(engine), workspace(out, plan) as work:
        write_table(work / _ITEMS, to_arrow(entities.items, schema.items.features))
        cut = chunks(source.resolve(), chunk_rows)
        tasks: list[Any] = [
            {"work": str(work), "place": place, "chunk": chunk.model_dump(mode="json")}
            for place, chunk in enumerate(cut)
            if not _note(work, "chunk", place).exists()
        ]
        run_tasks(engine, "cast and check", clean_chunk, tasks, progress)
        tasks = [{"work": str(work), "part": part} for part in range(partitions) if not _note(work, "part", part).exists()]
        run_tasks(engine, "sort and drop repeated rows", write_part, tasks, progress)
        of_chunks = [read_json(_note(work, "chunk", place)) for place in range(len(cut))]
        of_parts = [read_json(_note(work, "part", part)) for part in range(partitions)]
        return _finish(work / RESULT, plan, entities, of_chunks, of_parts)


def clean_chunk(task: dict[str, Any]) -> None:
    """Cast, check and clean one chunk of the events, and scatter it by user. What was done is written beside it."""
    work, place, chunk = Path(task["work"]), task["place"], Chunk.model_validate(task["chunk"])
    plan = read_json(work / PLAN)
    schema = DatasetSchema.model_validate(plan["schema"])
    whole = schema_of(Path(plan["resolved"]))
    columns = pa.schema([whole.field(name) for name in dict.fromkeys(schema.interactions.sources.values())])
    items = from_arrow(pq.read_table(work / _ITEMS, columns=[ITEM]))
    treatments: list[Treatment] = []
    added: set[str] = set()
    with Scattered(_scattered(work) / f"{place:06d}.parquet", schema.interactions.features.to_arrow(), plan["partitions"]) as writer:
        for first, piece in read_chunk(chunk, columns, rows=plan["chunk_rows"]):
            ledger, item_ledger = Ledger("interactions", plan["source"], piece.num_rows), Ledger("items", plan["items"], 0)
            events = rules.read_events(RawTable(plan["source"], from_arrow(piece), first), schema.interactions, ledger)
            events = rules.clean_events(events, ledger, datetime.fromisoformat(plan["now"]))
            events, known = rules.settle_unknown_items(events, items, schema.on_unknown_item, ledger, item_ledger)
            table = to_arrow(events, schema.interactions.features)
            writer.write(table, part_of(table.column(USER), plan["partitions"]))
            treatments += ledger.treatments
            added.update(known[ITEM][items.height :])
    note = {"read": chunk.rows, "treatments": _plain(sum_treatments(treatments)), "added": sorted(added)}
    write_json(_note(work, "chunk", place), note)


def write_part(task: dict[str, Any]) -> None:
    """Drop the repeated rows of one part, and sort and write the others. What was done is written down."""
    work, part = Path(task["work"]), task["part"]
    plan = read_json(work / PLAN)
    schema = DatasetSchema.model_validate(plan["schema"])
    events = from_arrow(gather_table(scattered_files(_scattered(work)), part, plan["partitions"]))
    ledger = Ledger("interactions", plan["source"], events.height)
    events = rules.drop_repeated(events, ledger).sort(EVENT_TIME, ROW)
    table = to_arrow(events, schema.interactions.features)
    write_table(part_file(work / RESULT, part), table)
    span = [time.isoformat() for time in (events[EVENT_TIME][0], events[EVENT_TIME][-1])] if events.height else []
    note = {"kept": events.height, "treatments": _plain(ledger.treatments), "span": span, "digest": part_digest(table, schema)}
    write_json(_note(work, "part", part), note)


def _entities(name: str, schema: DatasetSchema, items: Path, users: Path | None) -> Entities:
    """Items and users, of whose sources nothing stays in memory."""
    user_source = None if users is None else read_table(users, schema.users.sources if schema.users else {})
    return Entities(name, schema, read_table(items, schema.items.sources), user_source)


def _finish(
    result: Path, plan: dict[str, Any], entities: Entities, of_chunks: list[dict[str, Any]], of_parts: list[dict[str, Any]]
) -> Manifest:
    """Write all but the events; the report is the sum of what was noted."""
    schema = DatasetSchema.model_validate(plan["schema"])
    named = pl.DataFrame({ITEM: pl.Series(sorted({item for note in of_chunks for item in note["added"]}), dtype=pl.String)})
    entities.settle(named, Ledger("interactions", plan["source"], named.height))
    read, kept = sum(note["read"] for note in of_chunks), sum(note["kept"] for note in of_parts)
    noted = [Treatment.model_validate(each) for note in (*of_chunks, *of_parts) for each in note["treatments"]]
    treatments = sum_treatments(noted, [column.name for column in schema.interactions.values])
    if not kept:
        raise DataError(f"{plan['source']}: no event is left of {read} ({summary(treatments)})")
    spans = [[datetime.fromisoformat(time) for time in note["span"]] for note in of_parts if note["span"]]
    counts = TableCounts(table="interactions", file=plan["source"], read=read, kept=kept)
    none = schema.interactions.features.to_arrow().empty_table()
    dataset = entities.dataset(none, counts, treatments, (min(first for first, _ in spans), max(last for _, last in spans)))
    digests = tuple(note["digest"] for note in of_parts)
    for name, (table, _) in dataset.tables().items():
        if name != "interactions":
            write_table(result / f"{name}.parquet", table)
    write_bytes(result / SCHEMA, schema.dump().encode())
    manifest = Manifest(
        dataset=dataset.name,
        fingerprint=parts_fingerprint(digests, dataset),
        report=dataset.report,
        partitions=Partitions(count=len(of_parts), rows=tuple(note["kept"] for note in of_parts), digests=digests),
    )
    write_json(result / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _began(out: Path) -> datetime:
    """The present, as the run that is to be gone on with found it."""
    try:
        return datetime.fromisoformat(read_json(work_folder(out) / PLAN)["now"])
    except (OSError, ValueError, KeyError, TypeError):
        return instant(None)


def _scattered(work: Path) -> Path:
    return work / "scattered"


def _note(work: Path, what: str, number: int) -> Path:
    return work / "notes" / f"{what}-{number:06d}.json"


def _plain(treatments: list[Treatment] | tuple[Treatment, ...]) -> list[dict[str, Any]]:
    return [treatment.model_dump(mode="json") for treatment in treatments]
