# SPDX-License-Identifier: Apache-2.0
"""Losses on logits."""

from torch import Tensor
from torch.nn import functional


def masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy from logits: the mean over the observed labels of each task, then over the tasks that have any.

    Args:
        logits: ``[B, tasks]``.
        labels: ``[B, tasks]``, 0 to 1; NaN where unobserved.

    Returns:
        A scalar; zero where no label is observed.
    """
    observed = ~labels.isnan()
    entropy = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    count = observed.sum(dim=0)
    per_task = entropy.where(observed, 0.0).sum(dim=0) / count.clamp(min=1)
    return per_task.sum() / (count > 0).sum().clamp(min=1)
