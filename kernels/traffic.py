# SPDX-License-Identifier: Apache-2.0
"""The bytes that the Triton kernels of an op move at a shape, launch by launch, counted from its own host code without a GPU.

The op runs, forward and backward, on CPU tensors with every launch noted and none made. A launch reads and writes each of its tensors once:
tiles of one launch that need the same bytes find them in the cache, for which they are ordered (an H100 has 50 MB of it, and what the
programs that run together share, such as one token's matrices or one row's keys, is smaller at every recipe's shape). So what exceeds
`kernels.op.Work` is what is written in between and read again, and what several launches read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels import backend
from kernels.op import Op, Shape, forward_backward


def moved(op: Op, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes read and written, forward and, where the op has a gradient, backward.

    Raises:
        RuntimeError: kernels are interpreted in this process, so that no launch can be noted.
    """
    inputs = op.inputs(shape, dtype, torch.Generator().manual_seed(0))
    upstreams: list[Tensor] = []

    def upstream(result: Tensor) -> Tensor:
        upstreams.append(torch.ones_like(result))
        return upstreams[-1]

    with _launches() as launches:
        results, gradients = forward_backward(op.call, inputs, upstream)
    read_in_part = {_place(inputs[i]): size for i, size in _GATHERED.get(op.name, lambda _: {})(inputs).items()}
    outer = {_place(x) for x in (*inputs, *results, *gradients, *upstreams) if isinstance(x, Tensor)}
    count: dict[int, tuple[int, int]] = {}
    for tensors in launches:
        for place, size in {_place(x): x.untyped_storage().nbytes() for x in tensors}.items():
            count[place] = (read_in_part.get(place, size), count.get(place, (0, 0))[1] + 1)
    return sum(size * (times if place in outer else max(times, 2)) for place, (size, times) in count.items())


@contextmanager
def _launches() -> Iterator[list[list[Tensor]]]:
    """The tensors of every launch inside the block; nothing is computed by one, and what it would have written is zeros."""
    from triton.runtime.jit import JITFunction

    launches: list[list[Tensor]] = []

    def note(_: Any, *arguments: Any, **named: Any) -> None:
        launches.append([x for x in (*arguments, *named.values()) if isinstance(x, Tensor)])

    if backend.interpreting():
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", note))
        stack.enter_context(mock.patch.object(backend, "implementation", lambda name, *_: import_module(f"kernels.{name}.triton_ops")))
        stack.enter_context(mock.patch.object(backend, "interpreting", lambda: True))  # so that ops keep what they do on a GPU
        for empty, zeros in (("empty", torch.zeros), ("empty_like", torch.zeros_like)):
            stack.enter_context(mock.patch.object(torch, empty, zeros))
        yield launches


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _selected(inputs: Sequence[Any]) -> dict[int, int]:
    """Keys and values: the rows that blocks choose, at most all."""
    k, index = inputs[1], inputs[3]
    chosen = min(k.shape[2], index.shape[3] * (index.shape[2] if inputs[5] is not None else 1))
    return {i: inputs[i].nbytes * chosen // k.shape[2] for i in (1, 2)}


def _paged(inputs: Sequence[Any]) -> dict[int, int]:
    """The pool: a key for each slot."""
    return {1: inputs[1][0].nbytes * len(inputs[2])}


def _stepped(inputs: Sequence[Any]) -> dict[int, int]:
    """Codes and liveness of the beams' children, at most all, of which a node has half of the codes; not what users must not see."""
    found = inputs[0].numel() // 2
    return {i: min(found, len(inputs[i])) * inputs[i].itemsize for i in (4, 5)} | {7: 0}


def _listed(_: Sequence[Any]) -> dict[int, int]:
    """Not what users must not see."""
    return {4: 0}


def _pooled(inputs: Sequence[Any]) -> dict[int, int]:
    """The table: a row for each value."""
    return {0: inputs[0][0].nbytes * len(inputs[1])}


_GATHERED: dict[str, Callable[[Sequence[Any]], dict[int, int]]] = {
    "selected_attention": _selected,
    "paged_scores": _paged,
    "constrained_step": _stepped,
    "gather_topk": _listed,
    "int8_pooling": _pooled,
}
"""Of inputs that are read in part, by position: how many bytes. Lists of what users must not see are as long as users make them."""
