# SPDX-License-Identifier: Apache-2.0
"""Bringing an online store up to date with the tables of the sources."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView, compile_view
from feature_store.counted import Counted, counted_name
from feature_store.definitions import FeatureRepo
from feature_store.log import Log, build_log, read_rows
from feature_store.offline import SourceTables, source_table
from feature_store.online.base import OnlineStore, Transaction, ViewState
from feature_store.online.packing import pack
from feature_store.online.reader import Stored, check_versions
from feature_store.tiles import Tiles, tiles_of_events, together
from recsys.core.errors import ConfigError, DataError
from recsys.core.schema import INGEST_SEQ, USER
from recsys.core.tombstones import Tombstones

OVERLAP = 10_000
BATCH_ENTITIES = 4096

Progress = Callable[[str, int, int], None]
"""Called with a view's name, how many entities of it were written, and how many will be."""


@dataclass(frozen=True)
class MaterializedView:
    """What was done for one view.

    Attributes:
        full: whether it was written anew, rather than brought up to date.
        events: how many rows of the source were read into it.
        entities: how many entities were written.
        watermark: see `ViewState`.
    """

    view: str
    full: bool
    events: int
    entities: int
    watermark: int | None


@dataclass(frozen=True)
class MaterializeReport:
    """What `materialize` did.

    Attributes:
        snapshot: the number of the snapshot that shows it.
    """

    snapshot: int
    views: tuple[MaterializedView, ...]


def materialize(
    repo: FeatureRepo,
    tables: SourceTables,
    store: OnlineStore,
    *,
    full: bool = False,
    overlap: int = OVERLAP,
    progress: Progress | None = None,
    forgotten: Tombstones | None = None,
) -> MaterializeReport:
    """Write every view of ``repo`` that is not of the request in one transaction: readers see either all of it or nothing.

    A view of events is brought up to date with the rows whose ``ingest_seq`` lies above its watermark, less ``overlap``; what is
    there already changes nothing, so the same call twice, or again after a crash, gives the same content, and no stored event is
    removed or changed. A static view, and one that is new or was defined otherwise, is written anew, from its table alone.

    Args:
        repo: the definitions.
        tables: see `SourceTables`; of a Delta table, what lies above the watermark is all that is read.
        store: where to.
        full: write every view anew.
        overlap: how far ``ingest_seq`` may run ahead of a row that is committed to the table later.
        progress: see `Progress`.
        forgotten: users whose rows are left out, although the tables hold them.

    Raises:
        DataError: a table is absent or breaks a rule of its source, or a view would be written anew from a table that ends before
            what the store has seen.
        SchemaError: a table lacks a column, or has it with another type.
        FeatureStoreError: the store cannot be written.
    """
    views = [view for view in (compile_view(repo, each.name) for each in repo.views) if not view.is_request]
    with store.transaction() as transaction:
        done = [_materialize_view(view, tables, transaction, full, overlap, progress, forgotten) for view in views]
        return MaterializeReport(transaction.id + 1, tuple(done))


def append(repo: FeatureRepo, source: str, events: pa.Table, store: OnlineStore, *, forgotten: Tombstones | None = None) -> int:
    """Make new events of a source visible online at once; returns the number of the snapshot that shows them.

    The watermarks stay, so the same events are expected in the source's table later, with the same ``ingest_seq``, and count once. Events
    of users who are ``forgotten`` are left out.

    Raises:
        ConfigError: there is no such source, or it has no events.
        DataError: an event lacks a time.
        FeatureStoreError: a view of the source was not materialised as it is defined.
        SchemaError: a column is absent or of another type.
    """
    if (kind := repo.source(source).kind) != "events":
        raise ConfigError(f"source {source!r} is {kind}; only events can be appended")
    views = tuple(compile_view(repo, view.name) for view in repo.views if view.source == source)
    events = forgotten.without(events, USER) if forgotten else events
    with store.transaction() as transaction:
        check_versions(views, transaction)
        for view in views:
            _add(view, read_rows(view, events), transaction, None, 0, None)
        return transaction.id + 1


