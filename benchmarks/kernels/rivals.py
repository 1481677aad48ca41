# SPDX-License-Identifier: Apache-2.0
"""What each op is measured against: how one would write it in PyTorch who has no kernel of his own, and FBGEMM where it has one.

A rival takes the op's arguments and returns its results. ``torch.compile`` of the first one joins them by itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.constrained_step.cpu import forward as padded_step
from kernels.constrained_step.reference import Given
from kernels.fsq import reference as fsq
from kernels.int8_pooling.cpu import forward as fbgemm_pooling
from kernels.int8_pooling.reference import HEADER
from kernels.jagged_attention.reference import distance, visible
from kernels.sinkhorn import reference as sinkhorn

Rival = Callable[..., Any]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def token_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """Batched products over the tokens, as the rankers' layer has them."""
    gate, up = (torch.bmm(x.transpose(0, 1), gate_up) * scale.t()[..., None].to(x.dtype)).chunk(2, dim=-1)
    return residual + torch.bmm(functional.silu(gate) * up, down).transpose(0, 1)


def jagged_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, form: str, mask: str, group: int, divisor: float
) -> Tensor:
    """All rows padded to the longest one, then PyTorch's fused attention, or HSTU's products with all weights."""
    lengths = offsets.diff()
    longest = int(lengths.max())
    place = torch.arange(longest, device=q.device)
    held = place < lengths[:, None]
    padded = (offsets[:-1, None] + place).clamp(max=max(len(q) - 1, 0))
    q_bhle, k_bhle, v_bhle = (x[padded].transpose(1, 2) for x in (q, k, v))
    seen = visible(place, place, mask, group)
    if mask != "causal":  # where the last item is not whole, its tokens would see the padding behind
        seen = seen & held[:, None, None, :] | torch.eye(longest, dtype=torch.bool)
    added = None if bias is None else bias[:, distance(place, place, bias.shape[1])]
    if form == "softmax":
        floats = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
        y_bhle = functional.scaled_dot_product_attention(q_bhle, k_bhle, v_bhle, floats if added is None else floats + added)
    else:
        scores = q_bhle @ k_bhle.transpose(2, 3) / math.sqrt(q.shape[2])
        scores = scores if added is None else scores + added
        y_bhle = torch.where(seen, functional.silu(scores) / divisor, 0.0) @ v_bhle
    return y_bhle.transpose(1, 2)[held]


def int8_pooling(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows taken and dequantised, then summed in segments."""
    own = rows[values]
    scale, offset = own[:, :HEADER].contiguous().view(torch.float16).float().unbind(1)
    vectors = torch.addcmul(offset[:, None], own[:, HEADER:].float(), scale[:, None])
    sums: Tensor = torch.segment_reduce(vectors, "sum", offsets=offsets, axis=0)
    return sums.to(dtype)


def catalogue_loss(states: Tensor, items: Tensor, weights: Tensor) -> Tensor:
    """All logits of a slot at once."""
    slots = [torch.logsumexp(states[:, k] @ items[:, k].T, 1) @ weights for k in range(states.shape[1])]
    return torch.stack(slots)


def constrained_step(
    log_probs: Tensor,
    nodes: Tensor,
    scores: Tensor,
    first_child: Tensor,
    code_of: Tensor,
    alive: Tensor,
    closed_offsets: Tensor,
    closed: Tensor,
    width: int,
    children: int | None,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The children of all beams side by side, padded to as many as the largest node has."""
    given = Given(log_probs, nodes, scores, first_child, code_of, alive, closed_offsets, closed)
    return padded_step(given, width, children, renormalise)


def gather_topk(values: Tensor, codes: Tensor, rows: Tensor, excluded_offsets: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All scores by PyTorch's bag, then the best."""
    users, slots, size = values.shape
    bags = codes.long() + size * torch.arange(slots)
    scores = functional.embedding_bag(bags, values.flatten(1).T, mode="sum").T
    allowed = torch.zeros(len(codes), dtype=torch.bool)
    allowed[rows] = True
    scores = scores.masked_fill(~allowed, -torch.inf)
    scores[torch.arange(users).repeat_interleave(excluded_offsets.diff(), output_size=len(excluded)), excluded] = -torch.inf
    best, found = scores.topk(k)
    return found, best


RIVALS: Mapping[str, Mapping[str, Rival]] = {
    "rms_norm": {"eager": rms_norm},
    "token_swiglu": {"eager": token_swiglu},
    "log_sinkhorn": {"eager": sinkhorn.sinkhorn},
    "jagged_attention": {"eager": jagged_attention},
    "fsq": {"eager": fsq.fsq},
    "catalogue_log_partition": {"eager": catalogue_loss},
    "constrained_step": {"eager": constrained_step},
    "gather_topk": {"eager": gather_topk},
    "int8_pooling": {"eager": int8_pooling, "fbgemm": fbgemm_pooling},
}
