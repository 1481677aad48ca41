# SPDX-License-Identifier: Apache-2.0
"""Sums of bags of rows of an int8 embedding table.

A stored row of width D is ``4 + D`` bytes: a scale s and an offset b, float16 each, then D unsigned bytes q; it stands for ``s q + b``.
This is how FBGEMM's inference look-up keeps a table; its quantiser, ``FloatToFusedNBitRowwiseQuantizedSBHalf``, writes s and b last.
"""

import torch
from torch import Tensor

HEADER = 4  # bytes of the scale and the offset


def int8_pooling(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: bag i is the sum of the rows ``values[offsets[i] : offsets[i + 1]]``, zero where there are none.

    Args:
        rows: uint8 ``[R, 4 + D]``.
        values: int64 ``[N]``, 0 to R - 1.
        offsets: int64 ``[B + 1]``, from 0 to N, not descending.
        dtype: of the result.

    Returns:
        ``[B, D]``, summed in float64.
    """
    vectors = dequantised(rows[values])
    bags = len(offsets) - 1
    bag = torch.arange(bags, device=rows.device).repeat_interleave(offsets.diff(), output_size=len(values))
    return vectors.new_zeros(bags, vectors.shape[1]).index_add_(0, bag, vectors).to(dtype)


def dequantised(rows: Tensor) -> Tensor:
    """float64 ``[R, D]`` of stored rows ``[R, 4 + D]``."""
    scale, offset = rows[:, :HEADER].clone(memory_format=torch.contiguous_format).view(torch.float16).double().unbind(1)
    return rows[:, HEADER:] * scale[:, None] + offset[:, None]
