# SPDX-License-Identifier: Apache-2.0
"""Jagged attention on the CPU: rows of like length padded together, blocks of queries, and no weights kept for the backward pass.

A block of queries multiplies only with the keys up to the last one it can see, so half of a long causal row is never computed. Per token
and head one log-sum-exp is kept, where autograd would keep three matrices of the row's length squared; the SiLU form keeps nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.jagged_attention.reference import distance, visible

_PAIRS = 1 << 21  # scores that are held at a time, over rows, heads, queries and keys
_QUERIES = 256  # of a block
_ALIKE = 0.75  # rows that are padded together have at least so much of the longest one's length


@dataclass(frozen=True)
class Rule:
    """How tokens attend; see `kernels.jagged_attention.reference.jagged_attention`."""

    form: str
    mask: str
    group: int
    divisor: float
    seen: Tensor | None


def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """``[S, H, e]`` each → ``[S, H, e]``, and the log-sum-exp ``[H, S]`` of the scores in float32, ``[0]`` for the SiLU form."""
    wide = torch.promote_types(q.dtype, torch.float32)
    softmax = rule.form == "softmax"
    y = torch.zeros_like(q)
    lse = torch.zeros((q.shape[1], q.shape[0]) if softmax else 0, dtype=wide, device=q.device)
    for rows in _alike(offsets, q.shape[1]):
        q_rhle, k_rhle, v_rhle = (rows.take(x, wide) for x in (q, k, v))
        y_rhle = torch.empty_like(q_rhle)
        lse_rhl = y_rhle.new_empty(q_rhle.shape[:3])
        for block, scores, hidden in _blocks(q_rhle, k_rhle, rows, bias, rule):
            if softmax:
                scores.masked_fill_(hidden, -torch.inf)
                lse_rhl[:, :, block] = scores.logsumexp(3)
                weights = scores.sub_(lse_rhl[:, :, block, None]).exp_()
            else:
                weights = functional.silu(scores, inplace=True).div_(rule.divisor).masked_fill_(hidden, 0.0)
            torch.matmul(weights, v_rhle[:, :, : weights.shape[3]], out=y_rhle[:, :, block])
        y[rows.tokens] = rows.put(y_rhle).to(q.dtype)
        if softmax:
            lse[:, rows.tokens] = rows.put(lse_rhl).T
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, _: Tensor | None, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v ``[S, H, e]`` and of the bias ``[H or 1, D]`` (``[0]`` without one).

    With weights A and dA = dY Vᵀ: dV = Aᵀ dY; dS = A ⊙ (dA − Σ_j A dA) for softmax and dA · σ(S)(1 + S(1 − σ(S))) / N for SiLU;
    dQ = dS K / √e, dK = dSᵀ Q / √e, and the bias gets the sums of dS by distance.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    dbias_hd = torch.zeros(q.shape[1], 0 if bias is None else bias.shape[1], dtype=wide, device=q.device)
    for rows in _alike(offsets, q.shape[1]):
        q_rhle, k_rhle, v_rhle, dy_rhle = (rows.take(x, wide) for x in (q, k, v, dy))
        dq_rhle = torch.empty_like(q_rhle)
        dk_rhle, dv_rhle = torch.zeros_like(k_rhle), torch.zeros_like(v_rhle)
        lse_rhl = rows.take(lse.T, wide, torch.inf) if rule.form == "softmax" else None
        for block, scores, hidden in _blocks(q_rhle, k_rhle, rows, bias, rule):
            keys = slice(0, scores.shape[3])
            dweights = dy_rhle[:, :, block] @ v_rhle[:, :, keys].mT
            if lse_rhl is not None:
                weights = scores.masked_fill_(hidden, -torch.inf).sub_(lse_rhl[:, :, block, None]).exp_()
                inner = torch.linalg.vecdot(weights, dweights)
                dscores = dweights.sub_(inner[..., None]).mul_(weights)
            else:
                gate = scores.sigmoid()
                weights = (scores * gate).div_(rule.divisor).masked_fill_(hidden, 0.0)
                slope = scores.mul_(1 - gate).add_(1).mul_(gate).div_(rule.divisor)
                dscores = dweights.mul_(slope).masked_fill_(hidden, 0.0)
            dv_rhle[:, :, keys] += weights.mT @ dy_rhle[:, :, block]
            dk_rhle[:, :, keys] += dscores.mT @ q_rhle[:, :, block]
            torch.matmul(dscores, k_rhle[:, :, keys], out=dq_rhle[:, :, block])
            if bias is not None:
                places = torch.arange(rows.length, device=q.device)
                back = distance(places[block], places[keys], bias.shape[1])
                dbias_hd.index_add_(1, back.flatten(), dscores.sum(0).flatten(1))
        scale = 1 / math.sqrt(q.shape[2])
        for gradient, found in ((dq, dq_rhle.mul_(scale)), (dk, dk_rhle.mul_(scale)), (dv, dv_rhle)):
            gradient[rows.tokens] = rows.put(found).to(q.dtype)
    if bias is None:
        return dq, dk, dv, q.new_zeros(0)
    return dq, dk, dv, (dbias_hd if len(bias) > 1 else dbias_hd.sum(0, keepdim=True)).to(bias.dtype)


@dataclass(frozen=True)
class _Rows:
    """Rows of like length, padded to the longest of them.

    Attributes:
        places: int64 ``[R, L]``, where each token lies among all S.
        inside: bool ``[R, L]``: whether there is one.
    """

    places: Tensor
    inside: Tensor

    @property
    def length(self) -> int:
        return self.places.shape[1]

    @property
    def tokens(self) -> Tensor:
        """int64, where the tokens of these rows lie."""
        return self.places[self.inside]

    def take(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """``[S, H, …]`` → ``[R, H, L, …]``, with ``fill`` where there is no token."""
        outside = ~self.inside.view(*self.inside.shape, *[1] * (x.dim() - 1))
        return x[self.places].to(dtype).masked_fill_(outside, fill).transpose(1, 2).contiguous()

    def put(self, x: Tensor) -> Tensor:
        """``[R, H, L, …]`` → ``[tokens, H, …]``."""
        return x.transpose(1, 2)[self.inside]


def _alike(offsets: Tensor, heads: int) -> Iterator[_Rows]:
    """All rows that are not empty, the longest first."""
    lengths = offsets.diff().tolist()
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    while order:
        longest = lengths[order[0]]
        most = max(1, _PAIRS // (heads * longest * min(longest, _QUERIES)))
        count = sum(lengths[row] >= _ALIKE * longest for row in order[:most])
        chosen = torch.tensor(order[:count], device=offsets.device)
        order = order[count:]
        place = torch.arange(longest, device=offsets.device)
        inside = place < offsets.diff()[chosen, None]
        yield _Rows((offsets[chosen, None] + place).where(inside, offsets[chosen, None]), inside)


def _blocks(q_rhle: Tensor, k_rhle: Tensor, rows: _Rows, bias: Tensor | None, rule: Rule) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of queries: which, their scores ``[R, H, I, J]`` with the first J keys, and what is hidden, ``[R or 1, 1, I, J]``."""
    place = torch.arange(rows.length, device=q_rhle.device)
    scaled = q_rhle * (1 / math.sqrt(q_rhle.shape[3]))
    for start in range(0, rows.length, _QUERIES):
        block = slice(start, min(start + _QUERIES, rows.length))
        seen = block.stop if rule.mask != "grouped" else min(-(-block.stop // rule.group) * rule.group, rows.length)
        scores = scaled[:, :, block] @ k_rhle[:, :, :seen].mT
        if bias is not None:
            scores += bias.to(scores.dtype)[:, distance(place[block], place[:seen], bias.shape[1])]
        told = None if rule.seen is None else rule.seen[rows.places][:, block]
        hidden = ~visible(place[block], place[:seen], rule.mask, rule.group, told)
        hidden = hidden.view(-1, 1, *hidden.shape[-2:])
        if rule.mask == "grouped":
            hidden = hidden | ~rows.inside[:, None, None, :seen]
        yield block, scores, hidden
