# SPDX-License-Identifier: Apache-2.0
"""When a canary gets more users, and when it is taken back. Pure functions of figures."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from recsys.core.config import Config
from serving.lanes.figures import Figures


@dataclass(frozen=True)
class Verdict:
    """What becomes of a canary.

    Attributes:
        move: ``hold``, ``advance`` to more users, ``promote`` where all steps are taken, or ``withdraw``.
        percent: of the users, after ``advance``.
        problems: the guardrails that do not hold.
        figures: what was looked at.
    """

    move: Literal["hold", "advance", "promote", "withdraw"]
    percent: float | None
    problems: tuple[str, ...]
    figures: dict[str, Any]


class CanaryPolicy(Config):
    """Steps and guardrails.

    Attributes:
        steps: percents of the users, ascending, below 100; after the last one the canary may be promoted.
        least_minutes: of each step.
        least_requests: that the canary has ended in each step.
        judged_requests: of both bundles before a guardrail is looked at, and labels before the calibration is.
        error_points: by how many points, of 100, the canary's error rate may be above the champion's.
        p99_growth: by which share its p99 may be above the champion's.
        calibration: lowest and highest ratio of predicted to observed.
        psi: of the ranker's probabilities against the champion's, at most.
    """

    steps: tuple[float, ...] = (1.0, 5.0, 25.0)
    least_minutes: float = Field(30.0, ge=0)
    least_requests: int = Field(1000, ge=1)
    judged_requests: int = Field(200, ge=1)
    error_points: float = Field(0.5, ge=0)
    p99_growth: float = Field(0.25, ge=0)
    calibration: tuple[float, float] = (0.9, 1.1)
    psi: float = Field(0.2, ge=0)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or not 0 < self.steps[0] <= self.steps[-1] < 100:
            raise ValueError(f"steps: expected ascending percents between 0 and 100, got {self.steps}")
        return self

    def verdict(self, percent: float, minutes: float, canary: Figures, champion: Figures) -> Verdict:
        """What becomes of a canary of ``percent`` of the users, after so many minutes of its step, by the figures of the step."""
        figures = {
            "percent": percent,
            "minutes": minutes,
            "requests": [canary.requests, champion.requests],
            "error_rate": [canary.error_rate, champion.error_rate],
            "p99_seconds": [_number(canary.p99), _number(champion.p99)],
            "calibration": [canary.calibration, champion.calibration],
            "labels": [canary.labelled, champion.labelled],
            "psi": canary.psi_from(champion),
        }
        problems = self._problems(canary, champion)
        if problems:
            return Verdict("withdraw", None, problems, figures)
        if minutes < self.least_minutes or canary.requests < self.least_requests:
            return Verdict("hold", None, (), figures)
        following = next((step for step in self.steps if step > percent), None)
        return Verdict("promote" if following is None else "advance", following, (), figures)

    def _problems(self, canary: Figures, champion: Figures) -> tuple[str, ...]:
        problems = []
        if min(canary.requests, champion.requests) >= self.judged_requests:
            if 100 * (canary.error_rate - champion.error_rate) > self.error_points:
                problems.append(f"error rate {canary.error_rate:.2%}, the champion's is {champion.error_rate:.2%}")
            if canary.p99 > (1 + self.p99_growth) * champion.p99:
                problems.append(f"p99 {1000 * canary.p99:.0f} ms, the champion's is {1000 * champion.p99:.0f} ms")
        if min(len(canary.probabilities), len(champion.probabilities)) >= self.judged_requests:
            psi = canary.psi_from(champion)
            if psi is not None and psi > self.psi:
                problems.append(f"PSI {psi:.2f} of the probabilities, expected at most {self.psi}")
        if canary.labelled >= self.judged_requests and canary.calibration is not None:
            low, high = self.calibration
            if not low <= canary.calibration <= high:
                problems.append(f"calibration {canary.calibration:.2f}, expected {low} to {high}")
        return tuple(problems)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
