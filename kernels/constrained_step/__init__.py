# SPDX-License-Identifier: Apache-2.0
"""One step of beam search over a trie as the torch.library op ``recsys::constrained_step``, with a fake implementation, no gradient."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels import backend
from kernels.constrained_step import reference
from kernels.constrained_step.reference import Given, Step, empty_step
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work

MOST_CHILDREN = 1 << 32  # what half a key can number

# Users, beams, codes, nodes, width, children of a beam (0: all), whether renormalised. All of the width is found: the comparison takes
# no infinity, so that beams that are none are left to tests of their own.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1, 1, 0, 0),
    (2, 3, 5, 7, 3, 0, 0),
    (1, 4, 63, 20, 3, 2, 1),
    (2, 2, 100, 5, 4, 5, 0),
    (1, 2, 300, 3, 63, 0, 1),
    (1, 8, 9, 25, 8, 3, 1),
    (0, 3, 4, 5, 2, 0, 0),
)


def constrained_step(
    log_probs: Tensor,
    nodes: Tensor,
    scores: Tensor,
    first_child: Tensor,
    code_of: Tensor,
    alive: Tensor | None,
    closed_offsets: Tensor | None,
    closed: Tensor | None,
    width: int,
    children: int | None = None,
    renormalise: bool = False,
) -> Step:
    """The best children of each user's beams: a beam's score, and the log-probability of the code that leads to the child.

    Of one user, beams that live stand at different nodes. Scores are computed in float32 (float64 where one of the two is), NaN comes
    first, and of equal scores the smaller node.

    Args:
        log_probs: floating ``[B, W, V]``: of the next codes after each beam. Where beams share them, W may have the stride 0.
        nodes: int64 ``[B, W]``: where beams stand. They are checked on the CPU, and not on a GPU, which would have to wait.
        scores: floating ``[B, W]``: -inf for a beam that is none.
        first_child: int64 ``[N + 1]``: node j has the children ``first_child[j]`` to ``first_child[j + 1]``.
        code_of: int64 ``[M]``: the code that leads to each child, 0 to V - 1. M is at most 2^32.
        alive: bool ``[M]``: the children that may be taken; None for all.
        closed_offsets: int64 ``[B + 1]``: user b may not take ``closed[offsets[b] : offsets[b + 1]]``; None for no such children.
        closed: int64 ``[C]``: children, ascending within each user.
        width: how many come back, at least 1.
        children: of a beam, at most so many; None for all.
        renormalise: whether the logarithm of the probability that falls on a beam's children is taken off each of theirs. Children that
            may not be taken count.

    Returns:
        A `Step`: nodes, scores in the dtype of ``scores`` and parents, ``[B, width]`` each, and ``cut [B]``.

    Raises:
        ValueError: an argument has another dtype or shape.
        RuntimeError: in C++ on the CPU, a live beam stands at no node, or one of its children has a code beyond V.
    """
    given = Given(log_probs, nodes, scores, first_child, code_of, alive, closed_offsets, closed)
    _check(given)
    if width < 1 or (children is not None and children < 1):
        raise ValueError(f"width, children: expected at least 1, got {width} and {children}")
    return Step(*_forward(*given, width, children, renormalise))


def _check(given: Given) -> None:
    """Hold that dtypes and shapes fit each other.

    Raises:
        ValueError: one does not.
    """
    if given.log_probs.ndim != 3 or not given.log_probs.is_floating_point():
        raise ValueError(f"log_probs: expected floating-point [B, W, V], got {_told(given.log_probs)}")
    for name, one in (("first_child", given.first_child), ("code_of", given.code_of)):
        if one.ndim != 1 or one.dtype != torch.int64 or (name == "first_child" and not len(one)):
            raise ValueError(f"{name}: expected torch.int64 of one axis, first_child not empty, got {_told(one)}")
    if len(given.code_of) > MOST_CHILDREN:
        raise ValueError(f"code_of: expected at most {MOST_CHILDREN} children, got {len(given.code_of)}")
    beams, size = tuple(given.log_probs.shape[:2]), (len(given.code_of),)
    if tuple(given.nodes.shape) != beams or given.nodes.dtype != torch.int64:
        raise ValueError(f"nodes: expected torch.int64 {beams}, as there are log_probs, got {_told(given.nodes)}")
    if tuple(given.scores.shape) != beams or not given.scores.is_floating_point():
        raise ValueError(f"scores: expected floating-point {beams}, as there are log_probs, got {_told(given.scores)}")
    if given.alive is not None and (tuple(given.alive.shape) != size or given.alive.dtype != torch.bool):
        raise ValueError(f"alive: expected torch.bool {size}, as there are children, got {_told(given.alive)}")
    if (given.closed is None) != (given.closed_offsets is None):
        raise ValueError("closed, closed_offsets: expected both or neither")
    if given.closed is not None and given.closed_offsets is not None:
        if tuple(given.closed_offsets.shape) != (beams[0] + 1,) or given.closed_offsets.dtype != torch.int64:
            raise ValueError(f"closed_offsets: expected torch.int64 {(beams[0] + 1,)}, got {_told(given.closed_offsets)}")
        if given.closed.ndim != 1 or given.closed.dtype != torch.int64:
            raise ValueError(f"closed: expected torch.int64 of one axis, got {_told(given.closed)}")


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


@define("recsys::constrained_step")
def _forward(
    log_probs: Tensor,
    nodes: Tensor,
    scores: Tensor,
    first_child: Tensor,
    code_of: Tensor,
    alive: Tensor | None,
    closed_offsets: Tensor | None,
    closed: Tensor | None,
    width: int,
    children: int | None = None,
    renormalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = Given(log_probs, nodes, scores, first_child, code_of, alive, closed_offsets, closed)
    module = backend.implementation("constrained_step", log_probs, scores, width)
    if module is None:
        return reference.constrained_step(*given, width, children, renormalise)
    return cast(Step, module.forward(given, width, children, renormalise))


@_forward.register_fake
def _(
    log_probs: Tensor,
    nodes: Tensor,
    scores: Tensor,
    first_child: Tensor,
    code_of: Tensor,
    alive: Tensor | None,
    closed_offsets: Tensor | None,
    closed: Tensor | None,
    width: int,
    children: int | None = None,
    renormalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_step(nodes, scores, width)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor | int | bool | None, ...]:
    """A level whose nodes have one to all of the codes; quarters, exact in every dtype, so that ties are many; every mask.

    The first beam lives, and the first child of each node is open.
    """
    users, beams, codes, nodes, width, children, renormalise = shape

    def quarters(*sizes: int) -> Tensor:
        return torch.randint(-32, 1, sizes, generator=generator).div(4).to(dtype)

    def some(share: Tensor | float, *sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator) < share

    log_probs, scores = quarters(users, beams, codes), quarters(users, beams)
    log_probs[..., 1:].masked_fill_(some(0.05, users, beams, codes - 1), -torch.inf)
    scores[:, 1:].masked_fill_(some(0.1, users, beams - 1), -torch.inf)
    places = torch.rand(users, nodes, generator=generator).argsort(1)[:, :beams]
    has_code = some(torch.rand(nodes, 1, generator=generator), nodes, codes)
    has_code[:, 0] = True
    first_child = torch.cat((torch.zeros(1, dtype=torch.int64), has_code.sum(1).cumsum(0)))
    code_of = has_code.nonzero()[:, 1]
    alive = some(0.8, len(code_of)) | (code_of == 0)
    user, closed = (some(0.1, users, len(code_of)) & (code_of > 0)).nonzero(as_tuple=True)
    offsets = torch.searchsorted(user, torch.arange(users + 1))
    return log_probs, places, scores, first_child, code_of, alive, offsets, closed, width, children or None, bool(renormalise)


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.constrained_step import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """A node has half of the codes. Of each child its code, whether it is alive and its log-probability; beams in and out."""
    users, beams, codes, nodes, width, _, renormalise = shape
    found = users * beams * codes // 2
    read = found * dtype.itemsize + min(found, nodes * codes // 2) * 9 + users * beams * (24 + dtype.itemsize)
    return Work(flops=found * (4 if renormalise else 1), read=read, written=users * (width * (16 + dtype.itemsize) + 1))


OP = Op("constrained_step", constrained_step, reference.constrained_step, _inputs, SHAPES, small=None, work=_work, specs=_specs)
