# SPDX-License-Identifier: Apache-2.0
"""Gates: the conditions that a bundle must hold before it goes live. They are run by the promotion, not by whoever asks for it."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from recsys.core.config import Config


class Bound(Config):
    """A number of the candidate's metrics, by its dotted path, within bounds.

    Attributes:
        metric: a path in the metrics, such as ``ranking.tokenmixer_large.auc`` or ``intervals.ranker_above_logistic.low``.
        at_least: the smallest value that passes.
        at_most: the largest value that passes.
    """

    kind: Literal["bound"] = "bound"
    metric: str
    at_least: float | None = None
    at_most: float | None = None


class AgainstChampion(Config):
    """The candidate is not worse than the champion: the lower end of a paired interval over users is at least ``-margin``.

    Attributes:
        metric: a name in the comparison that the pipeline measured on the same test events, such as ``list.ndcg@10``.
        margin: how much worse than the champion is still accepted, in the metric's unit.
    """

    kind: Literal["against_champion"] = "against_champion"
    metric: str
    margin: float = 0.0


class GateResult(Config):
    """What one gate found."""

    gate: str
    passed: bool
    value: float | None
    expected: str
    note: str = ""


Gate = Annotated[Bound | AgainstChampion, Field(discriminator="kind")]


def run_gates(
    gates: tuple[Gate, ...], metrics: Mapping[str, Any], comparison: Mapping[str, Mapping[str, float]] | None
) -> list[GateResult]:
    """Run every gate.

    Args:
        gates: what must hold.
        metrics: the candidate's metrics, nested.
        comparison: ``{metric: {"estimate", "low", "high"}}``, candidate minus champion; None while there is no champion, and then only the
            bounds are run.
    """
    results = []
    for gate in gates:
        if isinstance(gate, Bound):
            results.append(_bound(gate, metrics))
        elif comparison is not None:
            results.append(_against(gate, comparison))
    return results


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


def _bound(gate: Bound, metrics: Mapping[str, Any]) -> GateResult:
    parts = [f">= {gate.at_least:g}"] if gate.at_least is not None else []
    parts += [f"<= {gate.at_most:g}"] if gate.at_most is not None else []
    expected = " and ".join(parts) or "a number"
    value = lookup(metrics, gate.metric)
    if value is None or not math.isfinite(value):
        return GateResult(gate=gate.metric, passed=False, value=None, expected=expected, note="not among the metrics")
    low = gate.at_least is None or value >= gate.at_least
    high = gate.at_most is None or value <= gate.at_most
    return GateResult(gate=gate.metric, passed=low and high, value=value, expected=expected)


def _against(gate: AgainstChampion, comparison: Mapping[str, Mapping[str, float]]) -> GateResult:
    name, expected = f"champion:{gate.metric}", f"lower end of the interval >= {-gate.margin:g}"
    interval = comparison.get(gate.metric)
    if interval is None:
        return GateResult(gate=name, passed=False, value=None, expected=expected, note="was not compared with the champion")
    note = f"difference {interval['estimate']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"
    return GateResult(gate=name, passed=interval["low"] >= -gate.margin, value=interval["low"], expected=expected, note=note)
