# SPDX-License-Identifier: Apache-2.0
"""Histories in two Parquet files as a source for sweeps over retrievers: a catalogue of items with text, and who took what when."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.files import sha256_file
from recsys.core.schema import EVENT_TIME, ITEM, TIME, USER
from recsys.data.datasets.impressions import data_folder
from recsys.data.jagged import Jagged
from recsys.data.leave_one_out import leave_one_out
from recsys.data.sequences import SequenceData, evaluation_steps
from recsys.data.splits import POSITION, global_time_split, order_events
from recsys.retrieval.catalogue import Catalogue
from recsys.scaling.retrieval_data import RetrievalConfig, RetrievalData, Split

_EVENTS, _ITEMS = "interactions.parquet", "items.parquet"


class Periods(BaseConfig):
    """The shares of the events that validate and test, the latest ones."""

    valid: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.1, gt=0, lt=1)


@register("scaling_data", "histories")
class HistoriesData(RetrievalData):
    """A folder with ``interactions.parquet`` and ``items.parquet``.

    Interactions have ``user_id``, ``item_id`` and either ``event_time`` or, where only the order is known, ``position``; items have
    ``item_id`` and whatever their text is made of. Ids may be of any type that can be written as text.

    Raises:
        DataError: a file is not there.
    """

    class Config(RetrievalConfig):
        """Where the files are, and what is tested.

        Attributes:
            path: the folder, below the one that ``RECSYS_DATA`` names unless it is absolute.
            periods: split by global time; null leaves out each user's last two events, which leaks the future (`leave_one_out`).
        """

        name: Literal["histories"] = "histories"
        path: Path
        periods: Periods | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config
        self._folder = config.path if config.path.is_absolute() else data_folder(str(config.path))
        for name in (_EVENTS, _ITEMS):
            if not (self._folder / name).is_file():
                raise DataError(f"{self._folder}: expected {_EVENTS} and {_ITEMS}; there is no {name}")

    @cached_property
    def content(self) -> dict[str, Any]:
        """See `RetrievalData.content`: the files, and how they are split."""
        files = {name: sha256_file(self._folder / name) for name in (_EVENTS, _ITEMS)}
        return {"files": files, **self.config.model_dump(mode="json", include={"periods"})}

    @cached_property
    def items(self) -> pa.Table:
        """See `RetrievalData.items`: in the order of the file."""
        return _read(self._folder / _ITEMS, ITEM)

    @cached_property
    def whole(self) -> Split:
        """See `RetrievalData.whole`."""
        events = _read(self._folder / _EVENTS, USER, ITEM)
        data = self._timed(events) if EVENT_TIME in events.column_names else self._ordered(events)
        if self.config.periods is None:
            return Split(data, *leave_one_out(data))
        if data.times is None:
            raise SchemaError(f"{self._folder / _EVENTS}: periods: expected a column {EVENT_TIME!r}, but only the order is known")
        split = global_time_split(events[EVENT_TIME].cast(TIME), self.config.periods.valid, self.config.periods.test)
        valid, test = evaluation_steps(data, split.valid_start, split.test_start), evaluation_steps(data, split.test_start)
        return Split(data, data.before(split.valid_start), valid, test)

    def _timed(self, events: pa.Table) -> SequenceData:
        place = events.column_names.index(EVENT_TIME)
        timed = events.set_column(place, EVENT_TIME, events[EVENT_TIME].cast(TIME)).select([USER, ITEM, EVENT_TIME])
        return SequenceData.from_events(order_events(timed, self.config.seed), Catalogue(self.items[ITEM]).rows)

    def _ordered(self, events: pa.Table) -> SequenceData:
        path = self._folder / _EVENTS
        if POSITION not in events.column_names:
            raise SchemaError(f"{path}: expected a column {EVENT_TIME!r} or {POSITION!r}; it has {', '.join(events.column_names)}")
        events = events.sort_by([(USER, "ascending"), (POSITION, "ascending")])
        rows = Catalogue(self.items[ITEM]).rows(events[ITEM])
        if (rows < 0).any():
            raise DataError(f"{path}: item {events[ITEM][int(np.argmax(rows < 0))].as_py()!r} is not in {_ITEMS}")
        users = events[USER].combine_chunks().dictionary_encode()
        lengths = np.bincount(users.indices.to_numpy(), minlength=len(users.dictionary))
        return SequenceData.from_order(users.dictionary.to_pylist(), Jagged(rows, np.concatenate([[0], np.cumsum(lengths)])))


def _read(path: Path, *ids: str) -> pa.Table:
    """A file whose columns of ids are there, without nulls, and text."""
    table = pq.read_table(path)
    for name in ids:
        if name not in table.column_names:
            raise SchemaError(f"{path}: missing column: {unknown('column', name, table.column_names)}")
        if table[name].null_count:
            raise SchemaError(f"{path}: column {name!r}: expected no null, got {table[name].null_count}")
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    return table
