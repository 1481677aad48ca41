# SPDX-License-Identifier: Apache-2.0
"""One step of beam search over a trie of codes, in plain torch: gather the children of every beam, close some, add scores, take the best.

A trie's level is two arrays (compressed sparse rows): node j has the children ``first_child[j]`` to ``first_child[j + 1]``, and
``code_of`` tells the code that leads to each child.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Given(NamedTuple):
    """The tensors of a step, see `kernels.constrained_step.constrained_step`."""

    log_probs: Tensor
    nodes: Tensor
    scores: Tensor
    first_child: Tensor
    code_of: Tensor
    alive: Tensor | None
    closed_offsets: Tensor | None
    closed: Tensor | None


class Step(NamedTuple):
    """The beams after a step, best first; a beam that is none has the score -inf, and 0 for the others.

    Attributes:
        nodes: int64 ``[B, width]``.
        scores: floating ``[B, width]``.
        parents: int64 ``[B, width]``: the beam before, of which each is a child.
        cut: bool ``[B]``: whether a child was left out whose score is above -inf.
    """

    nodes: Tensor
    scores: Tensor
    parents: Tensor
    cut: Tensor


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
    """The definition; see `kernels.constrained_step.constrained_step` for what the arguments are.

    The ``children`` best of each beam, and of these the ``width`` best of each user: by score, NaN first, then by the smaller node.
    """
    given = Given(log_probs, nodes, scores, first_child, code_of, alive, closed_offsets, closed)
    found_bwc, child_bwc = open_children(given, renormalise)
    open_bw = (found_bwc != -torch.inf).sum(2)
    if children is not None:
        found_bwc, place = found_bwc.sort(dim=2, descending=True, stable=True)
        found_bwc, child_bwc = found_bwc[..., :children], child_bwc.gather(2, place[..., :children])
    by_node = child_bwc.flatten(1).argsort(dim=1, stable=True)
    best, order = found_bwc.flatten(1).gather(1, by_node).sort(dim=1, descending=True, stable=True)
    return step_of(best[:, :width], by_node.gather(1, order[:, :width]), child_bwc, open_bw, scores.dtype, width, children)


def open_children(given: Given, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Scores ``[B, W, C]`` of the children of all beams, in float32 at least, -inf where there is none, and the children's nodes."""
    log_probs, nodes, scores, first_child, code_of, alive, closed_offsets, closed = given
    wide = torch.promote_types(torch.promote_types(log_probs.dtype, scores.dtype), torch.float32)
    if not len(code_of):
        return scores.new_full((*nodes.shape, 1), -torch.inf, dtype=wide), nodes.new_zeros(*nodes.shape, 1)
    live = scores > -torch.inf
    nodes = nodes.where(live, 0)
    first = first_child[nodes]
    count = (first_child[nodes + 1] - first) * live
    offset = torch.arange(max(1, int(count.max()) if count.numel() else 1), device=nodes.device)
    child = (first[..., None] + offset).clamp_(max=len(code_of) - 1)
    is_open = offset < count[..., None]
    found = log_probs.gather(2, code_of[child]).to(wide).masked_fill_(~is_open, -torch.inf)
    if renormalise:
        total = found.double().logsumexp(2)  # in double, so that it does not matter how far a beam is padded
        found -= total.where(total.isfinite(), 0).to(wide)[..., None]
    if alive is not None:
        is_open &= alive[child]
    if closed is not None and closed_offsets is not None and len(closed):
        is_open &= ~_is_closed(child, len(code_of), closed_offsets, closed)
    return (found + scores.to(wide)[..., None]).masked_fill_(~is_open, -torch.inf), child


def _is_closed(child_bwc: Tensor, size: int, offsets: Tensor, closed: Tensor) -> Tensor:
    """bool ``[B, W, C]``: whether a child is among those that are closed for its user."""
    users = torch.arange(len(child_bwc), device=closed.device)
    pairs = users.repeat_interleave(offsets.diff(), output_size=len(closed)) * size + closed
    wanted = child_bwc + users[:, None, None] * size
    return pairs[torch.searchsorted(pairs, wanted).clamp_(max=len(pairs) - 1)] == wanted


def step_of(best: Tensor, place: Tensor, child_bwc: Tensor, open_bw: Tensor, dtype: torch.dtype, width: int, children: int | None) -> Step:
    """What comes back, of the best scores, best first, their places in ``child_bwc``, and how many children each beam could have had."""
    missing = width - best.shape[1]
    best = torch.nn.functional.pad(best, (0, missing), value=-torch.inf)
    place = torch.nn.functional.pad(place, (0, missing))
    none = best == -torch.inf
    kept = open_bw if children is None else open_bw.clamp(max=children)
    cut = (open_bw > kept).any(1) | (kept.sum(1) > width)
    node = child_bwc.flatten(1).gather(1, place) if child_bwc.numel() else torch.zeros_like(place)
    return Step(node.masked_fill(none, 0), best.to(dtype), (place // child_bwc.shape[2]).masked_fill(none, 0), cut)


def empty_step(nodes: Tensor, scores: Tensor, width: int) -> Step:
    """Fresh memory for a step from ``nodes`` with scores like ``scores``."""
    users = nodes.shape[0]
    cut = nodes.new_empty(users, dtype=torch.bool)
    return Step(nodes.new_empty(users, width), scores.new_empty(users, width), nodes.new_empty(users, width), cut)
