# SPDX-License-Identifier: Apache-2.0
"""Which events the tiles of a view hold already: what was added to a tile cannot be found in it again.

Beside the tiles a store keeps, of the events above a *floor* of ``ingest_seq``, which of them were counted; all below it were, or came too
late. The floor lies below the watermark by the overlap of materialisation, so that the list is no longer than that.
"""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.online.base import Transaction, ViewState
from feature_store.online.packing import pack, unpack
from recsys.core.schema import EVENT_TIME, INGEST_SEQ, TIME

_ONE = ""
"""The entity whose value is the list."""
_ENTITY = "entity"
_SCHEMA = pa.schema(
    [
        pa.field(INGEST_SEQ, pa.int64(), nullable=False),
        pa.field(EVENT_TIME, TIME, nullable=False),
        pa.field(_ENTITY, pa.string(), nullable=False),
    ]
)


def counted_name(view: str) -> str:
    """Under what the list of a view stands in a store, where no view has such a name."""
    return f"{view}/counted"


class Counted:
    """The events of a view that were counted, as a transaction finds them.

    Args:
        view: with tiles.
        transaction: of the store.
    """

    def __init__(self, view: CompiledView, transaction: Transaction) -> None:
        self._view, self._transaction, self._name = view, transaction, counted_name(view.view.name)
        state = transaction.states().get(self._name)
        self._floor = None if state is None else state.watermark
        (value,) = transaction.multi_get({self._name: [_ONE]})[self._name]
        self._events = _SCHEMA.empty_table() if value is None else unpack([value], _SCHEMA)[0]

    def fresh(self, rows: pa.Table) -> pa.Table:
        """The rows (see `feature_store.log.read_rows`) whose events were not counted yet."""
        above = rows if self._floor is None else rows.filter(pc.greater(rows.column(INGEST_SEQ), self._floor))
        placed = _frame(self._identity(above)).with_row_index("__place")
        places = placed.join(_frame(self._events), on=_SCHEMA.names, how="anti")["__place"].sort()
        return above.take(pa.array(places.to_numpy().astype(np.int64)))

    def add(self, rows: pa.Table, watermark: int | None, overlap: int) -> None:
        """Note that ``rows`` are counted, and forget what lies below the new floor.

        Args:
            rows: what `fresh` gave.
            watermark: how far the view was materialised; None for no further than before.
            overlap: of the materialisation.
        """
        floors = [floor for floor in (self._floor, None if watermark is None else watermark - overlap) if floor is not None]
        floor = max(floors, default=None)
        events = pa.concat_tables([self._events, self._identity(rows)])
        if floor is not None:
            events = events.filter(pc.greater(events.column(INGEST_SEQ), floor))
        distinct = events.group_by(_SCHEMA.names).aggregate([]).select(_SCHEMA.names)
        ordered = distinct.sort_by([(name, "ascending") for name in _SCHEMA.names]).cast(_SCHEMA).combine_chunks()
        (value,) = pack(ordered, np.array([0, ordered.num_rows]))
        self._transaction.write(self._name, {_ONE: value})
        self._transaction.set_state(self._name, ViewState(self._view.version, floor))

    def _identity(self, rows: pa.Table) -> pa.Table:
        columns = [rows.column(name) for name in (INGEST_SEQ, EVENT_TIME, self._view.view.entity)]
        return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
