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

    def summary(self) -> str:
        """The rules that were met, with their counts."""
        return ", ".join(f"{t.rule} {t.count}" for t in self.treatments if t.count)


def sum_treatments(treatments: Iterable[Treatment], columns: Sequence[str] = ()) -> tuple[Treatment, ...]:
    """The treatments of all pieces of a table as those of the whole: counts are added, and the examples are the first of the source.

    Args:
        treatments: piece by piece, each with all rules in their order, but for numbers that were not finite.
        columns: in the order in which such numbers are looked for.
    """
    found: dict[tuple[str, str, str | None], list[Treatment]] = {}
    for treatment in treatments:
        found.setdefault((treatment.table, treatment.rule, treatment.column), []).append(treatment)
    first = [key for name in columns for key in found if key[1:] == (NON_FINITE, name)]
    ordered = [found[key] for key in (*first, *(key for key in found if key not in first))]
    return tuple(
        same[0].model_copy(
            update={"count": sum(each.count for each in same), "examples": _first(e for each in same for e in each.examples)}
        )
        for same in ordered
    )


def _first(examples: Iterable[str]) -> tuple[str, ...]:
    """Of what `_describe` gave of rows with numbers, the first ones."""
    return tuple(sorted(examples, key=lambda text: int(text.removeprefix(_NUMBER).partition(":")[0]))[:_EXAMPLES])


def _describe(row: dict[str, object]) -> str:
    number = row.pop(ROW, None)
    values = ", ".join(f"{name}={'null' if value is None else value}" for name, value in row.items())
    return ": ".join(part for part in ("" if number is None else f"{_NUMBER}{number}", values) if part)
