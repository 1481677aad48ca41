# SPDX-License-Identifier: Apache-2.0
"""Sums and softmaxes over the events of each row of a jagged batch."""

import torch
from torch import Tensor


def segment_sum(values_n: Tensor, row_n: Tensor, rows: int) -> Tensor:
    """Sum the values of each row: ``[N, …]`` and int64 ``[N]`` to ``[rows, …]``; a row without values gets zero."""
    return values_n.new_zeros(rows, *values_n.shape[1:]).index_add(0, row_n, values_n)


def segment_softmax(scores_nh: Tensor, row_n: Tensor, rows: int) -> Tensor:
    """Softmax over the events of each row, for each column alone: ``[N, H] → [N, H]``."""
    highest_bh = scores_nh.new_full((rows, scores_nh.shape[1]), -torch.inf)
    highest_bh = highest_bh.scatter_reduce(0, row_n[:, None].expand_as(scores_nh), scores_nh.detach(), "amax")
    weights_nh = (scores_nh - highest_bh[row_n]).exp()
    return weights_nh / segment_sum(weights_nh, row_n, rows)[row_n]
