# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a computation, recorded once and run alone: the time that no implementation of the same model can avoid."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.baddbmm.default: (1, 2),
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
            left, right = _PRODUCTS[func]
            self.found.append((Operand.of(args[left]), Operand.of(args[right])))
        return func(*args, **(kwargs or {}))


class Products:
    """The matrix products that ``work`` makes, forward and backward, with operands of the same shapes, strides and dtypes.

    Biases that a product adds are left out. Operands that look alike share memory, which favours the products.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        with _Recorder() as recorder:
            work()
        with FlopCounterMode(display=False) as counter:
            work()
        self.flops = counter.get_total_flops()
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
