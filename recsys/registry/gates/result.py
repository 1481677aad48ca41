# SPDX-License-Identifier: Apache-2.0
"""What a gate says, and how a figure is found and held against bounds."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from recsys.core.config import Config
from recsys.registry.evidence import Comparison, Evidence

SLICES = "by_slice"
"""The key of a bundle's metrics below which every slice of the events has its own: ``{slice: {"events": …, "list": {…}, …}}``."""
EVERYTHING = "all"
"""The slice of all events."""


class GateResult(Config):
    """What one gate found.

    Attributes:
        gate: which figure it looked at.
        passed: whether the gate holds. A figure that was not judged, such as that of a slice with few events, does not fail it.
        value: the figure; None where there is none, which fails.
        expected: the bound, in words.
        note: what else the reader should know.
    """

    gate: str
    passed: bool
    value: float | None
    expected: str
    note: str = ""


def lookup(metrics: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path (keys may themselves hold dots), or None."""
    if path in metrics:
        value = metrics[path]
        return float(value) if isinstance(value, int | float) else None
    for key, below in metrics.items():
        if path.startswith(f"{key}.") and isinstance(below, Mapping):
            found = lookup(below, path[len(key) + 1 :])
            if found is not None:
                return found
    return None


def number(value: Any) -> float | None:
    """A finite number, or None for anything else: no NaN is ever within bounds."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def bounds(low: float | None, high: float | None) -> str:
    """Bounds in words."""
    parts = [f">= {low:g}"] if low is not None else []
    parts += [f"<= {high:g}"] if high is not None else []
    return " and ".join(parts) or "a number"


def within(gate: str, value: Any, low: float | None, high: float | None, *, absent: str, note: str = "") -> GateResult:
    """Hold a figure against its bounds.

    Args:
        gate: the result's name.
        value: the figure, whatever was found; what is not a finite number fails.
        low: the smallest value that passes.
        high: the largest value that passes.
        absent: what to say where there is no figure.
        note: what to say where there is one.
    """
    found = number(value)
    if found is None:
        return GateResult(gate=gate, passed=False, value=None, expected=bounds(low, high), note=absent)
    passed = (low is None or found >= low) and (high is None or found <= high)
    return GateResult(gate=gate, passed=passed, value=found, expected=bounds(low, high), note=note)


def not_worse(gate: str, comparison: Comparison, metric: str, margin: float) -> GateResult:
    """Hold the lower end of a difference to the champion above ``-margin``."""
    expected, interval = f"lower end of the interval >= {-margin:g}", comparison.get(metric)
    ends = None if interval is None else [number(interval.get(end)) for end in ("estimate", "low", "high")]
    if ends is None or ends[1] is None:
        return GateResult(gate=gate, passed=False, value=None, expected=expected, note="was not compared with the champion")
    estimate, low, high = (math.nan if end is None else end for end in ends)
    note = f"difference {estimate:+.4f} [{low:+.4f}, {high:+.4f}]"
    return GateResult(gate=gate, passed=low >= -margin, value=low, expected=expected, note=note)


def chosen_slices(evidence: Evidence, patterns: tuple[str, ...]) -> dict[str, Mapping[str, Any] | None]:
    """The metrics of every slice that a pattern (``tail_item``, ``domain=*``) names; None below a pattern that names none."""
    slices = evidence.metrics.get(SLICES)
    known: Mapping[str, Any] = slices if isinstance(slices, Mapping) else {}
    chosen: dict[str, Mapping[str, Any] | None] = {}
    for pattern in patterns:
        found = [name for name in known if fnmatchcase(name, pattern)]
        chosen |= {name: known[name] for name in found} if found else {pattern: None}
    return chosen


def too_few(gate: str, figures: Mapping[str, Any], min_events: int, value: float | None, expected: str) -> GateResult | None:
    """What is said of a slice that is too small to be judged; None where it is large enough, or does not say how large it is."""
    events = number(figures.get("events"))
    if events is None or events >= min_events:
        return None
    note = f"not judged: {events:.0f} events, fewer than {min_events}"
    return GateResult(gate=gate, passed=True, value=value, expected=expected, note=note)
