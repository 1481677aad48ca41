# SPDX-License-Identifier: Apache-2.0
"""What is served: how long it takes on the machine of the promotion, and whether it is what was measured offline."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from recsys.core.config import Config
from recsys.registry.evidence import Evidence
from recsys.registry.gates.result import GateResult, lookup, number, within

LATENCY, PARITY = "latency", "parity"
"""The keys of what the promotion measured."""
DECISIONS, GOLDEN = "decisions", "golden"
"""What the measured parity is of: recorded decisions, or the requests that the bundle was recorded with."""

_STORES = "between the offline and the online store"
_UNBOUNDED = "no finite difference; an item may be on one side only"

Milliseconds = Annotated[FiniteFloat, Field(gt=0)]


class LatencyBudget(Config):
    """Recommendations, asked one at a time by the promotion itself, within a budget. What the candidate's metrics say does not count.

    Attributes:
        p50_ms: the largest median that passes, in milliseconds.
        p99_ms: the largest 99th percentile that passes, in milliseconds.
        requests: how many are asked.
        k: items of a list.
    """

    kind: Literal["latency"] = "latency"
    p50_ms: Milliseconds | None = None
    p99_ms: Milliseconds | None = None
    requests: Annotated[int, Field(ge=1)] = 100
    k: Annotated[int, Field(ge=1)] = 10

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.p50_ms is None and self.p99_ms is None:
            raise ValueError("expected p50_ms, p99_ms or both, got neither")
        return self

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """A result for each of the percentiles."""
        measured = _measured(evidence, LATENCY)
        note = f"{measured.get('requests')} requests of {measured.get('k')} items, on this machine"
        budgets = {"p50_ms": self.p50_ms, "p99_ms": self.p99_ms}
        absent = "was not measured by the promotion"
        return [
            within(f"latency.{name}", measured.get(name), None, budget, absent=absent, note=note)
            for name, budget in budgets.items()
            if budget is not None
        ]


class ParityBound(Config):
    """The served scores are the offline ones: the largest difference over the candidate's own recorded decisions, computed again.

    Where it has made none, it is that of the requests that the bundle was recorded with, or that which the evaluation measured between the
    offline and the online store, whichever is larger. The result says which it was.

    Attributes:
        at_most: the largest difference that passes.
        min_rows: at least so many scores must have been compared; more than the bundle's own requests hold insists on decisions.
    """

    kind: Literal["parity"] = "parity"
    at_most: Annotated[FiniteFloat, Field(ge=0)]
    min_rows: Annotated[int, Field(ge=1)] = 1

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """One result."""
        stores = lookup(evidence.metrics, "parity.max_difference")
        if PARITY not in evidence.measured:
            absent = "no decisions were replayed, and none was measured"
            return [within("parity", stores, None, self.at_most, absent=absent, note=_STORES)]
        measured = _measured(evidence, PARITY)
        rows, found, golden = measured.get("rows"), [measured.get("max_difference")], measured.get("source") == GOLDEN
        what = f"{rows} scores of {'requests that the bundle was recorded with' if golden else 'its recorded decisions'}"
        if not isinstance(rows, int) or rows < self.min_rows:
            return [within("parity", None, None, self.at_most, absent=f"expected at least {self.min_rows} compared scores, got {what}")]
        if golden and stores is not None:
            found, what = [*found, stores], f"{what}, and {_STORES}"
        figures = [figure for each in found if (figure := number(each)) is not None]
        worst = max(figures) if len(figures) == len(found) else None
        return [within("parity", worst, None, self.at_most, absent=f"{what}: {_UNBOUNDED}", note=what)]


def _measured(evidence: Evidence, key: str) -> Mapping[str, Any]:
    found = evidence.measured.get(key)
    return found if isinstance(found, Mapping) else {}
