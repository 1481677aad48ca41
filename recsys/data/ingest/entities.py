# SPDX-License-Identifier: Apache-2.0
"""Items and users in canonical form, which every way of ingest holds in memory, and the data set that events make with them."""

from collections.abc import Iterable
from datetime import datetime

import polars as pl
import pyarrow as pa

from recsys.core.errors import DataError
from recsys.data.dataset import Dataset, IngestReport, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.frames import to_arrow
from recsys.data.ingest import rules
from recsys.data.ingest.ledger import Ledger
from recsys.data.ingest.source import RawTable


class Entities:
    """The items and users of a data set.

    Args:
        name: of the data set.
        schema: the roles of the source columns.
        items: the source of items.
        users: the source of users' attributes: needed if, and only if, the schema has ``users``.

    Attributes:
        items: the canonical columns.

    Raises:
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
        DataError: two rows of one id differ, or there is a source of users and the schema has none, or the other way round.
    """

    def __init__(self, name: str, schema: DatasetSchema, items: RawTable, users: RawTable | None) -> None:
        if (users is None) != (schema.users is None):
            has, lacks = ("the schema", "no source is given") if users is None else (users.file, "the schema does not")
            raise DataError(f"{name}: users: {has} has them, but {lacks}: expected both or neither")
        self._name, self._schema = name, schema
        self._item_ledger = Ledger("items", items.file, items.frame.height)
        self.items = rules.read_entities(items, schema.items, self._item_ledger)
        self._users: tuple[pl.DataFrame, Ledger] | None = None
        if users is not None and schema.users is not None:
            ledger = Ledger("users", users.file, users.frame.height)
            self._users = rules.read_entities(users, schema.users, ledger), ledger

    def settle(self, events: pl.DataFrame, ledger: Ledger) -> pl.DataFrame:
        """The events whose items are known, once the schema's rule for the others was applied: it may add to the items.

        Raises:
            DataError: there is an unknown item, and the rule says that this is an error.
        """
        events, self.items = rules.settle_unknown_items(events, self.items, self._schema.on_unknown_item, ledger, self._item_ledger)
        return events

    def dataset(self, events: pa.Table, counts: TableCounts, treatments: Iterable[Treatment], span: tuple[datetime, datetime]) -> Dataset:
        """The data set.

        Args:
            events: canonical interactions.
            counts: of the events' source.
            treatments: of the events.
            span: the times of the first event and of the last.
        """
        done = [(self.items, self._item_ledger), *([] if self._users is None else [self._users])]
        report = IngestReport(
            tables=(counts, *(ledger.counts(frame.height) for frame, ledger in done)),
            treatments=(*treatments, *(treatment for _, ledger in done for treatment in ledger.treatments)),
            first_event=span[0],
            last_event=span[1],
        )
        schema = self._schema
        users = None if self._users is None or schema.users is None else to_arrow(self._users[0], schema.users.features)
        return Dataset(self._name, events, to_arrow(self.items, schema.items.features), users, schema, report)
