# SPDX-License-Identifier: Apache-2.0
"""Whether the ranker's probabilities mean what they say, over all events and on every slice."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from recsys.core.config import Config
from recsys.registry.evidence import Evidence
from recsys.registry.gates.result import EVERYTHING, GateResult, bounds, chosen_slices, lookup, number, too_few, within

RANKER = "ranker"
"""The name under which metrics hold the recipe's ranker, whatever its model is called."""

Band = tuple[FiniteFloat, FiniteFloat]


class CalibrationBand(Config):
    """Predicted over observed positives within a band, and the expected calibration error below a bound.

    Attributes:
        band: of the ratio over all events; 1 is right, above 1 promises too much.
        slice_band: of the ratio on each slice; ``band`` by default.
        slices: names of slices, or patterns; every slice by default.
        min_events: a slice with fewer is told and not judged. All events together are always judged.
        ece: the largest calibration error over all events that passes; None not to look at it.
    """

    kind: Literal["calibration"] = "calibration"
    band: Band = (0.9, 1.1)
    slice_band: Band | None = None
    slices: tuple[str, ...] = ("*",)
    min_events: Annotated[int, Field(ge=1)] = 500
    ece: Annotated[FiniteFloat, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _low_before_high(self) -> Self:
        for name, band in (("band", self.band), ("slice_band", self.slice_band)):
            if band is not None and not band[0] < band[1]:
                raise ValueError(f"{name}: expected the lower end first, got {list(band)}")
        return self

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """A result over all events, one for the calibration error where it is bounded, and one for each slice."""
        ratio, absent = lookup(evidence.metrics, f"ranking.{RANKER}.calibration"), "not among the metrics"
        results = [within("calibration", ratio, *self.band, absent=absent)]
        if self.ece is not None:
            results.append(within("calibration.ece", lookup(evidence.metrics, f"ranking.{RANKER}.ece"), None, self.ece, absent=absent))
        slices = {name: figures for name, figures in chosen_slices(evidence, self.slices).items() if name != EVERYTHING}
        return results + [self._slice(name, figures) for name, figures in slices.items()]

    def _slice(self, name: str, figures: Mapping[str, Any] | None) -> GateResult:
        gate, band = f"calibration[{name}]", self.slice_band or self.band
        if figures is None:
            return within(gate, None, *band, absent="no such slice among the metrics")
        value = lookup(figures, f"{RANKER}.calibration")
        few = too_few(gate, figures, self.min_events, number(value), bounds(*band))
        return few or within(gate, value, *band, absent="not among the metrics of the slice")
