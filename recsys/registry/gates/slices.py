# SPDX-License-Identifier: Apache-2.0
"""A figure of each slice of the events, so that a mean over all of them hides none."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from recsys.core.config import Config
from recsys.registry.evidence import Evidence, slice_metric
from recsys.registry.gates.result import GateResult, bounds, chosen_slices, lookup, not_worse, number, too_few, within


class SliceFloors(Config):
    """A metric of every named slice: above a floor, not worse than the champion's, or both.

    Attributes:
        metric: a path in the metrics of a slice, such as ``list.ndcg@10`` or ``ranker.auc``.
        slices: names of slices, or patterns such as ``domain=*``, which stand for all slices that they match.
        at_least: the floor.
        margin: how much worse than the champion is still accepted on each slice, in the metric's unit; None to compare no slice.
        min_events: a slice with fewer is told and not judged.
    """

    kind: Literal["slices"] = "slices"
    metric: str
    slices: Annotated[tuple[str, ...], Field(min_length=1)]
    at_least: FiniteFloat | None = None
    margin: FiniteFloat | None = None
    min_events: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.at_least is None and self.margin is None:
            raise ValueError("expected at_least, margin or both, got neither")
        return self

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """For each slice a result for each of ``at_least`` and ``margin``; the latter while there is a champion."""
        results = []
        for name, figures in chosen_slices(evidence, self.slices).items():
            if self.at_least is not None:
                results.append(self._floor(name, figures))
            if self.margin is not None and evidence.comparison is not None:
                results.append(self._difference(name, figures, evidence.comparison))
        return results

    def _floor(self, name: str, figures: Mapping[str, Any] | None) -> GateResult:
        gate = f"{self.metric}[{name}]"
        if figures is None:
            return within(gate, None, self.at_least, None, absent="no such slice among the metrics")
        value = lookup(figures, self.metric)
        few = too_few(gate, figures, self.min_events, number(value), bounds(self.at_least, None))
        note = "" if (events := number(figures.get("events"))) is None else f"{events:.0f} events"
        return few or within(gate, value, self.at_least, None, absent="not among the metrics of the slice", note=note)

    def _difference(self, name: str, figures: Mapping[str, Any] | None, comparison: Mapping[str, Mapping[str, float]]) -> GateResult:
        assert self.margin is not None
        gate = f"champion:{self.metric}[{name}]"
        result = not_worse(gate, comparison, slice_metric(name, self.metric), self.margin)
        return (too_few(gate, figures or {}, self.min_events, result.value, result.expected)) or result
