# SPDX-License-Identifier: Apache-2.0
"""Counting what is done to rows, while it is done."""

from collections.abc import Iterable
from typing import Literal

import polars as pl

from recsys.data.dataset import TableCounts, TableName, Treatment

ROW = "__row"
_EXAMPLES = 3

Action = Literal["dropped", "nulled", "filled", "added"]


class Ledger:
    """The treatments of one table. Frames carry the source's row in the column `ROW`."""

    def __init__(self, table: TableName, file: str, read: int) -> None:
        self.table = table
        self.file = file
        self.read = read
        self.treatments: list[Treatment] = []

    def drop(self, frame: pl.DataFrame, bad: pl.Series, rule: str, shown: list[str]) -> pl.DataFrame:
        """The rows where ``bad`` does not hold; the others are counted, with examples of the columns ``shown``."""
        dropped = frame.filter(bad)
        self.note(rule, "dropped", dropped.height, (_describe(row) for row in dropped.head(_EXAMPLES).select(ROW, *shown).iter_rows(named=True)))
        return frame.filter(~bad)

    def note(self, rule: str, action: Action, count: int, examples: Iterable[str] = ()) -> None:
        """Record one rule."""
        self.treatments.append(Treatment(table=self.table, rule=rule, action=action, count=count, examples=tuple(examples)))

    def note_rows(self, rule: str, action: Action, rows: pl.Series) -> None:
        """Record one rule, with the ``rows`` that met it."""
        self.note(rule, action, len(rows), (f"row {row}" for row in rows.head(_EXAMPLES)))

    def close(self, kept: int) -> TableCounts:
        """The counts of the whole table."""
        return TableCounts(table=self.table, file=self.file, read=self.read, kept=kept)


def _describe(row: dict[str, object]) -> str:
    number = row.pop(ROW)
    return f"row {number}: " + ", ".join(f"{name}={value!s}" for name, value in row.items())
