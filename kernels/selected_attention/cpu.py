# SPDX-License-Identifier: Apache-2.0
"""Selected attention on the CPU: some blocks' rows are gathered, then PyTorch's fused attention for the CPU runs over them.

A bounded number of elements is gathered at a time, and no more ever exists: the backward pass gathers again, with one log-sum-exp for
each query, where autograd would keep all gathered rows. Rows are read where they lie, so that a transposed cache of keys is not copied.
Devices without the fused operation, for what the Triton kernels do not take, form the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.selected_attention.shape import Layout

_ELEMENTS = 1 << 22  # of gathered rows and of masks at a time, for each thread


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``[B, H, T, e_v]``, and the log-sum-exp ``[B, H, T]`` of the scores, +∞ for a query that reads nothing.

    Raises:
        RuntimeError: on the CPU, an entry that counts names no key.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if not _any_pair(q, k, index, valid):
        return q.new_zeros(*q.shape[:3], v.shape[3]), torch.full(q.shape[:3], torch.inf, dtype=wide, device=q.device)
    layout = Layout.of(q, k, index)
    folded = layout.fold(q)
    y = folded.new_empty(*folded.shape[:3], v.shape[3])
    lse = folded.new_empty(folded.shape[:3], dtype=wide)
    tables = _table(k), _table(v)
    for part in _parts(layout, k, v, index, valid, last):
        keys, values = (table.take(part) for table in tables)
        y[part.units], lse[part.units] = _attend(folded[part.units], keys, values, part.seen, scale)
    return layout.unfold(y), layout.unfold(lse[..., None])[..., 0]


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of a key are summed over the blocks that read it, in order and in float32."""
    wide = lse.dtype
    if not _any_pair(q, k, index, valid):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    layout = Layout.of(q, k, index)
    q_f, dy_f, y_f, lse_f = (layout.fold(x) for x in (q, dy, y, lse[..., None]))
    dq = torch.empty_like(q_f)
    dk, dv = (torch.zeros(x.shape[:3].numel(), x.shape[3], dtype=wide, device=x.device) for x in (k, v))
    tables = _table(k), _table(v)
    for part in _parts(layout, k, v, index, valid, last):
        keys, values = (table.take(part) for table in tables)
        given = (q_f[part.units], keys, values, part.seen, scale)
        dq[part.units], dkeys, dvalues = _attend_backward(
            dy_f[part.units], y_f[part.units], lse_f[part.units][..., 0], *given
        )  # fmt: skip
        rows = part.rows(k.shape[1] * k.shape[2], k.shape[2], 1)
        _add_rows(dk, rows, dkeys)
        _add_rows(dv, rows, dvalues)
    return layout.unfold(dq), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


def _any_pair(q: Tensor, k: Tensor, index: Tensor, valid: Tensor) -> bool:
    """Whether there is anything to compute.

    Raises:
        RuntimeError: on the CPU, an entry that counts names no key.
    """
    if not q.numel() or not index.numel():
        return False
    if index.device.type == "cpu":
        places = index if bool(valid.all()) else index[valid]
        if places.numel():
            low, high = (int(x) for x in places.aminmax())
            if low < 0 or high >= k.shape[2]:
                raise RuntimeError(f"index: expected places from 0 to {k.shape[2] - 1} where valid, got {low} to {high}")
    return k.shape[2] > 0


@dataclass(frozen=True)
class _Part:
    """Some units of a layout.

    Attributes:
        units: which of the B P.
        owner: int64 ``[c, 1, 1]``, the batch row of each.
        index: int64 ``[c, 1 or H_kv, K]``, places that may be gathered.
        seen: bool ``[c, 1 or H_kv, 1 or ceil(T / Q), K]``, the same for all heads of a unit; None where all may be read.
        heads: int64 ``[1, H_kv, 1]``, the key heads.
    """

    units: slice
    owner: Tensor
    index: Tensor
    seen: Tensor | None
    heads: Tensor

    def rows(self, per_batch: int, per_head: int, per_key: int) -> Tensor:
        """int64 ``[c, H_kv, K]``: where the keys lie among rows, given the distances between rows, heads and keys."""
        return self.owner * per_batch + self.heads * per_head + self.index * per_key


class _Table(NamedTuple):
    """``[B, H_kv, N, e]`` as rows, wherever they lie, and the distances between batch rows, heads and keys, in rows."""

    values: Tensor
    distances: tuple[int, int, int]

    def take(self, part: _Part) -> Tensor:
        """``[c, H_kv, K, e]``."""
        rows = part.rows(*self.distances)
        return self.values.index_select(0, rows.flatten()).view(*rows.shape, -1)


