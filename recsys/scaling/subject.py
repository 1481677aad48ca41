# SPDX-License-Identifier: Apache-2.0
"""What a study scales: the strategy behind `recsys.scaling.sweep`, one for each kind of model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from recsys.core.config import Config
from recsys.ranking.model import Costs
from recsys.training.history import History
from recsys.training.trainer import Trainer


@dataclass(frozen=True)
class Measure:
    """A figure of a finished cell.

    Attributes:
        key: among the metrics of a cell's line.
        name: on pages.
    """

    key: str
    name: str


@dataclass(frozen=True)
class Measures:
    """What a study reads off its cells, and how pages call it.

    Attributes:
        gain: more of it is better; its gain over a baseline follows a power law.
        loss: less of it is better; a power law with a floor.
        beside: what tables hold as well.
        slices: what has a picture of its own, on parts of what ``gain`` is measured on.
        x: the names of ``params``, ``flops`` and ``rows``, which may grow.
    """

    gain: Measure
    loss: Measure
    beside: tuple[Measure, ...]
    slices: tuple[Measure, ...]
    x: Mapping[str, str]

    @property
    def all(self) -> tuple[Measure, ...]:
        """Every one of them, in the order of tables."""
        return (self.gain, self.loss, *self.beside)


class Subject(ABC):
    """Models of one kind on one source of data: what they cost, how a cell is trained and measured, and what decides its result.

    Attributes:
        kind: of component that an architecture's ``model`` is.
        measures: of a finished cell.
    """

    kind: ClassVar[str]
    measures: Measures

    @abstractmethod
    def identity(self, config: Config) -> Mapping[str, Any]:
        """What of the data and of its treatment decides the result of a cell with this model, fit for JSON."""

    @abstractmethod
    def costs(self, config: Config, *, tables: bool = True) -> Costs:
        """What a model costs; it is built for the purpose, and no random state changes.

        Args:
            config: of the model.
            tables: whether ``tables`` is wanted; without it, large tables cost no time.

        Raises:
            ConfigError: the model cannot be built of the data.
        """

    @abstractmethod
    def references(self) -> Mapping[str, float]:
        """Values of ``measures.gain`` to compare with by name; one of the name ``measures.gain.key`` is a bound that no model can pass."""

    @abstractmethod
    def train_and_measure(
        self, config: Config, rows: int, seed: int, batch_size: int, trainer: Trainer
    ) -> tuple[History, dict[str, float]]:
        """Train a model and measure it on the test data.

        Args:
            config: of the model.
            rows: how much it is trained on, in the unit of ``measures.x["rows"]``.
            seed: of initial weights, of the training data drawn and of their order.
            batch_size: of training.
            trainer: trains it, or goes on with what stands in its folder.

        Returns:
            How training went; and every measure that the test data have a value for, by key.

        Raises:
            DataError: there is not so much to train on.
        """
