# SPDX-License-Identifier: Apache-2.0
"""What executed code costs: multiply-adds and gathered bytes, the same in every run of the same kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import paged_scores, selected_attention

_GATHERS = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
    torch.ops.aten.embedding.default,
    torch.ops.aten.take_along_dim.default,
}


def _attention_bytes(q: Tensor, k: Tensor, v: Tensor, index: Tensor, *_: Any) -> int:
    return selected_attention.gathered_elements(q.shape, k.shape, v.shape, index.shape) * k.element_size()


def _paged_bytes(q: Tensor, pages: Tensor, slots: Tensor, *_: Any) -> int:
    return paged_scores.gathered_elements(pages.shape, slots.shape) * pages.element_size()


_READ_BY_INDEX: dict[Any, Callable[..., int]] = {  # ops that gather inside, and the bytes of it
    torch.ops.recsys.selected_attention.default: _attention_bytes,
    torch.ops.recsys.selected_attention_backward.default: lambda dy, *rest: _attention_bytes(*rest),
    torch.ops.recsys.paged_scores.default: _paged_bytes,
}


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    """Two products over the pairs of query and key that are read: all of them, or those on and below the diagonal."""
    batch, heads, length, width = q
    pairs = length * (length + 1) // 2 if causal else length * k[2]
    return 2 * batch * heads * pairs * (width + v[3])


def _backward_flops(gradient: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **_: Any) -> int:
    """Five products over the same pairs: the scores again, and the gradients of values, weights, queries and keys."""
    batch, heads, length, width = q
    causal = bool(rest[3]) if len(rest) > 3 else False
    pairs = length * (length + 1) // 2 if causal else length * k[2]
    return 2 * batch * heads * pairs * (3 * width + 2 * v[3])


_CPU_ATTENTION = {  # which PyTorch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


class Cost:
    """Counts while it is entered: ``with Cost() as cost: model(x)``, then ``cost.macs`` and ``cost.gathered_bytes``.

    Attributes:
        macs: multiply-adds of matrix products, convolutions and fused attention, by PyTorch's counter. A causal attention counts the pairs
            on and below the diagonal where PyTorch takes its fused kernel for the CPU, one with a mask, or unfused, all pairs.
        gathered_bytes: bytes of the results of gathers: what was copied together, or read by an op, from rows that were chosen by index.
        calls: how often a module that was handed to `watch` was called.
    """

    def __init__(self) -> None:
        self._flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        self._gathers = _Gathers()
        self.calls = 0

    def __enter__(self) -> "Cost":
        self._flops.__enter__()
        self._gathers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._gathers.__exit__(*error)
        self._flops.__exit__(*error)

    @property
    def macs(self) -> int:
        """Multiply-adds so far."""
        return int(self._flops.get_total_flops()) // 2

    @property
    def gathered_bytes(self) -> int:
        """Bytes gathered so far."""
        return self._gathers.total

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same callable, whose calls are counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return call(*args, **kwargs)

        return counted


class _Gathers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _GATHERS and isinstance(found, Tensor):
            self.total += found.numel() * found.element_size()
        elif func in _READ_BY_INDEX:
            self.total += _READ_BY_INDEX[func](*args)
        return found
