# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""One step of beam search over a trie in Triton: two launches, no padded tensor, no sort of all candidates.

A program a beam goes over its children in tiles and keeps the best keys of them in registers (`running_topk`): as many as the beam may
have children, or as come back, or as there are codes, whichever is least. A program a user then takes the best of its beams' keys in the
same way. Deep in a trie most beams have a handful of children, so that a program a user for all of it would be a long chain of short
tiles. A tile is merged only where its best key is above the worst that is kept, which soon is seldom.

A key says the child and its score; the parent is the live beam whose children's range holds it. A row's result depends on its own
numbers alone. The sum of renormalisation is of float32, where the CPU's is of float64.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.constrained_step.reference import Given, Step, empty_step
from kernels.op import KernelSpec, Shape
from kernels.running_topk import NO_KEY, is_in, key_of, number_of, score_of, taken_in, warps_of

MAX_WIDTH = 1024
# Keys that a list has at least, and keys that are looked at at once at least: the interpreter is the quicker the fewer they are.
_LEAST, _TILE = (2, 16) if interpreting() else (16, 128)
_MOST_KEYS = 1 << 25  # of all beams at once; what is more goes in several launches
_BEAMS = tl.constexpr(16)  # beams that are looked at at once
_PAIRS = tl.constexpr(4096)  # of a child and a beam, of which one may be the other's parent


@triton.jit
def _log_sum(LOG, CODE_OF, first, end, stride, BLOCK: tl.constexpr):
    """The logarithm of the probability of the children from ``first`` to ``end``; 0 where it is not finite."""
    most = float("-inf")
    for start in range(first, end, BLOCK):
        child = start + tl.arange(0, BLOCK).to(tl.int64)
        code = tl.load(CODE_OF + child, mask=child < end, other=0)
        value = tl.load(LOG + code * stride, mask=child < end, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, tl.max(value))
    total = 0.0
    for start in range(first, end, BLOCK):
        child = start + tl.arange(0, BLOCK).to(tl.int64)
        code = tl.load(CODE_OF + child, mask=child < end, other=0)
        value = tl.load(LOG + code * stride, mask=child < end, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp(value - most))
    found = most + tl.log(tl.where(total == 0, 1.0, total))  # 0 where there are no children
    return tl.where(tl.abs(found) < float("inf"), found, 0.0)


