# SPDX-License-Identifier: Apache-2.0
"""AUC within groups, such as users or sessions."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recsys.evaluation.metrics.inputs import binary_labels, vector

Weighting = Literal["impressions", "uniform"]


@dataclass(frozen=True)
class GroupedAUC:
    """The mean AUC over groups, and how many groups it speaks of.

    Attributes:
        value: the mean; NaN where no group has both classes.
        groups: the groups with both classes.
        dropped: the groups with one class only, which have no AUC.
        dropped_impressions: the events in those.
    """

    value: float
    groups: int
    dropped: int
    dropped_impressions: int


def group_auc(labels: Any, scores: Any, groups: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The AUC of each of the G distinct groups, ties counted ½.

    Returns:
        The groups, sorted; their AUC, float64 ``[G]``, NaN where a class is absent; their numbers of events, int64 ``[G]``.
    """
    labels = binary_labels(labels)
    scores = vector(scores, "scores", len(labels))
    if np.shape(groups) != labels.shape:
        raise ValueError(f"groups: expected the shape {labels.shape}, got {np.shape(groups)}")
    names, code, size = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if not len(names):
        return names, np.zeros(0), size
    order = np.lexsort((scores, code))
    place = _midranks(code[order], scores[order]) - (np.cumsum(size) - size)[code[order]]
    positives = np.bincount(code, weights=labels, minlength=len(names))
    rank_sum = np.bincount(code[order], weights=place * labels[order], minlength=len(names))
    pairs = positives * (size - positives)
    # Mann-Whitney: U = Σ ranks of the positives − P (P + 1) / 2, and AUC = U / (P · N).
    won = rank_sum - positives * (positives + 1) / 2
    return names, np.divide(won, pairs, out=np.full(len(names), np.nan), where=pairs > 0), size


def _midranks(code: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """1-based places in the given order, averaged over runs of equal (code, score)."""
    new = np.concatenate([[True], (code[1:] != code[:-1]) | (scores[1:] != scores[:-1])])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(scores))
    middle: np.ndarray = ((starts + ends + 1) / 2)[np.cumsum(new) - 1]
    return middle


def gauc(labels: Any, scores: Any, groups: Any, weighting: Weighting = "impressions") -> GroupedAUC:
    """The mean over groups of the AUC within each: Σ_g w_g · AUC_g / Σ_g w_g.

    Args:
        labels: ``[N]``, 0 or 1.
        scores: ``[N]``.
        groups: ``[N]``, such as user ids.
        weighting: ``impressions`` weights a group by its number of events (Zhou et al., Deep Interest Network, KDD 2018, section 6.2);
            ``uniform`` gives every group the same weight, as TorchRec does. The two differ: say which one is reported.

    Returns:
        The mean with its counts. Ties count ½. Groups with one class are dropped and counted. (TorchRec, in contrast, gives a tie the
        order of an argsort, and also drops groups whose scores are all equal, or 0 beside one other value.)
    """
    if weighting not in ("impressions", "uniform"):
        raise ValueError(f"weighting: expected 'impressions' or 'uniform', got {weighting!r}")
    _, value, size = group_auc(labels, scores, groups)
    kept = ~np.isnan(value)
    weight = size[kept].astype(np.float64) if weighting == "impressions" else np.ones(int(kept.sum()))
    mean = float((weight * value[kept]).sum() / weight.sum()) if kept.any() else float("nan")
    return GroupedAUC(mean, int(kept.sum()), int((~kept).sum()), int(size[~kept].sum()))
