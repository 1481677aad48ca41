# SPDX-License-Identifier: Apache-2.0
"""From a data set to ordered events, a split in time, and a reader of features as of any moment."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from pipelines.recipe import Recipe
from recsys.core.errors import DataError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, ITEM, REQUEST_TIME, TIME, USER
from recsys.data.datasets import Dataset, load_dataset
from recsys.data.splits import PARTS, TimeSplit, evaluation_segments, global_time_split, order_events

_CANONICAL = (USER, ITEM, EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ)
_SECOND = 1_000_000


@dataclass(frozen=True)
class Prepared:
    """What every later step reads.

    Attributes:
        dataset: canonical tables.
        split: the times at which validation and test begin.
        events: the interactions, ordered by user, second and, inside a second, by seed; with ``step`` and ``position``.
        features: the definitions.
        tables: what the feature store reads, by the names that its sources use.
        reader: features as of a point in time.
    """

    dataset: Dataset
    split: TimeSplit
    events: pa.Table
    features: FeatureRepo
    tables: dict[str, pa.Table]
    reader: OfflineReader

    @cached_property
    def parts(self) -> dict[str, pa.Table]:
        """The events of ``train``, ``valid`` and ``test``, in their order."""
        return self.split.parts(self.events)

    def context(self, seed: int) -> dict[str, Any]:
        """What decides the course of a training besides its configuration: a checkpoint of another seed or data set is not continued."""
        return {"seed": seed, "data": self.dataset.fingerprint()}

    @property
    def end(self) -> datetime:
        """A moment after the last event."""
        last: datetime = pc.max(self.events.column(EVENT_TIME)).as_py()
        return last + timedelta(seconds=1)

    def impressions(self, part: str) -> pa.Table:
        """The events of a part as rows to be ranked: features are asked for one microsecond before the event's second."""
        events = self.parts[part]
        second = events.column(EVENT_TIME).cast(pa.int64()).to_numpy() // _SECOND * _SECOND
        request_time = pa.array(second - 1, pa.int64()).cast(TIME)
        values = [name for name in self.dataset.interactions.column_names if name not in _CANONICAL]
        columns = {USER: events.column(USER), ITEM: events.column(ITEM), REQUEST_TIME: request_time}
        return pa.table(columns | {name: events.column(name) for name in values})

    def events_of(self, user_id: str, until: datetime) -> pa.Table:
        """The interactions of one user up to a time, in the order in which the feature store counts them."""
        table = self.dataset.interactions
        mine = pc.and_(pc.equal(table.column(USER), user_id), pc.less_equal(table.column(EVENT_TIME), pa.scalar(until, TIME)))
        return table.filter(mine).sort_by([(EVENT_TIME, "ascending"), (INGEST_SEQ, "ascending")])

    def segments(self) -> dict[str, np.ndarray]:
        """Masks over the test events, in their order: all users, users with 5 earlier events, users first seen in the test period."""
        return evaluation_segments(self.events, self.split)


def feature_tables(features: FeatureRepo, dataset: Dataset) -> dict[str, pa.Table]:
    """What the feature store reads of a data set, by the names that sources use; `DataError` where a source names another table."""
    tables = {"interactions": dataset.interactions, "items": dataset.items}
    if dataset.users is not None:
        tables["users"] = dataset.users
    for source in features.sources:
        if source.table is not None and source.table not in tables:
            raise DataError(f"features: source {source.name!r} reads table {source.table!r}, but {dataset.name} has {', '.join(tables)}")
    return tables


def prepare(recipe: Recipe) -> Prepared:
    """Load the data set, split it by time, order its events, and open the feature store over it.

    Raises:
        DataError: a part of the split is empty, or a source of the features names a table that the data set lacks.
    """
    dataset = load_dataset(recipe.dataset)
    split = global_time_split(dataset.interactions.column(EVENT_TIME), recipe.split.valid, recipe.split.test)
    events = order_events(dataset.interactions, recipe.seed)
    tables = feature_tables(recipe.features, dataset)
    prepared = Prepared(dataset, split, events, recipe.features, tables, OfflineReader(recipe.features, tables))
    for part in PARTS:
        if not prepared.parts[part].num_rows:
            raise DataError(f"split: the {part} period has no events")
    return prepared
