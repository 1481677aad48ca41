# SPDX-License-Identifier: Apache-2.0
"""Selected attention on the CPU by a loop in C++, which gathers each list once for all queries that read it; see ``cpu.cpp``."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.selected_attention.shape import Layout

_SOURCE = Path(__file__).with_name("cpu.cpp")
_DTYPES = (torch.float32, torch.bfloat16)
_FEW, _PART = 4, 256  # a list that at most so many queries read is divided into parts of so many keys, among threads


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether there is a query, a loop for its dtype and a compiler, and places of keys have 32 bits."""
    return q.numel() > 0 and q.dtype in _DTYPES and v.shape[2] < 1 << 31 and native.load(_SOURCE) is not None


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``[B, H, T, e_v]``, and the log-sum-exp ``[B, H, T]`` of the scores in float32, +∞ for a query that reads nothing.

    Raises:
        RuntimeError: an entry that counts names no key.
    """
    q, k, v = map(_rows, (q, k, v))
    parts = max(1, -(-index.shape[3] // _PART)) if Layout.of(q, k, index).rows <= _FEW else 1
    lse = q.new_empty(parts, *q.shape[:3], dtype=torch.float32)
    y = lse.new_empty(*lse.shape, v.shape[3])
    given = (q, k, v, *_choice(k, index, valid, last, q.shape[2]), _sizes(q, k, v, q, index, parts))
    if native.call(_SOURCE, "selected_attention", *given, scale, y, lse):
        raise _misplaced(k, index, valid)
    y, lse = _merged(y, lse) if parts > 1 else (y[0], lse[0])
    return y.to(q.dtype), lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, _: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of a key are summed over the blocks that read it, in order and in float32.

    Raises:
        RuntimeError: an entry that counts names no key.
    """
    dy, q, k, v = map(_rows, (dy, q, k, v))
    dq, dk, dv = (lse.new_empty(x.shape) for x in (q, k, v))
    given = (q, k, v, *_choice(k, index, valid, last, q.shape[2]), _sizes(q, k, v, dy, index, 1))
    if native.call(_SOURCE, "selected_attention_backward", *given, scale, dy, lse.contiguous(), dq, dk, dv):
        raise _misplaced(k, index, valid)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _rows(x: Tensor) -> Tensor:
    """With the last axis together."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _choice(k: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """``index``, ``valid`` and ``last`` as the loop takes them: of 64, 8 and 32 bits, and always a bound."""
    keys = k.shape[2]
    bound = torch.full((queries,), keys, dtype=torch.int32, device=k.device) if last is None else last.clamp(-1, keys).to(torch.int32)
    return index.to(torch.int64).contiguous(), valid.contiguous(), bound.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, index: Tensor, parts: int) -> Tensor:
    """What `cpu.cpp` calls so: numbers, then how the rows of each tensor lie."""
    (batch, heads, queries, _), (key_heads, keys) = q.shape, k.shape[1:3]
    half = int(q.dtype == torch.bfloat16)
    sizes = [batch, heads, key_heads, queries, keys, *index.shape[1:], parts, torch.get_num_threads(), half]
    for x in (q, k, v, dy):
        sizes += [*x.stride()[:3], x.shape[3]]
    return torch.tensor(sizes, device=q.device)


def _misplaced(k: Tensor, index: Tensor, valid: Tensor) -> RuntimeError:
    low, high = (int(x) for x in index[valid].aminmax())
    return RuntimeError(f"index: expected places from 0 to {k.shape[2] - 1} where valid, got {low} to {high}")


def _merged(y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The results over parts of lists, ``[p, B, H, T, e_v]`` and ``[p, B, H, T]``, as one."""
    read = lse.masked_fill(lse == torch.inf, -torch.inf)
    whole = read.logsumexp(0)
    whole = whole.masked_fill(whole == -torch.inf, torch.inf)
    return (y * (read - whole).exp()[..., None]).sum(0), whole
