# SPDX-License-Identifier: Apache-2.0
"""Calibration: a rising map from a ranker's probabilities to such as mean what they say, fitted on events that it was not trained on.

A calibrator stands in the bundle beside its ranker, as plain numbers: what was measured offline is what is served.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import expit, logit

from recsys.core import components
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.config import parse
from recsys.core.errors import DataError

_SMALLEST = 1e-12  # how near to 0 and 1 a probability is taken to be: float32 says 0 and 1 outright


class Calibrator(ABC):
    """From probabilities to probabilities, without changing an order. Registered with ``@register("calibration", name)``.

    Built as ``cls(config)``, it leaves probabilities as they are until it is fitted.

    Args:
        config: the subclass's ``Config``.
    """

    def __init__(self, config: BaseConfig) -> None:
        self.config = config

    @property
    def column(self) -> str | None:
        """The feature whose values are calibrated apart; None where all events are calibrated as one."""
        return None

    def fit(self, labels: Any, probabilities: Any, weights: Any = None, groups: Any = None) -> Self:
        """Fit to the outcomes of N events; returns itself.

        Args:
            labels: ``[N]``, 0 or 1.
            probabilities: ``[N]``, from 0 to 1, what the ranker said of them.
            weights: ``[N]``, at least 0; ones by default.
            groups: ``[N]``, the values of `column`, where there is one; ignored where there is none.

        Raises:
            DataError: no events, other values, or other shapes.
        """
        y, p = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
        w = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
        if y.ndim != 1 or not y.shape == p.shape == w.shape:
            raise DataError(f"calibration: expected labels, probabilities and weights [N], got {y.shape}, {p.shape} and {w.shape}")
        _hold("labels", y, (y == 0) | (y == 1), "0 or 1")
        _hold("probabilities", p, (p >= 0) & (p <= 1), "0 to 1")
        _hold("weights", w, np.isfinite(w) & (w >= 0), "a finite number of at least 0")
        if not w.sum() > 0:
            raise DataError("calibration: expected at least one event that weighs something, got none")
        self._fit_groups(y, p, w, groups)
        return self

    def _fit_groups(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, groups: Any) -> None:
        """Fit to float64 ``[N]`` each, and groups as they were given."""
        self._fit(labels, probabilities, weights)

    @abstractmethod
    def _fit(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> None:
        """Fit to float64 ``[N]`` each."""

    @abstractmethod
    def apply(self, probabilities: Any, groups: Any = None) -> np.ndarray:
        """Calibrated probabilities, float64 in the shape given: never falling in the probability, equal where it is equal.

        Args:
            probabilities: of any shape.
            groups: the values of `column`, where there is one, in that shape; what is said above then holds within a group.
        """

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """What was fitted, as numbers and lists of them."""

    @abstractmethod
    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Take over what `numbers` gave."""

    def state(self) -> dict[str, Any]:
        """Everything, fit for JSON: `from_state` gives a calibrator that maps every probability to the same bits."""
        return {"config": self.config.model_dump(mode="json"), "numbers": self.numbers()}


def _hold(what: str, values: np.ndarray, right: np.ndarray, expected: str) -> None:
    if not right.all():
        place = int(np.flatnonzero(~right)[0])
        raise DataError(f"calibration: {what}: event {place}: expected {expected}, got {values[place]:g}")


def from_state(state: dict[str, Any]) -> Calibrator:
    """The calibrator that `Calibrator.state` describes.

    Raises:
        ConfigError: its configuration has another form.
        ComponentError: no calibration has its name.
    """
    cls = components.get("calibration", state["config"]["name"])
    calibrator: Calibrator = cls(parse(cls.Config, state["config"], source="calibration"))
    calibrator.load_numbers(state["numbers"])
    return calibrator


