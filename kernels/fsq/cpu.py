# SPDX-License-Identifier: Apache-2.0
"""FSQ on the CPU: only z is kept for the backward pass, where autograd would keep four tensors of its size.

The operations on a number are those of the reference, in its order, so that results are equal to the last bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.fsq.reference import box, normalised, numbering


def forward(z: Tensor, levels: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    """``z [M, K, d]`` → levels ``[M, K, d]`` within [-1, 1], in the dtype of z, and codes int64 ``[M, K]``."""
    wide = torch.promote_types(z.dtype, torch.float32)
    if form == "sigmoid":
        rounded = z.to(wide).sigmoid().mul_(torch.tensor(levels, device=z.device).to(wide) - 1).round_()
    else:
        half, offset, shift = box(levels, wide, z.device)
        rounded = (z.to(wide) + shift).tanh_().mul_(half).sub_(offset).round_()
    rounded += 0.0  # minus zero becomes zero, as in the reference
    lowest, basis = numbering(levels, form, z.device)
    index = torch.full(z.shape[:-1], int((lowest * basis).sum()), device=z.device)
    for level, step in zip(rounded.unbind(-1), basis.tolist(), strict=True):
        index.add_(level.long(), alpha=step)
    return normalised(rounded, levels, form).to(z.dtype), index


def backward(dy: Tensor, z: Tensor, levels: Sequence[int], form: str) -> Tensor:
    """The gradient of ``z [M, K, d]``: that of the bound on the scale of [-1, 1]."""
    wide = torch.promote_types(z.dtype, torch.float32)
    counts = torch.tensor(levels, device=z.device)
    dz: Tensor
    if form == "sigmoid":
        through = (dy.to(wide) * (2 / (counts - 1))).mul_(counts.to(wide) - 1)
        dz = torch.ops.aten.sigmoid_backward(through, z.to(wide).sigmoid())
    else:
        half, _, shift = box(levels, wide, z.device)
        through = (dy.to(wide) / (counts // 2)).mul_(half)
        dz = torch.ops.aten.tanh_backward(through, (z.to(wide) + shift).tanh_())
    return dz.to(z.dtype)
