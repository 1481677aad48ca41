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
from kernels.square_sums import reference as square_sums

Rival = Callable[..., Any]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own."""
    return functional.rms_norm(x, weight.shape, weight, eps)


def token_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """Batched products over the tokens, as the rankers' layer has them; tokens in parts are gathered."""
    rows = x.transpose(0, 1).flatten(2)
    gate, up = (torch.bmm(rows, gate_up) * scale.t()[..., None].to(x.dtype)).chunk(2, dim=-1)
    return residual + torch.bmm(functional.silu(gate) * up, down).transpose(0, 1).unflatten(2, x.shape[2:])


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    form: str,
    mask: str,
    group: int,
    divisor: float,
    told: Tensor | None,
) -> Tensor:
    """All rows padded to the longest one, then PyTorch's fused attention, or HSTU's products with all weights."""
    lengths = offsets.diff()
    longest = int(lengths.max())
    place = torch.arange(longest, device=q.device)
    held = place < lengths[:, None]
    padded = (offsets[:-1, None] + place).clamp(max=max(len(q) - 1, 0))
    q_bhle, k_bhle, v_bhle = (x[padded].transpose(1, 2) for x in (q, k, v))
    seen = visible(place, place, mask, group, None if told is None else told[padded][:, None])
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


def routed_experts(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor,
    onto: Tensor,
    activation: str,
) -> Tensor:
    """Every expert over every row, and a weight that is zero where it was not chosen: what needs no loop over data."""
    experts = weight_in.shape[1]
    hot = functional.one_hot(chosen.clamp(min=0), experts).to(x.dtype) * (gates * (chosen >= 0))[..., None]
    inner = torch.einsum("tbd,tedf->tebf", x, weight_in) + bias[:, :, None]
    if activation == "gelu":
        hidden = functional.gelu(inner)
    else:
        gate, up = inner.chunk(2, dim=-1)
        hidden = functional.silu(gate) * up
    return onto + torch.einsum("tebh,tehd,tbe->tbd", hidden, weight_out, hot.sum(2))


def routed_experts_quantized(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor,
    onto: Tensor,
    activation: str,
) -> Tensor:
    """The same with weights that are widened first."""
    wide_in, wide_out = weight_in.to(x.dtype) * scale_in[:, :, None], weight_out.to(x.dtype) * scale_out[:, :, None]
    return routed_experts(x, wide_in, wide_out, chosen, gates, bias, onto, activation)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The chosen rows are gathered, and PyTorch's fused attention reads them under a mask."""
    heads, length, key_heads = q.shape[1], q.shape[2], k.shape[1]
    blocks, kept = index.shape[2:]
    size = -(-length // blocks)
    place = index.long().expand(-1, heads, -1, -1) if index.shape[1] == 1 else index.long().repeat_interleave(heads // index.shape[1], 1)
    counts = valid.expand(-1, heads, -1, -1) if valid.shape[1] == 1 else valid.repeat_interleave(heads // valid.shape[1], 1)
    flat = place.flatten(2)[..., None]
    keys, values = (
        x.repeat_interleave(heads // key_heads, 1).gather(2, flat.expand(-1, -1, -1, x.shape[3])).unflatten(2, (blocks, kept))
        for x in (k, v)
    )
    queries = functional.pad(q, (0, 0, 0, blocks * size - length)).unflatten(2, (blocks, size))
    seen = counts[:, :, :, None].expand(-1, -1, -1, size, -1)
    if last is not None:
        bound = functional.pad(last, (0, blocks * size - length), value=-1).view(blocks, size, 1)
        seen = seen & (place[:, :, :, None] <= bound)
    none = ~seen.any(-1, keepdim=True)
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen | none, scale=scale)
    return attended.masked_fill(none, 0.0).flatten(2, 3)[:, :, :length]


def paged_scores(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather, then multiply."""
    row = torch.arange(len(q)).repeat_interleave(offsets.diff(), output_size=len(slots))
    keys = pages[slots.clamp(min=0)]
    scores = torch.einsum("sgqe,sge->gqs", q[row].unflatten(1, (pages.shape[1], -1)), keys).flatten(0, 1)
    return scores.masked_fill(slots < 0, -torch.inf).to(dtype)


RIVALS: Mapping[str, Mapping[str, Rival]] = {
    "rms_norm": {"eager": rms_norm},
    "square_sums": {"eager": square_sums.square_sums},
    "token_swiglu": {"eager": token_swiglu},
    "log_sinkhorn": {"eager": sinkhorn.sinkhorn},
    "jagged_attention": {"eager": jagged_attention},
    "fsq": {"eager": fsq.fsq},
    "routed_experts": {"eager": routed_experts},
    "routed_experts_quantized": {"eager": routed_experts_quantized},
    "selected_attention": {"eager": selected_attention},
    "paged_scores": {"eager": paged_scores},
    "catalogue_log_partition": {"eager": catalogue_loss},
    "constrained_step": {"eager": constrained_step},
    "gather_topk": {"eager": gather_topk},
    "int8_pooling": {"eager": int8_pooling, "fbgemm": fbgemm_pooling},
}