def _table(x_bhne: Tensor) -> _Table:
    width = x_bhne.shape[3]
    if (x_bhne.stride(3) != 1 and width > 1) or any(stride % width for stride in x_bhne.stride()[:3]):
        x_bhne = x_bhne.contiguous()
    distances = [stride // width for stride in x_bhne.stride()[:3]]
    count = 1 + sum((size - 1) * distance for size, distance in zip(x_bhne.shape[:3], distances, strict=True))
    return _Table(x_bhne.as_strided((count, width), (width, 1)), (distances[0], distances[1], distances[2]))


def _parts(layout: Layout, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None) -> Iterator[_Part]:
    """All units, as many at a time as their gathered rows and masks allow."""
    index_cgk, valid_cgk = layout.fold_choice(index), layout.fold_choice(valid)
    whole = bool(valid.all())
    last_pt = None if last is None else layout.fold_last(last.to(index.dtype))
    one = index.shape[3] * (k.shape[1] * (k.shape[3] + v.shape[3]) + (0 if last is None else index_cgk.shape[1] * layout.rows))
    step = max(1, _ELEMENTS * torch.get_num_threads() // one)
    heads = torch.arange(k.shape[1], device=k.device)[None, :, None]
    for start in range(0, len(index_cgk), step):
        units = slice(start, min(start + step, len(index_cgk)))
        number = torch.arange(units.start, units.stop, device=k.device)
        places, counts = index_cgk[units], valid_cgk[units]
        seen = None if whole else counts[:, :, None]
        if last_pt is not None:
            up_to = places[:, :, None] <= last_pt[number % layout.units][:, None, :, None]
            seen = up_to if seen is None else up_to.logical_and_(seen)
            seen = None if bool(seen.all()) else seen
        places = places if whole else places.masked_fill(~counts, 0)
        yield _Part(units, (number // layout.units)[:, None, None], places.long(), seen, heads)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``[c, h, R, e]`` to ``[c, h, K, e]`` → ``[c, h, R, e_v]`` and the log-sum-exp ``[c, h, R]``."""
    if q.device.type == "cpu":
        mask, (q, k, padded) = _mask(seen, q), _as_wide(q, k, v)
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, padded, 0.0, False, attn_mask=mask, scale=scale)
        y = y[..., : v.shape[3]]
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = _scores(q, k, seen, scale)
        lse = scores.logsumexp(-1)
        y = (scores.sub_(lse[..., None]).exp_() @ v.to(wide)).to(q.dtype)
    if seen is not None:
        nothing = _for_rows(~seen.any(-1, keepdim=True), q.shape[2])[..., 0]
        y, lse = y.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, torch.inf)
    return y, lse


def _attend_backward(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `_attend`.

    With weights A and dA = dY Vᵀ: dV = Aᵀ dY, dS = A ⊙ (dA − Σ_j A dA), where Σ_j A dA = Σ dY Y; dQ = s dS K, dK = s dSᵀ Q.
    """
    if q.device.type == "cpu":
        widths = q.shape[3], v.shape[3]
        mask, (q, k, v), (dy, y) = _mask(seen, q), _as_wide(q, k, v), _as_wide(dy, y, at_least=widths[0])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, False, attn_mask=mask, scale=scale
        )
        return dq[..., : widths[0]], dk[..., : widths[0]], dv[..., : widths[1]]
    weights = _scores(q, k, seen, scale).sub_(lse[..., None]).exp_()
    dy, y, q_wide, k, v = (x.to(lse.dtype) for x in (dy, y, q, k, v))
    dscores = (dy @ v.mT).sub_((dy * y).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    return (dscores @ k).to(q.dtype), dscores.mT @ q_wide, weights.mT @ dy


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * scale) @ k.to(wide).mT
    return scores if seen is None else scores.masked_fill_(~_for_rows(seen, q.shape[2]), -torch.inf)


def _mask(seen: Tensor | None, q: Tensor) -> Tensor | None:
    """What the fused attention adds to scores."""
    if seen is None:
        return None
    return _for_rows(torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf), q.shape[2])


def _for_rows(x: Tensor, rows: int) -> Tensor:
    """``[c, g, 1, K]`` as it is, ``[c, g, size, K]`` once for each head of a unit of R = ``rows``."""
    return x if x.shape[2] in (1, rows) else x.repeat(1, 1, rows // x.shape[2], 1)


def _as_wide(*tensors: Tensor, at_least: int = 0) -> list[Tensor]:
    """With columns of zeros up to the widest: the fused attention wants keys and values of one width."""
    width = max(at_least, *(x.shape[-1] for x in tensors))
    return [functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


def _add_rows(total: Tensor, rows: Tensor, added: Tensor) -> None:
    """``total[rows] += added``, in order on the CPU, and on a GPU by a sort: both give the same every time."""
    added = added.to(total.dtype).reshape(-1, total.shape[1])
    if total.device.type == "cpu":
        total.index_add_(0, rows.flatten(), added)
    else:
        total.index_put_((rows.flatten(),), added, accumulate=True)
