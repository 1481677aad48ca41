# SPDX-License-Identifier: Apache-2.0
"""From what was measured to the table and the checks."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.frame import Check, Ratio, Result, ratio
from benchmarks.serving.clients import GIVE_UP_SECONDS
from benchmarks.serving.figures import Step, knee
from benchmarks.serving.prepared import CANDIDATES
from benchmarks.serving.servers import SAME, WHOLE
from benchmarks.serving.swaps import Swaps

BOUNDS = {SAME: ("same_ranker_over_best_peer", 1.0), WHOLE: ("goodput_over_best_peer", 2.0)}
OFFLINE, OVERLOAD, P99, SWAP_P99, SWAP_MEMORY, CEILING = 0.7, 0.9, 1.0, 1.2, 1.05, 3.0
LEAST_GOODPUT = 0.1  # a second: a ratio needs positive values, and no goodput at all is worse than this


@dataclass
class Sweep:
    """One server in one row.

    Attributes:
        row: of the contest.
        name: of the server.
        told: whether requests told it their deadline.
        capacity: answers a second of a closed loop.
        steps: by deadline in milliseconds, one for each rate; of a server that is not told, one sweep is read for all.
    """

    row: str
    name: str
    told: bool
    capacity: float
    steps: dict[int, list[Step]]

    def of(self, deadline: int) -> list[Step]:
        """The steps that a deadline is read from."""
        return self.steps[deadline] if self.told else next(iter(self.steps.values()))

    def peak(self, deadline: int) -> float:
        """The highest goodput."""
        steps = self.of(deadline)
        return steps[knee(steps, deadline)].goodput(deadline)


@dataclass
class Knees:
    """Ours and the best peer in turns, each at the rate of its own highest goodput.

    Attributes:
        row: of the contest.
        best: by deadline, the name of the peer.
        ours, peer: by deadline, goodput pair by pair.
    """

    row: str
    best: dict[int, str]
    ours: dict[int, list[float]]
    peer: dict[int, list[float]]

    def ratio(self, deadline: int) -> Ratio:
        """Ours over the peer's."""
        return ratio(*([max(one, LEAST_GOODPUT) for one in found[deadline]] for found in (self.ours, self.peer)))


@dataclass(frozen=True)
class Base:
    """What else there is to say.

    Attributes:
        parameters: of the ranker.
        ceiling: requests a second that the generator can send.
        offline: rows a second without a server by requests of a batch, of ``path`` and of ``ranker``.
        seconds: the whole took.
    """

    parameters: int
    ceiling: float
    offline: dict[str, dict[str, float]]
    seconds: float


@dataclass
class Measured:
    """Everything.

    Attributes:
        base: see `Base`.
        sweeps: of ours and of all peers, in both rows.
        knees: of both rows.
        swaps: under load.
        rates: over capacity, of the steps of each sweep.
        deadlines: milliseconds.
    """

    base: Base
    sweeps: list[Sweep]
    knees: list[Knees]
    swaps: Swaps
    rates: Sequence[float]
    deadlines: Sequence[int]

    def ours(self, row: str) -> Sweep:
        """Our sweep of a row."""
        return next(sweep for sweep in self.sweeps if (sweep.name, sweep.row) == ("ours", row))


def result(measured: Measured) -> Result:
    """The table, the checks, and all figures."""
    checks = [
        *(_over_best(knees) for knees in measured.knees),
        _of_offline(measured),
        *_overload(measured),
        *_swaps(measured.swaps),
        _ceiling(measured),
    ]
    rows = [row for sweep in measured.sweeps for row in _rows(sweep, measured.rates, measured.deadlines)]
    return Result("serving", rows, checks, _details(measured))


def _over_best(knees: Knees) -> Check:
    """The ratio of the deadline where it is the smaller."""
    name, bound = BOUNDS[knees.row]
    ratios = {deadline: knees.ratio(deadline) for deadline in knees.best}
    notes = [f"{deadline} ms, {knees.best[deadline]}: {found}" for deadline, found in ratios.items()]
    return Check(name, round(min(found.low for found in ratios.values()), 3), at_least=bound, note="; ".join(notes))


