# SPDX-License-Identifier: Apache-2.0
"""From what was measured to the table and the checks."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.frame import Check, Ratio, Result, ratio

OVER_BEST, GROWTH = 5.0, 1.1
SHUFFLED = ("rechub in_memory", "fuxictr padded")
"""The peers' ways of encoded rows that shuffle."""


@dataclass
class Speeds:
    """Rows a second of one comparison.

    Attributes:
        what: is compared.
        name: of our way.
        ours: round by round, the mean of the first and the last of it.
        rivals: by way, beside ``ours``: the peers', and other ways of ours.
    """

    what: str
    name: str
    ours: list[float] = field(default_factory=list)
    rivals: dict[str, list[float]] = field(default_factory=dict)

    def over(self, rival: str) -> Ratio:
        """Ours over a rival's."""
        return ratio(self.ours, self.rivals[rival])

    def best(self, among: tuple[str, ...] | None = None) -> str:
        """The fastest peer, or the fastest of some."""
        peers = [name for name in self.rivals if not name.startswith("ours") and (among is None or name in among)]
        return max(peers, key=lambda name: statistics.median(self.rivals[name]))


@dataclass(frozen=True)
class Memory:
    """What an epoch takes.

    Attributes:
        name: of the way.
        taken: bytes at each size, the smaller first.
    """

    name: str
    taken: list[int]

    @property
    def growth(self) -> float:
        """The larger size's over the smaller's."""
        return self.taken[1] / self.taken[0]


def result(speeds: list[Speeds], memory: list[Memory], sizes: tuple[int, int]) -> Result:
    """The table and the checks.

    Args:
        speeds: of the comparisons ``encoded`` and ``raw``, and of others, which are only shown.
        memory: of all ways that it was measured of.
        sizes: the rows of the two.
    """
    by_name = {one.what: one for one in speeds}
    encoded, raw = by_name["encoded"], by_name["raw"]
    checks = [
        _over(encoded, encoded.best(), "loader_over_best"),
        _over(encoded, encoded.best(SHUFFLED), "loader_over_best_shuffled"),
        _over(raw, raw.best(), "loader_over_best_raw"),
    ]
    worst = max((one for one in memory if one.name.startswith("ours")), key=lambda one: one.growth)
    note = f"{worst.name}: {_mib(worst.taken[1])} MiB at {sizes[1]:,} rows over {_mib(worst.taken[0])} at {sizes[0]:,}"
    checks.append(Check("loader_memory_growth", round(worst.growth, 3), at_most=GROWTH, note=note))
    rows = [row for one in speeds for row in _speed_rows(one, memory, sizes)]
    return Result("loader", rows, checks, {"speeds": [vars(one) for one in speeds], "memory": [vars(one) for one in memory]})


def _over(speeds: Speeds, rival: str, name: str) -> Check:
    found = speeds.over(rival)
    return Check(name, round(found.low, 3), at_least=OVER_BEST, note=f"{rival}: {found}")


def _speed_rows(speeds: Speeds, memory: list[Memory], sizes: tuple[int, int]) -> list[dict[str, Any]]:
    taken = {one.name: one.taken for one in memory}

    def row(name: str, rates: list[float], over: str) -> dict[str, Any]:
        bytes_of = {} if "cores" in speeds.what else {rows: _mib(b) for rows, b in zip(sizes, taken.get(name, []), strict=False)}
        figures = {"rows/s, median": f"{statistics.median(rates):,.0f}", "ours over it": over}
        return {"what": speeds.what, "way": name, **figures, **{f"MiB, {rows:,} rows": bytes_of.get(rows, "") for rows in sizes}}

    return [
        row(speeds.name, speeds.ours, ""),
        *(row(name, rates, str(speeds.over(name))) for name, rates in speeds.rivals.items()),
    ]


def _mib(taken: int) -> str:
    return f"{taken / 2**20:,.0f}"