@register("calibration", "none")
class NoCalibration(Calibrator):
    """Probabilities as the ranker gives them."""

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["none"] = "none"

    def _fit(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> None:
        """Nothing to fit."""

    def apply(self, probabilities: Any, groups: Any = None) -> np.ndarray:
        """See `Calibrator.apply`."""
        return np.asarray(probabilities, np.float64)

    def numbers(self) -> dict[str, Any]:
        """None."""
        return {}

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """There are none."""


def undersampling_correction(probabilities: Any, rate: float) -> np.ndarray:
    """What a model would say had it seen all negatives: ``p / (p + (1 − p) / w)`` (He et al., ADKDD 2014, §6.3).

    Args:
        probabilities: of a model trained on all positives and a random share of the negatives.
        rate: w, that share, above 0 and at most 1.

    Raises:
        ValueError: the rate is outside its range.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate: expected a share above 0 and at most 1, got {rate!r}")
    p = np.asarray(probabilities, np.float64)
    return np.asarray(p / (p + (1 - p) / rate))


@register("calibration", "undersampling")
class Undersampling(NoCalibration):
    """`undersampling_correction` by a known rate: nothing is fitted. `Platt` and `Isotonic` find it by themselves, on all negatives."""

    class Config(BaseConfig):
        """The rate.

        Attributes:
            rate: the share of the negatives that the ranker was trained on, ``ranker.negatives`` of a recipe.
        """

        name: Literal["undersampling"] = "undersampling"
        rate: float = Field(gt=0, le=1)

    config: Config

    def apply(self, probabilities: Any, groups: Any = None) -> np.ndarray:
        """See `Calibrator.apply`."""
        return undersampling_correction(probabilities, self.config.rate)


@register("calibration", "platt")
class Platt(Calibrator):
    """Platt scaling (Platt 1999): ``sigmoid(a · logit(p) + b)``, a logistic regression on the ranker's logit.

    As the paper has it, the targets are not 0 and 1 but ``1 / (N₋ + 2)`` and ``(N₊ + 1) / (N₊ + 2)``, so that there is a finite optimum
    for events that the ranker tells apart without error, too.

    Ours: a ≥ 0, so that the best fit to a ranker that is worse than chance is the base rate and never the reversed order.
    """

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["platt"] = "platt"

    def __init__(self, config: BaseConfig) -> None:
        super().__init__(config)
        self.slope, self.intercept = 1.0, 0.0

    def _fit(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> None:
        x, share = _logit(probabilities), weights / weights.sum()
        positives, negatives = (weights * labels).sum(), (weights * (1 - labels)).sum()
        target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

        def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
            z = line[0] * x + line[1]
            error = share * (expit(z) - target)
            return float(share @ (np.logaddexp(0, z) - target * z)), np.array([error @ x, error.sum()])

        options = {"ftol": 1e-16, "gtol": 1e-10, "maxiter": 1000}
        best = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)], options=options)
        self.slope, self.intercept = (float(value) for value in best.x)

    def apply(self, probabilities: Any, groups: Any = None) -> np.ndarray:
        """See `Calibrator.apply`."""
        return np.asarray(expit(self.slope * _logit(probabilities) + self.intercept))

    def numbers(self) -> dict[str, Any]:
        """The line on the logit."""
        return {"slope": self.slope, "intercept": self.intercept}

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Take over what `numbers` gave."""
        self.slope, self.intercept = float(numbers["slope"]), float(numbers["intercept"])


def _logit(probabilities: Any) -> np.ndarray:
    return np.asarray(logit(np.clip(np.asarray(probabilities, np.float64), _SMALLEST, 1 - _SMALLEST)))


@register("calibration", "isotonic")
class Isotonic(Calibrator):
    """Isotonic regression (Zadrozny & Elkan, KDD 2002), fitted by scikit-learn: the rising map with the least squared error.

    Straight lines between the fitted points, constant beyond them. It makes ties, and may say 0 or 1 outright, where the validation
    events at one end have one label only; it wants some thousands of events where `Platt` wants some hundreds.
    """

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["isotonic"] = "isotonic"

    def __init__(self, config: BaseConfig) -> None:
        super().__init__(config)
        self.given, self.calibrated = np.array([0.0, 1.0]), np.array([0.0, 1.0])

    def _fit(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> None:
        from sklearn.isotonic import IsotonicRegression  # fitting alone needs it, and a server never fits

        fitted = IsotonicRegression(y_min=0, y_max=1).fit(probabilities, labels, sample_weight=weights)
        self.given, self.calibrated = fitted.X_thresholds_, fitted.y_thresholds_

    def apply(self, probabilities: Any, groups: Any = None) -> np.ndarray:
        """See `Calibrator.apply`."""
        return np.asarray(np.interp(np.asarray(probabilities, np.float64), self.given, self.calibrated))

    def numbers(self) -> dict[str, Any]:
        """The points between which the map is straight."""
        return {"given": self.given.tolist(), "calibrated": self.calibrated.tolist()}

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Take over what `numbers` gave."""
        self.given, self.calibrated = (np.array(numbers[name], np.float64) for name in ("given", "calibrated"))