def _of_offline(measured: Measured) -> Check:
    """Of answers a second at the peak, in rows, over the same work in its best batches."""
    sweep, offline = measured.ours(WHOLE), measured.base.offline
    peak = max(sweep.peak(deadline) for deadline in measured.deadlines) * CANDIDATES
    best = {what: max(offline.items(), key=lambda found: found[1][what]) for what in ("path", "ranker")}
    (size, path), (_, ranker) = best["path"], best["ranker"]
    beside = f"of the same path offline in batches of {size}; the ranker alone {ranker['ranker']:,.0f}"
    note = f"{peak:,.0f} rows/s over {path['path']:,.0f} {beside}"
    return Check("of_offline_batch_rate", round(peak / path["path"], 3), at_least=OFFLINE, note=note)


def _overload(measured: Measured) -> list[Check]:
    """At the highest rate, of the deadline where it is worse."""
    sweep = measured.ours(WHOLE)
    goodput, late, lesser = {}, {}, {}
    for deadline in measured.deadlines:
        last, peak = sweep.of(deadline)[-1], sweep.peak(deadline)
        goodput[deadline] = last.goodput(deadline) / peak if peak else 0.0
        lesser[deadline] = last.goodput(deadline, lesser=True) / peak if peak else 0.0
        late[deadline] = min(last.percentile(99), 1000 * GIVE_UP_SECONDS) / deadline  # where none is answered, they gave up
    at = f"at {measured.rates[-1]:g} times the capacity; "
    notes = [f"{d} ms: {goodput[d]:.2f}, with lists without the ranker {lesser[d]:.2f}" for d in measured.deadlines]
    return [
        Check("overload_goodput", round(min(goodput.values()), 3), at_least=OVERLOAD, note=at + "; ".join(notes)),
        Check(
            "overload_p99_over_deadline",
            round(max(late.values()), 3),
            at_most=P99,
            note=at + "; ".join(f"{deadline} ms: {late[deadline]:.2f}" for deadline in measured.deadlines),
        ),
    ]


def _swaps(found: Swaps) -> list[Check]:
    lesser = statistics.fmean(found.lesser) if found.lesser else 0.0
    each = f"{found.swaps} swaps, {statistics.median(found.seconds):.1f} s each"
    note = f"{each}, {len(found.status):,} requests, {lesser:.1%} answered without the ranker"
    return [
        Check("swap_failures", found.failures, at_most=0, note=note),
        Check("swap_p99_over_steady", round(found.p99_over_steady, 3), at_most=SWAP_P99),
        Check("swap_memory_growth", round(found.growth, 3), at_most=SWAP_MEMORY, note=f"{found.resident[-1] / 2**20:,.0f} MiB at the end"),
    ]


def _ceiling(measured: Measured) -> Check:
    highest = max(step.offered for sweep in measured.sweeps for steps in sweep.steps.values() for step in steps)
    note = f"{measured.base.ceiling:,.0f} requests/s against an empty handler; the highest offered rate is {highest:,.0f}"
    return Check("generator_ceiling", round(measured.base.ceiling / highest, 2), at_least=CEILING, note=note)


def _rows(sweep: Sweep, rates: Sequence[float], deadlines: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each rate; of a server that is told its deadline, for each deadline as well."""
    return [
        {
            "row": sweep.row,
            "server": f"{sweep.name}, {told} ms" if sweep.told else sweep.name,
            "× capacity": f"{rate:g}",
            "offered/s": f"{step.offered:.1f}",
            **{f"good/s, {d} ms": f"{step.goodput(d):.1f}" if not sweep.told or d == told else "" for d in deadlines},
            "p50, ms": f"{step.percentile(50):.1f}",
            "p99": f"{step.percentile(99):.1f}",
            "rejected": f"{step.rejected:.0%}",
            "no answer": f"{step.unanswered:.0%}",
            "lesser": f"{step.lessened:.0%}",
        }
        for told, steps in sweep.steps.items()
        for rate, step in zip(rates, steps, strict=True)
    ]


def _details(measured: Measured) -> dict[str, Any]:
    swaps = measured.swaps
    return {
        "base": vars(measured.base),
        "capacity": {f"{sweep.name}, {sweep.row}": sweep.capacity for sweep in measured.sweeps},
        "lag_p99_ms": max(1000 * step.lag for sweep in measured.sweeps for steps in sweep.steps.values() for step in steps),
        "knees": [vars(knees) for knees in measured.knees],
        "swaps": {"seconds": swaps.seconds, "resident": swaps.resident},
    }
