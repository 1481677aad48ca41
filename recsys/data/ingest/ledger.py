# SPDX-License-Identifier: Apache-2.0
"""Counting what is done to rows, while it is done."""

from collections.abc import Iterable, Sequence

import polars as pl

from recsys.core.schema import EVENT_TIME, INGEST_SEQ, ITEM, USER
from recsys.data.dataset import Action, TableCounts, TableName, Treatment

# The column that carries a row's place in its source, counted from 0, through all steps.
ROW = INGEST_SEQ
NON_FINITE = "non_finite"
_EXAMPLES, _SHOWN, _NUMBER = 3, (ROW, USER, ITEM, EVENT_TIME), "row "


class Ledger:
    """The treatments of one table, in the order in which they are applied."""

    def __init__(self, table: TableName, file: str, read: int) -> None:
        self.table: TableName = table
        self.file = file
        self.read = read
        self.treatments: list[Treatment] = []

    def drop(self, frame: pl.DataFrame, bad: pl.Series, rule: str) -> pl.DataFrame:
        """The rows where ``bad`` does not hold; the others are counted."""
        self.note(rule, "dropped", frame.filter(bad))
        return frame.filter(~bad)

    def note(self, rule: str, action: Action, rows: pl.DataFrame, column: str | None = None) -> None:
        """Record that ``rule`` was applied to ``rows``."""
        shown = rows.head(_EXAMPLES).select(name for name in _SHOWN if name in rows.columns)
        examples = tuple(_describe(row) for row in shown.iter_rows(named=True))
        self.treatments.append(Treatment(table=self.table, rule=rule, column=column, action=action, count=rows.height, examples=examples))

    def counts(self, kept: int) -> TableCounts:
        """The counts of the whole table."""
        return TableCounts(table=self.table, file=self.file, read=self.read, kept=kept)


def summary(treatments: Iterable[Treatment]) -> str:
    """The rules that were met, with their counts."""
    return ", ".join(f"{treatment.rule} {treatment.count}" for treatment in treatments if treatment.count)


def sum_treatments(treatments: Iterable[Treatment], columns: Sequence[str] = (), *, one_source: bool = True) -> tuple[Treatment, ...]:
    """The treatments of all pieces of a table as those of the whole: counts are added, and the examples are the first.

    Args:
        treatments: piece by piece, each with all rules in their order, but for numbers that were not finite.
        columns: in the order in which such numbers are looked for.
        one_source: whether the rows of all pieces are counted in one order, which decides what is first; else the order of the pieces does.
    """
    found: dict[tuple[str, str, str | None], list[Treatment]] = {}
    for treatment in treatments:
        found.setdefault((treatment.table, treatment.rule, treatment.column), []).append(treatment)
    first = [key for name in columns for key in found if key[1:] == (NON_FINITE, name)]
    ordered = [found[key] for key in (*first, *(key for key in found if key not in first))]
    return tuple(_sum(same, one_source=one_source) for same in ordered)


def _sum(same: Sequence[Treatment], *, one_source: bool) -> Treatment:
    examples = [example for each in same for example in each.examples]
    first = sorted(examples, key=_row) if one_source else examples
    return same[0].model_copy(update={"count": sum(each.count for each in same), "examples": tuple(first[:_EXAMPLES])})


def _row(example: str) -> int:
    """The number of the row that `_describe` described."""
    return int(example.removeprefix(_NUMBER).partition(":")[0])


def _describe(row: dict[str, object]) -> str:
    number = row.pop(ROW, None)
    values = ", ".join(f"{name}={'null' if value is None else value}" for name, value in row.items())
    return ": ".join(part for part in ("" if number is None else f"{_NUMBER}{number}", values) if part)
