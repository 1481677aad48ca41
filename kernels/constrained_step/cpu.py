# SPDX-License-Identifier: Apache-2.0
"""One step of beam search on the CPU: a loop in C++ over each user's own children; without a compiler, padded gathers in torch."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.constrained_step import reference
from kernels.constrained_step.reference import Given, Step, empty_step

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LAST_NODE = (1 << 32) - 1
_WRONG = {
    1: "nodes: a beam stands at no node of first_child, or its children are not among those of code_of",
    2: "code_of: a child's code has no log-probability",
}


def available() -> bool:
    """Whether the loop in C++ can run on this machine; compiles it where it has not been."""
    return native.load(_SOURCE) is not None


def forward(given: Given, width: int, children: int | None, renormalise: bool) -> Step:
    """See `kernels.constrained_step.constrained_step`. Float64 takes the reference.

    Raises:
        RuntimeError: a live beam stands at no node, or a child's code has no log-probability.
    """
    if torch.float64 in (given.log_probs.dtype, given.scores.dtype):
        return reference.constrained_step(*given, width, children, renormalise)
    return (looped if available() else padded)(given, width, children, renormalise)


def looped(given: Given, width: int, children: int | None, renormalise: bool) -> Step:
    """As `forward`, in C++; only where `available`."""
    library = native.load(_SOURCE)
    assert library is not None
    values = given.log_probs.float()
    values = values if values.stride(2) == 1 else values.contiguous()  # users and beams may share rows
    scores = given.scores.float().contiguous()
    nodes, first_child, code_of = (one.contiguous() for one in (given.nodes, given.first_child, given.code_of))
    masks = [None if one is None else one.contiguous() for one in (given.alive, given.closed_offsets, given.closed)]
    users, beams = nodes.shape
    found = empty_step(nodes, scores, width)
    status = library.constrained_step(
        _pointer(values), *map(ctypes.c_int64, (values.stride(0), values.stride(1), values.shape[2])),
        _pointer(nodes), _pointer(scores), ctypes.c_int64(users), ctypes.c_int64(beams),
        _pointer(first_child), ctypes.c_int64(len(first_child) - 1), _pointer(code_of), ctypes.c_int64(len(code_of)),
        *map(_pointer, masks), *map(ctypes.c_int64, (width, children or 0, int(renormalise), torch.get_num_threads())),
        *map(_pointer, found),
    )  # fmt: skip
    if status:
        raise RuntimeError(_WRONG[status])
    return found._replace(scores=found.scores.to(given.scores.dtype))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def padded(given: Given, width: int, children: int | None, renormalise: bool) -> Step:
    """As `forward`, with the children of all beams side by side, padded to as many as the largest node has."""
    found, child = reference.open_children(given, renormalise)
    open_bw = (found != -torch.inf).sum(2)
    if children is not None and children < found.shape[2]:
        place = _best(found, child, children)
        found, child = found.gather(2, place), child.gather(2, place)
    flat = found.flatten(1)
    place = _best(flat, child.flatten(1), width)
    return reference.step_of(flat.gather(1, place), place, child, open_bw, given.scores.dtype, width, children)


def _best(scores: Tensor, nodes: Tensor, count: int) -> Tensor:
    """The places of the ``count`` best of the last dimension, best first."""
    if count < scores.shape[-1]:
        best, place = scores.topk(count + 1)
        last, next_one = best[..., count - 1], best[..., count]
        if not bool((~(last > next_one) & (next_one != -torch.inf)).any()):  # else it is open which of equal ones are the last
            place = place[..., :count]
            return place.gather(-1, _keys(best[..., :count], nodes.gather(-1, place)).argsort(descending=True))
    return _keys(scores, nodes).topk(min(count, scores.shape[-1])).indices


def _keys(scores: Tensor, nodes: Tensor) -> Tensor:
    """int64: a better score is a larger key, NaN the largest, then a smaller node."""
    bits = scores.add(0.0).masked_fill_(scores.isnan(), torch.nan).view(torch.int32)  # -0.0 becomes 0.0, and NaN has one sign
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LAST_NODE - nodes)
