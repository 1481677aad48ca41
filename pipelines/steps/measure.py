# SPDX-License-Identifier: Apache-2.0
"""From predictions and ranks to the figures of a run, each with what it is compared with."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from recsys.evaluation.bootstrap import Interval, paired_auc_difference, paired_mean_difference
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.calibration import calibration_ratio, expected_calibration_error, reliability_curve
from recsys.evaluation.metrics.gauc import gauc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.evaluation.metrics.normalized_entropy import normalized_entropy
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at

if TYPE_CHECKING:
    from pipelines.recipe import Evaluation

Segments = Mapping[str, np.ndarray]
RANK_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "recall@10": partial(recall_at, k=10),
    "recall@50": partial(recall_at, k=50),
    "ndcg@10": partial(ndcg_at, k=10),
}


def ranking_metrics(labels: np.ndarray, probability: np.ndarray, users: np.ndarray, base_rate: float) -> dict[str, float | None]:
    """Quality of probabilities on one segment; None where a metric is not defined, such as the AUC of one class."""
    values = {
        "auc": auc(labels, probability),
        "gauc": gauc(labels, probability, users).value,
        "logloss": log_loss(labels, probability),
        "ne": normalized_entropy(labels, probability, base_rate),
        "calibration": calibration_ratio(labels, probability),
        "ece": expected_calibration_error(labels, probability),
        "events": len(labels),
    }
    return {name: None if not np.isfinite(value) else float(value) for name, value in values.items()} | {"events": len(labels)}


def rank_metrics(ranks: np.ndarray) -> dict[str, float | None]:
    """Quality of ranks on one segment."""
    values = {name: measure(ranks) for name, measure in RANK_METRICS.items()}
    return {name: float(v.mean()) if len(v) else None for name, v in values.items()} | {"events": len(ranks)}


def by_segment(segments: Segments, measure: Any, *arrays: np.ndarray) -> dict[str, dict[str, float | None]]:
    """``measure`` of the arrays' events in each segment."""
    return {name: measure(*(array[mask] for array in arrays)) for name, mask in segments.items()}


def by_slice(slices: Segments, ranks: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """On every slice that has targets: how many, and every model's quality."""
    return {
        kind: {"targets": int(mask.sum()), "models": {name: rank_metrics(own[mask]) for name, own in ranks.items()}}
        for kind, mask in slices.items()
        if mask.any()
    }


def verdict(name: str, interval: Interval) -> dict[str, Any]:
    """A difference with its interval, as the report shows it."""
    return {"name": name, "estimate": interval.estimate, "low": interval.low, "high": interval.high}


def user_codes(user_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64: a number for each user, by which events are clustered."""
    values = user_ids.combine_chunks() if isinstance(user_ids, pa.ChunkedArray) else user_ids
    codes: np.ndarray = values.dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def ranking_intervals(
    ours: str, labels: np.ndarray, probabilities: Mapping[str, np.ndarray], users: np.ndarray, evaluation: "Evaluation", seed: int
) -> dict[str, Interval]:
    """Our AUC less that of logistic regression, with its paired interval over users."""
    difference = paired_auc_difference(
        labels,
        probabilities[ours],
        probabilities["logistic_regression"],
        users,
        resamples=evaluation.resamples,
        level=evaluation.level,
        seed=seed,
    )
    return {"ranker_above_logistic_regression.auc": difference}


def retrieval_intervals(
    ours: str, ranks: Mapping[str, np.ndarray], users: np.ndarray, evaluation: "Evaluation", seed: int
) -> dict[str, Interval]:
    """Our Recall@10, Recall@50 and NDCG@10 less those of each other model, with paired intervals over users."""
    return {
        f"retriever_above_{name}.{metric}": mean_interval(measure(ranks[ours]), measure(other), users, evaluation, seed)
        for name, other in ranks.items()
        for metric, measure in RANK_METRICS.items()
        if name != ours
    }


def mean_interval(ours: np.ndarray, theirs: np.ndarray, users: np.ndarray, evaluation: "Evaluation", seed: int) -> Interval:
    """The difference of two means over events, with its paired interval over users."""
    return paired_mean_difference(ours, theirs, users, resamples=evaluation.resamples, level=evaluation.level, seed=seed)


def calibration_bins(labels: np.ndarray, probabilities: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, float]]]:
    """Reliability curves of the models that say more than the base rate."""
    curves = {}
    for name, probability in probabilities.items():
        if name != "base_rate":
            bins = reliability_curve(labels, probability, bins=10)
            curves[name] = [
                {"predicted": float(p), "observed": float(o), "count": int(c)}
                for p, o, c in zip(bins.predicted, bins.observed, bins.count, strict=True)
            ]
    return curves
