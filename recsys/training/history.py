# SPDX-License-Identifier: Apache-2.0
"""What a training run remembers of itself: the learning curve, and the state from which it can go on."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch.

    Attributes:
        epoch: how many epochs are finished, from 1.
        step: optimizer steps done.
        train: the mean over the epoch's steps of ``loss`` and of its parts.
        validation: what validation measured; empty where the epoch was not validated.
    """

    epoch: int
    step: int
    train: dict[str, float]
    validation: dict[str, float]


@dataclass(frozen=True)
class History:
    """A finished run.

    Attributes:
        epochs: the learning curve.
        best: the epoch whose weights the model has now; None without a monitor, where they are the last ones.
        steps: optimizer steps done, skipped ones included.
        skipped: steps left out because the loss or the gradient was not finite.
        stopped_early: whether patience ended the run before its last epoch.
    """

    epochs: tuple[EpochRecord, ...]
    best: EpochRecord | None
    steps: int
    skipped: int
    stopped_early: bool

    def rows(self) -> list[dict[str, Any]]:
        """The learning curve as JSON: ``epoch``, ``step``, ``train_loss`` and further ``train_*``, and validation's names as they are.

        A value that is not finite is None.
        """
        return [
            {"epoch": record.epoch, "step": record.step}
            | {f"train_{name}": _finite(value) for name, value in record.train.items()}
            | {name: _finite(value) for name, value in record.validation.items()}
            for record in self.epochs
        ]


@dataclass
class TrainState:
    """Where a run stands. Everything here is in its checkpoints, beside model, optimizers, random generators and the loader's cursor.

    Attributes:
        step: batches seen, skipped ones included.
        epoch: epochs finished.
        batch: batches seen of the epoch under way.
        skipped: steps left out because the loss or the gradient was not finite.
        sums: sums over the steps of the epoch under way, by name.
        counted: how many steps those are.
        best: index of the best record, None before the first.
        since_best: validations since then.
        finished: whether there is nothing left to train.
        records: the finished epochs.
        spikes: steps whose gradient norm was far above those before.
        bad_steps: steps that are left out, since their gradient was found not to be finite once it had reached the tables.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    skipped: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    best: int | None = None
    since_best: int = 0
    finished: bool = False
    records: list[EpochRecord] = field(default_factory=list)
    spikes: int = 0
    bad_steps: list[int] = field(default_factory=list)

    def count(self, values: dict[str, float]) -> None:
        """Take the values of one step into the epoch's means."""
        self.counted += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def end_epoch(self, validation: dict[str, float]) -> EpochRecord:
        """Close the epoch under way."""
        self.epoch += 1
        train = {name: total / self.counted for name, total in self.sums.items()}
        record = EpochRecord(self.epoch, self.step, train, validation)
        self.records.append(record)
        self.batch, self.counted, self.sums = 0, 0, {}
        return record

    @property
    def best_step(self) -> int | None:
        """The step after which the weights were best."""
        return None if self.best is None else self.records[self.best].step

    def history(self, epochs: int) -> History:
        """The history of a run that was to have ``epochs`` epochs."""
        best = None if self.best is None else self.records[self.best]
        return History(tuple(self.records), best, self.step, self.skipped, self.epoch < epochs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """From what `as_dict` gave."""
        return cls(**values | {"records": [EpochRecord(**record) for record in values["records"]]})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
