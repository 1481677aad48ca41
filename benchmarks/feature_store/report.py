# SPDX-License-Identifier: Apache-2.0
"""From what was measured to the table and the checks."""

import statistics
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.feature_store.data import Sizes
from benchmarks.frame import Check, Ratio, Result, ratio

OVER_FEAST, OVER_BARE, MEMORY, ONLINE = 12.0, 1.3, 0.5, 0.25
LEAST_BYTES = 1 << 20
"""What a join takes is not told apart from nothing below this."""


@dataclass
class Joins:
    """The joins of one size.

    Attributes:
        sizes: of the tables.
        rows: how many were asked for, and came back from ours and from each of Feast's offline stores.
        ours: seconds, pair by pair.
        feast: by offline store, seconds beside ``ours``.
        ours_beside_bare, bare: seconds, pair by pair.
        ours_bytes: the highest memory above the data, pair by pair.
        feast_bytes: by offline store, beside ``ours_bytes``.
    """

    sizes: Sizes
    rows: dict[str, int]
    ours: list[float] = field(default_factory=list)
    feast: dict[str, list[float]] = field(default_factory=dict)
    ours_beside_bare: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    ours_bytes: list[int] = field(default_factory=list)
    feast_bytes: dict[str, list[int]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Feast's fastest offline store."""
        return min(self.feast, key=lambda kind: statistics.median(self.feast[kind]))

    def over_feast(self, kind: str) -> Ratio:
        """Seconds of one of Feast's offline stores over ours."""
        return ratio(self.feast[kind], self.ours)

    def memory(self, kind: str) -> Ratio:
        """Ours over that of one of Feast's offline stores."""
        return ratio(*([float(max(one, LEAST_BYTES)) for one in found] for found in (self.ours_bytes, self.feast_bytes[kind])))


@dataclass
class Online:
    """The requests to one kind of online store.

    Attributes:
        store: ``sqlite`` or ``redis``.
        trips: of one request on ours: ``trips`` for values, ``sent`` messages to a server, ``entity_types``.
        way: how Feast is asked.
        ways: the milliseconds of a request in each way, once.
        ours, feast: milliseconds of the requests of each block, block by block.
    """

    store: str
    trips: dict[str, int]
    way: str
    ways: dict[str, float]
    ours: list[list[float]] = field(default_factory=list)
    feast: list[list[float]] = field(default_factory=list)

    def percentile(self, percent: int) -> Ratio:
        """Ours over Feast's, block by block."""
        return ratio(*([float(np.percentile(block, percent)) for block in blocks] for blocks in (self.ours, self.feast)))


def result(joins: list[Joins], online: list[Online]) -> Result:
    """The table and the checks; those of the join are of the last size."""
    last = joins[-1]
    lost = last.rows["asked"] - last.rows["ours"]
    feast_lost = {kind: last.rows["asked"] - last.rows[kind] for kind in last.feast}
    checks = [
        last.over_feast(last.kind).at_least("join_over_feast", OVER_FEAST),
        ratio(last.ours_beside_bare, last.bare).at_most("join_over_bare_polars", OVER_BARE),
        Check("rows_lost", lost, at_most=0, note=f"of {last.rows['asked']:,}; Feast's stores lose {feast_lost}"),
        last.memory(last.kind).at_most("join_memory", MEMORY),
    ]
    # The bounds are for Feast's fastest store; what is measured beside each of them stands in the notes.
    checks = [_noted(check, last) for check in checks]
    for one in online:
        checks += [one.percentile(percent).at_most(f"{one.store}_p{percent}", ONLINE) for percent in (50, 99)]
    rows = [row for one in joins for row in _join_rows(one)] + [row for one in online for row in _online_rows(one)]
    return Result(
        "feature_store", rows, checks, {"joins": [vars(one) | {"sizes": str(one.sizes)} for one in joins], "online": _details(online)}
    )


def _noted(check: Check, joins: Joins) -> Check:
    of_kind = {"join_over_feast": joins.over_feast, "join_memory": joins.memory}.get(check.name)
    if of_kind is None:
        return check
    return replace(check, note="; ".join(f"{kind}: {of_kind(kind)}" for kind in sorted(joins.feast, key=lambda kind: kind != joins.kind)))


def _details(online: list[Online]) -> list[dict[str, Any]]:
    return [vars(one) for one in online]


def _join_rows(joins: Joins) -> list[dict[str, Any]]:
    def row(side: str, seconds: list[float], rows: int | str, taken: list[int]) -> dict[str, Any]:
        memory = f"{statistics.median(taken) / 2**20:,.0f}" if taken else ""
        return _row(f"join {joins.sizes}", side, f"{statistics.median(seconds) * 1e3:,.0f}", "", rows, memory)

    return [
        row("ours", joins.ours, joins.rows["ours"], joins.ours_bytes),
        *(row(f"Feast, {kind}", seconds, joins.rows[kind], joins.feast_bytes[kind]) for kind, seconds in joins.feast.items()),
        row("bare Polars", joins.bare, "", []),
    ]


def _online_rows(online: Online) -> list[dict[str, Any]]:
    def row(side: str, blocks: list[list[float]], trips: int | str) -> dict[str, Any]:
        p50, p99 = (f"{statistics.median(float(np.percentile(block, p)) for block in blocks):,.2f}" for p in (50, 99))
        return _row(f"online, {online.store}", side, p50, p99, "", "", trips)

    trips = f"{online.trips['trips']} for {online.trips['entity_types']} entity types"
    return [row("ours", online.ours, trips), row(f"Feast, {online.way}", online.feast, "")]


def _row(what: str, side: str, p50: str, p99: str, rows: int | str, memory: str, trips: int | str = "") -> dict[str, Any]:
    return {"what": what, "side": side, "ms, p50": p50, "p99": p99, "rows out": rows, "MiB above the data": memory, "round trips": trips}
