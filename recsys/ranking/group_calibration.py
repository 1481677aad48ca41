# SPDX-License-Identifier: Apache-2.0
"""A calibration for each domain: one ranker serves many, and is rarely wrong in all of them alike."""

from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.ranking.calibration import Calibrator, from_state


@register("calibration", "per_group")
class PerGroup(Calibrator):
    """A calibrator of its own for each value of a feature that has events enough, and one over all events for the rest.

    It keeps the order within a group. Between groups orders may change, which is what it is for.
    """

    class Config(BaseConfig):
        """What is calibrated apart, and how.

        Attributes:
            column: a feature with one string for each row, such as ``item_domain``.
            base: the calibration of each group.
            min_events: a value with fewer events, or with events of one label only, is calibrated as all events are.
        """

        name: Literal["per_group"] = "per_group"
        column: str
        base: component_config("calibration")  # type: ignore[valid-type]
        min_events: Annotated[int, Field(ge=1)] = 500

        @model_validator(mode="after")
        def _one_level(self) -> Self:
            if isinstance(self.base, PerGroup.Config):
                raise ValueError("base: expected a calibration of one group, got per_group")
            return self

    config: Config

    def __init__(self, config: BaseConfig) -> None:
        super().__init__(config)
        self.everything: Calibrator = components.build("calibration", self.config.base)
        self.groups: dict[str, Calibrator] = {}

    @property
    def column(self) -> str:
        """The feature whose values are calibrated apart."""
        return self.config.column

    def _fit_groups(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, groups: Any) -> None:
        names = self._names(groups, labels.shape)
        self._fit(labels, probabilities, weights)
        self.groups = {}
        for name in sorted({str(name) for name in names if name is not None}):
            mine = (names == name) & (weights > 0)
            if mine.sum() >= self.config.min_events and len(np.unique(labels[mine])) == 2:
                base: Calibrator = components.build("calibration", self.config.base)
                self.groups[name] = base.fit(labels[mine], probabilities[mine], weights[mine])

    def _fit(self, labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> None:
        self.everything = components.build("calibration", self.config.base)
        self.everything.fit(labels, probabilities, weights)

    def apply(self, probabilities: Any, groups: Any = None) -> np.ndarray:
        """See `Calibrator.apply`. A value that had no events of its own, and null, are calibrated as all events are.

        Raises:
            DataError: the groups are absent, or are not strings in the shape of the probabilities.
        """
        given = np.asarray(probabilities)
        names = self._names(groups, given.shape)
        calibrated = np.array(self.everything.apply(given))
        for name, calibrator in self.groups.items():
            mine = names == name
            calibrated[mine] = calibrator.apply(given[mine])
        return calibrated

    def numbers(self) -> dict[str, Any]:
        """The state of each calibrator."""
        return {"all": self.everything.state(), "groups": {name: each.state() for name, each in self.groups.items()}}

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        """Take over what `numbers` gave."""
        self.everything = from_state(numbers["all"])
        self.groups = {name: from_state(state) for name, state in numbers["groups"].items()}

    def _names(self, groups: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The groups as an array of strings and None."""
        if groups is None:
            raise DataError(f"calibration: expected the values of {self.column!r} beside the probabilities, got none")
        if isinstance(groups, pa.Array | pa.ChunkedArray):
            groups = groups.to_pylist()
        names = np.array(groups, object)
        if names.shape != shape:
            raise DataError(f"calibration: {self.column}: expected one value for each probability {shape}, got {names.shape}")
        wrong = next((name for name in names.flat if not (name is None or isinstance(name, str))), None)
        if wrong is not None:
            raise DataError(f"calibration: {self.column}: expected strings, got {wrong!r}")
        return names
