# SPDX-License-Identifier: Apache-2.0
"""Losses on logits."""

from torch import Tensor
from torch.nn import functional

from recsys.data.world import average


def masked_bce(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy from logits: the weighted mean over the observed labels of each task, then the mean over the tasks with any.

    Where several processes train, what is counted is counted over all of them (see `recsys.data.world.average`).

    Args:
        logits: ``[B, tasks]``.
        labels: ``[B, tasks]``, 0 to 1; NaN where unobserved.
        weights: ``[B]``, at least 0: a row of weight 2 counts as the row twice, one of weight 0 as none. None weighs all alike.

    Returns:
        A scalar; zero where no label is observed in a row that weighs something.
    """
    observed = ~labels.isnan()
    entropy = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    each = observed if weights is None else observed * weights[:, None]
    total = average(each.sum(dim=0))
    counts = total > 0
    per_task = (entropy.where(each > 0, 0.0) * each).sum(dim=0) / total.where(counts, 1)
    return per_task.sum() / counts.sum().clamp(min=1)
