# SPDX-License-Identifier: Apache-2.0
"""The most bytes of tensors that executed code holds at once, the same on every machine."""

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts while it is entered: the bytes of all tensors that operations returned and that still live, and those handed to `hold`.

    Views cost nothing. What a kernel needs inside is not seen. Tensors on the meta device count as if they had memory.

    Attributes:
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak: int = 0
        self._live = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors from now on until they are gone."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._live += size
                self.peak = max(self.peak, self._live)
                self._known[key] = weakref.ref(storage, partial(self._drop, key, size))

    def _drop(self, key: int, size: int, _: object) -> None:
        self._live -= size
        del self._known[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.hold(*(x for x in tree_leaves(found) if isinstance(x, Tensor)))
        return found


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention that holds all scores and all weights, as a model does whose kernel is not fused; nothing more than these."""
    scores = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
    scores.masked_fill_(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    return scores.softmax(-1) @ v


def eager_peak(heads: int, length: int, width: int) -> int:
    """The peak of `eager_attention` in single precision with its inputs, executed on the meta device."""
    q, k, v = (torch.empty(1, heads, length, width, device="meta") for _ in range(3))
    held = PeakBytes()
    with held:
        held.hold(q, k, v)
        eager_attention(q, k, v)
    return held.peak
