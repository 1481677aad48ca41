# SPDX-License-Identifier: Apache-2.0
"""What is known of the answers of one bundle, to judge it beside another."""

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np

_KEPT = 10_000
_BINS = 10


@dataclass
class Figures:
    """Counts, and the last times and probabilities; several threads may add to it.

    Attributes:
        requests: that ended.
        errors: of them, those without an answer for the server's fault, and those whose ranker or retriever failed.
        seconds: from arrival to answer.
        probabilities: the ranker's, of the first item of each list.
        predicted: the sum of the ranker's probabilities of items for which a label has come.
        labels: the sum of these labels.
        labelled: how many they are.
    """

    requests: int = 0
    errors: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    probabilities: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    predicted: float = 0.0
    labels: float = 0.0
    labelled: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def answered(self, seconds: float, *, error: bool, probability: float | None = None) -> None:
        """A request has ended."""
        with self._lock:
            self.requests += 1
            self.errors += error
            self.seconds.append(seconds)
            if probability is not None:
                self.probabilities.append(probability)

    def label(self, probability: float, label: float) -> None:
        """Whether a user took an item, 1 or 0, whose probability the ranker had given."""
        with self._lock:
            self.predicted += probability
            self.labels += label
            self.labelled += 1

    @property
    def error_rate(self) -> float:
        """Errors among the requests; 0 without any."""
        return self.errors / self.requests if self.requests else 0.0

    @property
    def p99(self) -> float:
        """Seconds; NaN without a request."""
        with self._lock:
            return float(np.quantile(self.seconds, 0.99)) if self.seconds else float("nan")

    @property
    def calibration(self) -> float | None:
        """Sum of probabilities by sum of labels; None while no label is positive."""
        return self.predicted / self.labels if self.labels else None

    def psi_from(self, other: "Figures") -> float | None:
        """The population stability index of the probabilities here against those of another, by its deciles; None without any."""
        with self._lock:
            own = np.array(self.probabilities)
        with other._lock:
            base = np.array(other.probabilities)
        return psi(base, own) if len(base) and len(own) else None


def psi(base: np.ndarray, other: np.ndarray) -> float:
    """``Σ (q − p) log(q / p)`` over the deciles of ``base``, with half a value added to every bin so that none is empty."""
    edges = np.unique(np.quantile(base, np.linspace(0, 1, _BINS + 1)[1:-1]))
    p, q = (_shares(values, edges) for values in (base, other))
    return float(((q - p) * np.log(q / p)).sum())


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) + 0.5
    shares: np.ndarray = counts / counts.sum()
    return shares
