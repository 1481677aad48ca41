# SPDX-License-Identifier: Apache-2.0
"""Whether another form of a ranker, compiled or quantized, gives the probabilities and the lists of the one that was trained."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recsys.data.batch import TiledBatch

LIST = 50
MOST_DIFFERENCE, LEAST_OVERLAP = 1e-5, 0.99


class Predicts(Protocol):
    """A ranker as the recommendation path sees it."""

    def predict(self, batch: TiledBatch) -> Tensor:
        """Probabilities ``[R, tasks]``."""
        ...


@dataclass(frozen=True)
class Parity:
    """Two forms of one ranker on the same candidates.

    Attributes:
        rows: how many candidates were compared.
        difference: the largest between two probabilities, over all tasks.
        overlap: the share of each user's `LIST` best candidates that both name, on average over the users.
        failure: what stopped the other form; None where nothing did.
    """

    rows: int
    difference: float = 0.0
    overlap: float = 1.0
    failure: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the other form must not answer; None where it may."""
        if self.failure is not None:
            return self.failure
        if not self.rows:
            return "rows: expected candidates to compare, got none"
        if not self.difference <= MOST_DIFFERENCE:
            return f"probabilities: expected differences of at most {MOST_DIFFERENCE:g}, got {self.difference:.3g} among {self.rows} rows"
        if not self.overlap >= LEAST_OVERLAP:
            return f"lists: expected at least {LEAST_OVERLAP:g} of the first {LIST} in common, got {self.overlap:.4f}"
        return None

    @property
    def holds(self) -> bool:
        """Whether the other form may answer in the place of the first."""
        return self.reason is None


@torch.no_grad()
def compare(first: Predicts, other: Predicts, batch: TiledBatch, task: int) -> Parity:
    """Let both rank a batch.

    Args:
        first: the ranker as it was trained.
        other: another form of it. An error that it raises becomes the `Parity.failure`.
        batch: the candidates of some users; where a user has no more than `LIST`, the overlap says nothing.
        task: whose probabilities make the lists.
    """
    expected = first.predict(batch).numpy()
    try:
        got = other.predict(batch).numpy()
    except Exception as error:
        return Parity(len(batch), float("nan"), 0.0, f"{type(error).__name__}: {error}")
    if got.shape != expected.shape:
        return Parity(len(batch), float("nan"), 0.0, f"probabilities: expected {list(expected.shape)}, got {list(got.shape)}")
    users = batch.user_of_row.numpy()
    shares = [_overlap(expected[users == user, task], got[users == user, task]) for user in np.unique(users)]
    return Parity(len(batch), float(np.abs(got - expected).max()), float(np.mean(shares)))


def _overlap(first: np.ndarray, other: np.ndarray) -> float:
    """The share of the best of one list that are among the best of the other; of equal ones the earlier are better."""
    best, other_best = (np.argsort(-values, kind="stable")[:LIST] for values in (first, other))
    return float(np.isin(best, other_best).mean())
