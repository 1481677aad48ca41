# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: checks with their bounds, ratios from alternating pairs, the machine, and the one JSON line."""

import json
import math
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import t as student

from recsys.bundle.environment import code_commit

LEVEL = 0.90
MIN_PAIRS = 5


@dataclass(frozen=True)
class Check:
    """A target, by the name that the issue gave it, and what was measured.

    Attributes:
        name: the target's name.
        value: the measured value; for a ratio the lower end (``at_least``) or upper end (``at_most``) of its interval.
        at_least: the bound from below, or None.
        at_most: the bound from above, or None.
        note: how the value came about.
    """

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the value is within its bounds."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def as_json(self) -> dict[str, Any]:
        """The check as it stands in the JSON line."""
        parts = {"name": self.name, "value": self.value, "at_least": self.at_least, "at_most": self.at_most}
        return {k: v for k, v in parts.items() if v is not None} | {"holds": self.holds} | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Ratio:
    """A ratio over alternating pairs: its geometric mean, and the two-sided 90% interval of that mean (Student's t on logarithms)."""

    estimate: float
    low: float
    high: float
    pairs: int

    def at_least(self, name: str, bound: float) -> Check:
        """The check that the ratio is at least ``bound``: it holds when the lower end of the interval does."""
        return Check(name, round(self.low, 3), at_least=bound, note=str(self))

    def at_most(self, name: str, bound: float) -> Check:
        """The check that the ratio is at most ``bound``: it holds when the upper end of the interval does."""
        return Check(name, round(self.high, 3), at_most=bound, note=str(self))

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.pairs} pairs"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio ours / theirs of values measured side by side, pair by pair.

    Raises:
        ValueError: fewer than 5 pairs, unequal lengths, or a value that is not positive.
    """
    if len(ours) != len(theirs) or len(ours) < MIN_PAIRS:
        raise ValueError(f"a ratio needs at least {MIN_PAIRS} pairs of equal number, got {len(ours)} and {len(theirs)}")
    if min(*ours, *theirs) <= 0:
        raise ValueError("a ratio needs positive values")
    mean, low, high = mean_interval([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    return Ratio(math.exp(mean), math.exp(low), math.exp(high), len(ours))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of at least two values, and the lower and the upper end of its interval at `LEVEL` (Student's t)."""
    mean, n = statistics.fmean(values), len(values)
    half = float(student.ppf(0.5 + LEVEL / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


@dataclass
class Result:
    """What a benchmark found.

    Attributes:
        benchmark: its name.
        rows: the table that a person reads: equal keys in each row.
        checks: the targets.
        details: further measurements for whoever reads the JSON.
    """

    benchmark: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def json_line(self) -> str:
        """The last line that a benchmark prints."""
        content = {
            "benchmark": self.benchmark,
            "checks": [check.as_json() for check in self.checks],
            "rows": self.rows,
            "details": self.details,
            "machine": machine(),
            "commit": code_commit(),
        }
        return json.dumps(content)


def machine() -> dict[str, Any]:
    """The machine and how busy it is."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch while it is entered."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