def _materialize_view(
    view: CompiledView,
    tables: SourceTables,
    transaction: Transaction,
    full: bool,
    overlap: int,
    progress: Progress | None,
    forgotten: Tombstones | None,
) -> MaterializedView:
    name = view.view.name
    state = transaction.states().get(name)
    if state is not None and state.version != view.version:
        state = None
    reached = None if state is None else state.watermark
    anew = full or view.is_static or state is None
    above = None if anew or reached is None else reached - overlap
    table = source_table(view, tables, above=above, besides=(USER,) if forgotten else ())
    rows = read_rows(view, table)
    newest = None if view.is_static else pc.max(rows.column(INGEST_SEQ)).as_py()
    if forgotten:
        rows = read_rows(view, forgotten.without(table, USER))
    if anew:
        if reached is not None and (newest is None or newest < reached):
            raise DataError(
                f"view {name!r} cannot be written anew: table {view.source.table!r} ends at {INGEST_SEQ} {newest}, "
                f"but the store has seen {reached}"
            )
        transaction.clear(name)
        if counted_name(name) in transaction.states():
            transaction.clear(counted_name(name))
    elif above is not None:
        rows = rows.filter(pc.greater(rows.column(INGEST_SEQ), above))
    watermark = max((seq for seq in (reached, newest) if seq is not None), default=None)
    entities = _add(view, rows, transaction, watermark, overlap, progress)
    transaction.set_state(name, ViewState(view.version, watermark))
    return MaterializedView(name, anew, rows.num_rows, entities, watermark)


def _add(
    view: CompiledView, rows: pa.Table, transaction: Transaction, watermark: int | None, overlap: int, progress: Progress | None
) -> int:
    """Add the events of ``rows`` to what is stored of their entities; how many these are."""
    if view.view.tile is None:
        log = build_log(view, rows)
        _merge(view, log, transaction, progress)
        return len(log.entities)
    counted = Counted(view, transaction)
    fresh = counted.fresh(rows)
    log = build_log(view, fresh)
    _merge(view, log, transaction, progress)
    counted.add(fresh, watermark, overlap)
    return len(log.entities)


def _merge(view: CompiledView, log: Log, transaction: Transaction, progress: Progress | None) -> None:
    """Write what is stored of the entities with the events of ``log``, which for tiles must not be there yet."""
    total = len(log.entities)
    for first in range(0, total, BATCH_ENTITIES):
        last = min(first + BATCH_ENTITIES, total)
        batch = log.slice(first, last)
        (stored,) = Stored(transaction, (view,), batch.entities).logs()
        entities, offsets, rows = _with_tiles(view, stored, batch) if isinstance(stored, Tiles) else with_events(view, stored, batch)
        transaction.write(view.view.name, dict(zip(entities.to_pylist(), pack(rows, offsets), strict=True)))
        if progress is not None:
            progress(view.view.name, last, total)


def with_events(view: CompiledView, stored: Log, batch: Log) -> tuple[pa.Array, np.ndarray, pa.Table]:
    """Entities, offsets and rows of all events."""
    if len(stored):
        # The stored rows come first: of two rows of one event, the first counts.
        batch = build_log(view, pa.concat_tables([_with_entities(view, stored), _with_entities(view, batch)]))
    return batch.entities, batch.offsets, batch.rows


def _with_tiles(view: CompiledView, stored: Tiles, batch: Log) -> tuple[pa.Array, np.ndarray, pa.Table]:
    """Entities, offsets and rows of the tiles, with the events of ``batch`` added."""
    tiles = together(view, [stored, tiles_of_events(view, batch)])
    return tiles.entities, tiles.offsets, tiles.table(view)


def _with_entities(view: CompiledView, log: Log) -> pa.Table:
    """The rows of a log as `build_log` takes them."""
    entity = np.repeat(np.arange(len(log.entities)), np.diff(log.offsets))
    return log.rows.add_column(0, view.view.entity, log.entities.take(pa.array(entity)))
