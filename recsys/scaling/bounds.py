# SPDX-License-Identifier: Apache-2.0
"""The best AUC and log-loss that any model can reach on planted impressions, from the true probabilities alone: no label is drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recsys.scaling.planted import PARTS, Planted

FOLDS = 20


@dataclass(frozen=True)
class Estimate:
    """A value and the standard error that the sample leaves."""

    value: float
    error: float


def expected_auc(probabilities: np.ndarray, scores: np.ndarray | None = None) -> float:
    """The AUC of ``scores`` in expectation over labels that are Bernoulli(``probabilities``).

    ``Σ p_i (1 − p_j) ([s_i > s_j] + ½ [s_i = s_j]) / Σ p_i (1 − p_j)`` over all pairs i ≠ j: a ratio of two expectations, in which each
    pair counts by the probability that i is positive and j negative. No score has a higher one than the probabilities themselves.

    Args:
        probabilities: ``[N]``, of a positive label.
        scores: ``[N]``; the probabilities by default.
    """
    p = np.asarray(probabilities, np.float64)
    s = p if scores is None else np.asarray(scores, np.float64)
    order = np.argsort(s, kind="stable")
    ascending = s[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    positive, negative = np.add.reduceat(p[order], starts), np.add.reduceat(1 - p[order], starts)
    itself = float((p * (1 - p)).sum())
    won = float((positive * (np.cumsum(negative) - 0.5 * negative)).sum()) - 0.5 * itself
    return float(won / (p.sum() * (1 - p).sum() - itself))


def expected_log_loss(probabilities: np.ndarray) -> float:
    """The mean entropy of the labels in nats: the log-loss of the true probabilities, in expectation over the labels."""
    p = np.asarray(probabilities, np.float64)
    q = 1 - p
    return float(-(p * np.log(p, where=p > 0, out=np.zeros_like(p)) + q * np.log(q, where=q > 0, out=np.zeros_like(q))).mean())


def bounds(planted: Planted, start: int, count: int) -> dict[str, Estimate]:
    """What is reachable on ``count`` rows from ``start``; errors are of the sample of rows.

    Returns:
        ``auc``, ``log_loss`` and ``ne`` (log-loss over that of the base rate) of the true probabilities, ``without_<part>``, the AUC of the
        logit less one part, and ``only_main``, that of the main effects alone. What lies between ``without_<part>`` and ``auc`` is the
        headroom of that part. Parts that explain nothing are left out.
    """
    parts = np.concatenate([rows.parts for rows in planted.blocks(start, count)])
    total = parts.sum(axis=1)
    p = 1 / (1 + np.exp(-planted.config.bias - total))
    scores = {"auc": total, "only_main": parts[:, 0]}
    shares = planted.config.shares.as_array()
    scores |= {f"without_{name}": total - parts[:, i] for i, name in enumerate(PARTS) if shares[i] > 0}
    found = {name: _estimate(lambda rows, s=s: expected_auc(p[rows], s[rows]), count) for name, s in scores.items()}  # type: ignore[misc]
    found["log_loss"] = _estimate(lambda rows: expected_log_loss(p[rows]), count)
    found["ne"] = _estimate(lambda rows: expected_log_loss(p[rows]) / expected_log_loss(np.array([p[rows].mean()])), count)
    return found


def _estimate(metric: Callable[[slice], float], count: int) -> Estimate:
    """The metric of all rows, and its standard error from that of ``FOLDS`` parts of them."""
    folds = np.array_split(np.arange(count), FOLDS)
    values = [metric(slice(fold[0], fold[-1] + 1)) for fold in folds]
    return Estimate(metric(slice(None)), float(np.std(values, ddof=1) / np.sqrt(FOLDS)))
