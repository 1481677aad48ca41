# SPDX-License-Identifier: Apache-2.0
"""One step of beam search in torch: the children of all beams side by side, padded to as many as the largest node has."""

import torch
from torch import Tensor

from kernels.constrained_step import reference
from kernels.constrained_step.reference import Given, Step

_LAST_NODE = (1 << 32) - 1


def forward(given: Given, width: int, children: int | None, renormalise: bool) -> Step:
    """See `kernels.constrained_step.constrained_step`. Float64 takes the reference."""
    if torch.float64 in (given.log_probs.dtype, given.scores.dtype):
        return reference.constrained_step(*given, width, children, renormalise)
    found, child = reference.open_children(given, renormalise)
    open_bw = (found != -torch.inf).sum(2)
    if children is not None and children < found.shape[2]:
        place = _best(found, child, children)
        found, child = found.gather(2, place), child.gather(2, place)
    flat = found.flatten(1)
    place = _best(flat, child.flatten(1), width)
    return reference.step_of(flat.gather(1, place), place, child, open_bw, given.scores.dtype, width, children)


def _best(scores: Tensor, nodes: Tensor, count: int) -> Tensor:
    """The places of the ``count`` best of the last dimension, best first."""
    if count < scores.shape[-1]:
        best, place = scores.topk(count + 1)
        last, next_one = best[..., count - 1], best[..., count]
        if not bool((~(last > next_one) & (next_one != -torch.inf)).any()):  # else it is open which of equal ones are the last
            place = place[..., :count]
            return place.gather(-1, _keys(best[..., :count], nodes.gather(-1, place)).argsort(descending=True))
    return _keys(scores, nodes).topk(min(count, scores.shape[-1])).indices


def _keys(scores: Tensor, nodes: Tensor) -> Tensor:
    """int64: a better score is a larger key, NaN the largest, then a smaller node."""
    bits = scores.add(0.0).masked_fill_(scores.isnan(), torch.nan).view(torch.int32)  # -0.0 becomes 0.0, and NaN has one sign
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LAST_NODE - nodes)
