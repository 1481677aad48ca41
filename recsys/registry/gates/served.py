# SPDX-License-Identifier: Apache-2.0
"""What is served: how long it takes on the machine of the promotion, and whether it is what was measured offline."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from recsys.core.config import Config
from recsys.registry.evidence import Evidence
from recsys.registry.gates.result import GateResult, lookup, within

LATENCY, PARITY = "latency", "parity"
"""The keys of what the promotion measured."""

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
    """The served scores are the offline ones: the largest difference over recorded decisions that were replayed.

    Where there are no recorded decisions, it is the difference that the evaluation measured between the offline and the online store.

    Attributes:
        at_most: the largest difference that passes.
        min_rows: recorded decisions must have at least so many scores to compare.
    """

    kind: Literal["parity"] = "parity"
    at_most: Annotated[FiniteFloat, Field(ge=0)]
    min_rows: Annotated[int, Field(ge=1)] = 1

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """One result."""
        if PARITY not in evidence.measured:
            value, note = lookup(evidence.metrics, "parity.max_difference"), "between the offline and the online store"
            return [within("parity", value, None, self.at_most, absent="no decisions were replayed, and none was measured", note=note)]
        replayed = _measured(evidence, PARITY)
        rows = replayed.get("rows")
        if not isinstance(rows, int) or rows < self.min_rows:
            absent = f"expected at least {self.min_rows} replayed scores, got {rows}"
            return [within("parity", None, None, self.at_most, absent=absent)]
        note = f"{rows} replayed scores"
        return [within("parity", replayed.get("max_difference"), None, self.at_most, absent="the replay has no difference", note=note)]


def _measured(evidence: Evidence, key: str) -> Mapping[str, Any]:
    found = evidence.measured.get(key)
    return found if isinstance(found, Mapping) else {}
