# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a computation, recorded once and run alone: the time that no implementation of the same model can avoid."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels.token_swiglu  # noqa: F401  registers its ops

Factors = list[tuple[Tensor, Tensor]]


def _of_token_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, *_: Any) -> Factors:
    """Two products for each token of ``x [B, T, D]`` or in parts ``[B, T, P, w]``."""
    hidden = x.new_empty(x.shape[1], x.shape[0], down.shape[1])
    return [(_rows(x), gate_up), (hidden, down)]


def _of_token_swiglu_backward(dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, *_: Any) -> Factors:
    """Two for each of both layers. That the inner layer is formed again where it is not kept is no product that a step needs."""
    hidden, dproduct = (x.new_empty(x.shape[1], x.shape[0], width) for width in (down.shape[1], gate_up.shape[2]))
    dy, x = _rows(dy), _rows(x)
    return [(dy, down.mT), (hidden.mT, dy), (dproduct, gate_up.mT), (x.mT, dproduct)]


def _rows(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(2)


_PRODUCTS: dict[Any, Callable[..., Factors]] = {
    torch.ops.aten.mm.default: lambda a, b, *_: [(a, b)],
    torch.ops.aten.addmm.default: lambda _, a, b, *__: [(a, b)],
    torch.ops.aten.bmm.default: lambda a, b, *_: [(a, b)],
    torch.ops.aten.baddbmm.default: lambda _, a, b, *__: [(a, b)],
    torch.ops.recsys.token_swiglu.default: _of_token_swiglu,
    torch.ops.recsys.token_swiglu_backward.default: _of_token_swiglu_backward,
}


@dataclass(frozen=True)
class Operand:
    """One factor: shape, strides in elements, dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        """What ``tensor`` looks like."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def make(self) -> Tensor:
        """A random tensor that looks like it."""
        size = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return torch.randn(size).to(self.dtype).as_strided(self.shape, self.stride)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Operand, Operand]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.found += [(Operand.of(left), Operand.of(right)) for left, right in _PRODUCTS[func](*args)]
        return func(*args, **(kwargs or {}))


class Products:
    """The matrix products that ``work`` makes, forward and backward, with operands of the same shapes, strides and dtypes.

    Of ops of this package only per-token SwiGLU's are known.

    Attributes:
        flops: of the whole work, as PyTorch counts.
        covered: the share of them that is in the products.

    Biases that a product adds are left out. Operands that look alike share memory, which favours the products.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        with _Recorder() as recorder:
            work()
        with FlopCounterMode(display=False) as counter:
            work()
        self.flops = counter.get_total_flops()
        own = sum(2 * math.prod(left.shape) * right.shape[-1] for left, right in recorder.found)
        self.covered = own / max(self.flops, 1)
        tensors = {operand: operand.make() for pair in recorder.found for operand in pair}
        self._pairs = [(tensors[left], tensors[right]) for left, right in recorder.found]

    def __len__(self) -> int:
        return len(self._pairs)

    def run(self) -> None:
        """Run them once, in their order."""
        for left, right in self._pairs:
            torch.matmul(left, right)


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """The mean wall time of ``times`` calls."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times