@triton.jit
def beam_kernel(
    LOG, NODES, SCORES, FIRST_CHILD, CODE_OF, ALIVE, CLOSED_OFFSETS, CLOSED, KEYS, OPEN, W, limit, user_stride, beam_stride, code_stride,
    HAS_ALIVE: tl.constexpr, HAS_CLOSED: tl.constexpr, RENORMALISE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KEYS [B, W, K]: the ``limit`` best of a beam's children, best first, then `NO_KEY`; OPEN [B, W]: how many there could have been."""
    place = tl.program_id(0).to(tl.int64)
    user = place // W
    score = tl.load(SCORES + place).to(tl.float32)
    live = score > float("-inf")
    node = tl.load(NODES + place)
    first = tl.load(FIRST_CHILD + node, mask=live, other=0)
    end = tl.load(FIRST_CHILD + node + 1, mask=live, other=0)
    log = LOG + user * user_stride + (place - user * W) * beam_stride
    shift = 0.0
    if RENORMALISE:
        shift = _log_sum(log, CODE_OF, first, end, code_stride, BLOCK)
    best = tl.full((K,), NO_KEY, tl.int64)
    opened = 0
    for start in range(first, end, BLOCK):
        child = start + tl.arange(0, BLOCK).to(tl.int64)
        is_open = child < end
        code = tl.load(CODE_OF + child, mask=is_open, other=0)
        value = tl.load(log + code * code_stride, mask=is_open, other=float("-inf")).to(tl.float32)
        found = (value - shift) + score
        if HAS_ALIVE:
            is_open &= tl.load(ALIVE + child, mask=is_open, other=0) != 0
        if HAS_CLOSED:
            begin = tl.load(CLOSED_OFFSETS + user)
            stop = tl.load(CLOSED_OFFSETS + user + 1)
            if stop > begin:
                is_open &= is_in(CLOSED, begin, stop, child) == 0
        is_open &= found != float("-inf")
        opened += tl.sum(is_open.to(tl.int32))
        keys = tl.where(is_open, key_of(found, child), NO_KEY)
        if tl.max(keys) > tl.min(best):
            best = taken_in(best, keys, K, BLOCK)
    slots = tl.arange(0, K)
    tl.store(KEYS + place * K + slots, tl.where(slots < limit, best, NO_KEY))
    tl.store(OPEN + place, opened)


@triton.jit
def _parents(NODES, SCORES, FIRST_CHILD, child, W, K: tl.constexpr):
    """[K]: the live beam of which each child is one."""
    parent = tl.zeros((K,), tl.int64)
    for start in range(0, W, _PAIRS // K):
        beams = start + tl.arange(0, _PAIRS // K)
        live = tl.load(SCORES + beams, mask=beams < W, other=float("-inf")).to(tl.float32) > float("-inf")
        node = tl.load(NODES + beams, mask=live, other=0)
        first = tl.load(FIRST_CHILD + node, mask=live, other=0)
        end = tl.load(FIRST_CHILD + node + 1, mask=live, other=0)
        holds = (first[None, :] <= child[:, None]) & (child[:, None] < end[None, :])
        parent = tl.maximum(parent, tl.max(tl.where(holds, beams[None, :], 0), axis=1).to(tl.int64))
    return parent


@triton.jit
def user_kernel(
    KEYS, OPEN, NODES, SCORES, FIRST_CHILD, OUT_NODES, OUT_SCORES, OUT_PARENTS, OUT_CUT, W, keys_of_beam, width, children,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The outputs of one user, from its beams' keys. ``children`` is 2^31 - 1 where a beam may have any number."""
    user = tl.program_id(0).to(tl.int64)
    count = tl.cast(W, tl.int64) * keys_of_beam  # a W of 1 is a constant, and no tensor
    best = tl.full((K,), NO_KEY, tl.int64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        keys = tl.load(KEYS + user * count + at, mask=at < count, other=NO_KEY)
        if tl.max(keys) > tl.min(best):
            best = taken_in(best, keys, K, BLOCK)
    there = best != NO_KEY
    child = tl.where(there, number_of(best), -1)
    parent = _parents(NODES + user * W, SCORES + user * W, FIRST_CHILD, child, W, K)
    slots = tl.arange(0, K)
    out = user * width + slots
    tl.store(OUT_NODES + out, tl.where(there, child, 0), mask=slots < width)
    tl.store(OUT_SCORES + out, score_of(best).to(OUT_SCORES.dtype.element_ty), mask=slots < width)
    tl.store(OUT_PARENTS + out, parent, mask=slots < width)
    opened = tl.zeros((_BEAMS,), tl.int64)
    beyond = tl.zeros((_BEAMS,), tl.int32)
    for start in range(0, W, _BEAMS):
        beams = start + tl.arange(0, _BEAMS)
        own = tl.load(OPEN + user * W + beams, mask=beams < W, other=0)
        beyond |= (own > children).to(tl.int32)
        opened += tl.minimum(own, children)
    tl.store(OUT_CUT + user, (tl.max(beyond) > 0) | (tl.sum(opened) > width))


def supports(log_probs: Tensor, scores: Tensor, width: int) -> bool:
    """Whether a list fits a program's registers, and numbers are of at most 32 bits."""
    return width <= MAX_WIDTH and torch.float64 not in (log_probs.dtype, scores.dtype)


def forward(given: Given, width: int, children: int | None, renormalise: bool) -> Step:
    """As `kernels.constrained_step.native.forward`; nodes and codes are not looked through, which would wait for the GPU."""
    users, beams, codes = given.log_probs.shape
    nodes, scores, first_child, code_of = (
        one.contiguous() for one in (given.nodes, given.scores, given.first_child, given.code_of)
    )  # fmt: skip
    alive, offsets, closed = (None if one is None else one.contiguous() for one in (given.alive, given.closed_offsets, given.closed))
    found = empty_step(nodes, scores, width)
    limit = min(width, children or width)
    of_beam, of_user = _keys(limit, codes), _keys(width)
    strides = given.log_probs.stride()
    at_once = max(1, _MOST_KEYS // max(1, beams * of_beam))
    for start in range(0, users, at_once):
        part = slice(start, start + at_once)
        count = min(at_once, users - start)
        keys = nodes.new_empty(count, beams, of_beam)
        opened = nodes.new_empty(count, beams, dtype=torch.int32)
        if beams:
            beam_kernel[(count * beams,)](
                given.log_probs[part], nodes[part], scores[part], first_child, code_of, code_of if alive is None else alive,
                nodes if offsets is None else offsets[start:], nodes if closed is None else closed, keys, opened, beams, limit, *strides,
                HAS_ALIVE=alive is not None, HAS_CLOSED=closed is not None, RENORMALISE=renormalise, K=of_beam,
                BLOCK=max(of_beam, _TILE), num_warps=warps_of(max(of_beam, _TILE)),
            )  # fmt: skip
        user_kernel[(count,)](
            keys, opened, nodes[part], scores[part], first_child, *(one[part] for one in found), beams, of_beam, width,
            (1 << 31) - 1 if children is None else min(children, (1 << 31) - 1), K=of_user, BLOCK=max(of_user, _TILE),
        )  # fmt: skip
    return found


def _keys(*most: int) -> int:
    """How many keys a list has, of which no more than the least of some numbers are needed."""
    return max(_LEAST, int(triton.next_power_of_2(min(most))))


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """Both kernels for the lists that ``shapes`` lead to, with log-probabilities in float32 and bfloat16, and with all masks or none."""
    result: dict[str, KernelSpec] = {}
    for _, _, codes, _, width, children, renormalise in shapes:
        of_beam, of_user = _keys(width, children or width, codes), _keys(width)
        for dtype, masked in (("fp32", True), ("bf16", False)):
            whether: dict[str, Any] = {"HAS_ALIVE": masked, "HAS_CLOSED": masked, "RENORMALISE": bool(renormalise)}
            constants: dict[str, Any] = whether | {"K": of_beam, "BLOCK": max(of_beam, _TILE)}
            signature = {"LOG": f"*{dtype}", "NODES": "*i64", "SCORES": "*fp32", "FIRST_CHILD": "*i64", "CODE_OF": "*i64"}
            signature |= {"ALIVE": "*i1" if masked else "*i64", "CLOSED_OFFSETS": "*i64", "CLOSED": "*i64", "KEYS": "*i64", "OPEN": "*i32"}
            signature |= dict.fromkeys(("W", "limit", "user_stride", "beam_stride", "code_stride"), "i32")
            name = f"constrained_step_beam_{dtype}_{of_beam}{'_renormalised' if renormalise else ''}"
            result[name] = KernelSpec(
                name, beam_kernel, signature | dict.fromkeys(constants, "constexpr"), constants, warps_of(constants["BLOCK"])
            )
        fixed: dict[str, Any] = {"K": of_user, "BLOCK": max(of_user, _TILE)}
        tensors = {"KEYS": "*i64", "OPEN": "*i32", "NODES": "*i64", "SCORES": "*fp32", "FIRST_CHILD": "*i64", "OUT_NODES": "*i64"}
        tensors |= {"OUT_SCORES": "*fp32", "OUT_PARENTS": "*i64", "OUT_CUT": "*i1"}
        numbers = dict.fromkeys(("W", "keys_of_beam", "width", "children"), "i32")
        name = f"constrained_step_user_{of_user}"
        result[name] = KernelSpec(name, user_kernel, tensors | numbers | dict.fromkeys(fixed, "constexpr"), fixed)
    return list(result.values())
