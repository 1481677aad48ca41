# SPDX-License-Identifier: Apache-2.0
"""A data set with its events in order and split in time, as every later step reads it."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.core.errors import DataError
from recsys.core.files import read_json, write_json
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, ITEM, REQUEST_TIME, TIME, USER
from recsys.data.dataset import Dataset
from recsys.data.ingest.store import MANIFEST, read_dataset, write_dataset
from recsys.data.splits import PARTS, TimeSplit, evaluation_segments, global_time_split, order_events

if TYPE_CHECKING:
    from pipelines.recipe import Split

_CANONICAL = (USER, ITEM, EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ)
_SECOND = 1_000_000
_DATASET, _EVENTS, _SPLIT = "dataset", "events.parquet", "split.json"


@dataclass(frozen=True)
class Prepared:
    """What every later step reads.

    Attributes:
        dataset: canonical tables.
        split: the times at which validation and test begin.
        events: the interactions, ordered by user, second and, inside a second, by seed; with ``step`` and ``position``.
        fingerprint: of the data set.
        daily: whether the data set came in days.
    """

    dataset: Dataset
    split: TimeSplit
    events: pa.Table
    fingerprint: str
    daily: bool = False

    @cached_property
    def parts(self) -> dict[str, pa.Table]:
        """The events of ``train``, ``valid`` and ``test``, in their order."""
        return self.split.parts(self.events)

    @property
    def end(self) -> datetime:
        """A moment after the last event."""
        last: datetime = pc.max(self.events.column(EVENT_TIME)).as_py()
        return last + timedelta(seconds=1)

    def impressions(self, part: str) -> pa.Table:
        """The events of a part, see `as_impressions`."""
        return as_impressions(self.parts[part].select(self.dataset.interactions.column_names))

    def events_of(self, user_id: str, until: datetime) -> pa.Table:
        """The interactions of one user up to a time, in the order in which the feature store counts them."""
        table = self.dataset.interactions
        mine = pc.and_(pc.equal(table.column(USER), user_id), pc.less_equal(table.column(EVENT_TIME), pa.scalar(until, TIME)))
        return table.filter(mine).sort_by([(EVENT_TIME, "ascending"), (INGEST_SEQ, "ascending")])

    def segments(self) -> dict[str, np.ndarray]:
        """Masks over the test events, in their order: all users, users with 5 earlier events, users first seen in the test period."""
        return evaluation_segments(self.events, self.split)

    def save(self, directory: Path) -> None:
        """Write what `load_prepared` reads."""
        write_dataset(self.dataset, directory / _DATASET)
        pq.write_table(self.events, directory / _EVENTS)
        times = {"valid_start": self.split.valid_start.isoformat(), "test_start": self.split.test_start.isoformat()}
        counts = {part: events.num_rows for part, events in self.parts.items()}
        write_json(directory / _SPLIT, times | {"events": counts, "daily": self.daily})


def as_impressions(events: pa.Table) -> pa.Table:
    """Canonical events as rows to be ranked: features are asked for one microsecond before the event's second; values are kept."""
    second = events.column(EVENT_TIME).cast(pa.int64()).to_numpy() // _SECOND * _SECOND
    request_time = pa.array(second - 1, pa.int64()).cast(TIME)
    columns = {USER: events.column(USER), ITEM: events.column(ITEM), REQUEST_TIME: request_time}
    return pa.table(columns | {name: events.column(name) for name in events.column_names if name not in _CANONICAL})


def split_events(dataset: Dataset, split: "Split", seed: int, *, daily: bool = False) -> Prepared:
    """Split a data set by time, and order its events.

    Raises:
        DataError: a part of the split is empty.
    """
    times = global_time_split(dataset.interactions.column(EVENT_TIME), split.valid, split.test)
    prepared = Prepared(dataset, times, order_events(dataset.interactions, seed), dataset.fingerprint(), daily)
    for part in PARTS:
        if not prepared.parts[part].num_rows:
            raise DataError(f"split: the {part} period has no events")
    return prepared


def load_prepared(directory: Path) -> Prepared:
    """What `Prepared.save` wrote."""
    about = read_json(directory / _SPLIT)
    split = TimeSplit(*(datetime.fromisoformat(about[name]) for name in ("valid_start", "test_start")))
    fingerprint = read_json(directory / _DATASET / MANIFEST)["fingerprint"]
    dataset = read_dataset(directory / _DATASET, verify=False)
    return Prepared(dataset, split, pq.read_table(directory / _EVENTS), fingerprint, about["daily"])
