# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a prompt, a history and its states stand, and who sees whom."""

from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = 2**62  # items that no token has seen


@dataclass(frozen=True)
class Sizes:
    """What a sequence is made of: [instruction][items, n tokens each][for each state: response, and queries if they stand here].

    Attributes:
        instruction: tokens I before the history.
        length: items L.
        tokens: n of each item.
        response: tokens R after the history of each state.
        queries: of each state, n or 0.
    """

    instruction: int
    length: int
    tokens: int
    response: int
    queries: int


@dataclass(frozen=True)
class Tokens:
    """T tokens of each row, by what decides who sees whom.

    A token is seen by those that have seen as many items as it needs, and, if it is shown, by those of its own state.

    Attributes:
        position_bt: int64 ``[B, T]`` position ids.
        span: all position ids are below it.
        seen_bt: int64 ``[B, T]`` how many items each has seen.
        needs_t: int64 ``[T]`` how many items must have been seen to see it, by whoever it may belong to.
        state_t: int64 ``[T]`` the state it belongs to; -1 if to none.
        shown_t: bool ``[T]`` whether the tokens of its state see it.
    """

    position_bt: Tensor
    span: int
    seen_bt: Tensor
    needs_t: Tensor
    state_t: Tensor
    shown_t: Tensor


def intended(sizes: Sizes, seen_bp: Tensor) -> Tokens:
    """The layout that the paper intends, for any number of states of each history.

    An item's tokens see the instruction and the items before it, a state's tokens the instruction, the items that the state has seen,
    and its response. Positions count what is before, an item counting as one: the instruction 0 … I-1, item j at I + j, token r of a
    response at I + seen + r, queries at I + seen + R. So a state has the places that it would have at the end of its own history.
    """
    device = seen_bp.device
    item, step = _items(sizes, device), _steps(sizes, device)
    states = seen_bp.shape[1]
    seen_tail = seen_bp.repeat_interleave(len(step), 1)
    seen_item = item.expand(len(seen_bp), -1)
    place = step.clamp(max=sizes.response).repeat(states)
    return Tokens(
        position_bt=_with_instruction(sizes, sizes.instruction + seen_item, sizes.instruction + seen_tail + place),
        span=sizes.instruction + sizes.length + sizes.response + 1,
        seen_bt=torch.cat((seen_item.new_zeros(len(seen_bp), sizes.instruction), seen_item, seen_tail), 1),
        needs_t=_needs(sizes, item, len(place)),
        state_t=_after_history(sizes, torch.arange(states, device=device).repeat_interleave(len(step)), -1),
        shown_t=_after_history(sizes, place < sizes.response, False),
    )


def released(sizes: Sizes, seen_b1: Tensor, max_length: int) -> Tokens:
    """The layout of the authors' code, for histories that each have one state.

    Everything but padding is seen by all. Items are left-padded to ``max_length`` by their position ids: item j of s seen stands at
    I + max_length - s + j, and what follows the history keeps its index in the sequence, I + n max_length and on.
    """
    device = seen_b1.device
    item, step = _items(sizes, device), _steps(sizes, device)
    rows, total = len(seen_b1), sizes.instruction + sizes.length * sizes.tokens + len(step)
    item_place = (max_length - seen_b1 + item).clamp(max=max_length - 1)
    tail_place = (max_length * sizes.tokens + step).expand(rows, -1)
    return Tokens(
        position_bt=_with_instruction(sizes, sizes.instruction + item_place, sizes.instruction + tail_place),
        span=sizes.instruction + max_length * sizes.tokens + len(step),
        seen_bt=seen_b1.expand(-1, total),
        needs_t=_needs(sizes, item, len(step)),
        state_t=seen_b1.new_zeros(total),
        shown_t=_after_history(sizes, torch.ones_like(step, dtype=torch.bool), False),
    )


def sees(seen_bq: Tensor, state_q: Tensor, keys: Tokens) -> Tensor:
    """bool ``[B, Q, T]``: whether tokens of these states, that have seen so many items, see the keys."""
    by_items = keys.needs_t <= seen_bq[..., None]
    by_state = (state_q[:, None] == keys.state_t) & keys.shown_t
    return by_items | by_state


def self_mask(tokens: Tokens, causal: bool) -> Tensor:
    """bool ``[B, T, T]``: who sees whom within a sequence; each token sees itself, and with ``causal`` none that comes later."""
    visible = sees(tokens.seen_bt, tokens.state_t, tokens)
    if causal:
        visible = visible.tril()
    return visible | torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """A mask to be added to attention scores, with a dimension for the heads: 0 where bool ``[B, Q, K]`` is true, else minus infinity.

    Transformers' eager attention adds whatever mask it is given, a boolean one as well.
    """
    return like.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)[:, None]


def _items(sizes: Sizes, device: torch.device) -> Tensor:
    """int64 ``[L n]``: the item of each token of the history."""
    return torch.arange(sizes.length, device=device).repeat_interleave(sizes.tokens)


def _steps(sizes: Sizes, device: torch.device) -> Tensor:
    """int64 ``[R + queries]``: the index of each token after the history of one state."""
    return torch.arange(sizes.response + sizes.queries, device=device)


def _with_instruction(sizes: Sizes, items_bc: Tensor, tail_bt: Tensor) -> Tensor:
    instruction = torch.arange(sizes.instruction, device=items_bc.device).expand(len(items_bc), -1)
    return torch.cat((instruction, items_bc, tail_bt), 1)


def _needs(sizes: Sizes, item_c: Tensor, tail: int) -> Tensor:
    return torch.cat((item_c.new_zeros(sizes.instruction), item_c + 1, item_c.new_full((tail,), _NEVER)))


def _after_history(sizes: Sizes, tail_t: Tensor, before: int | bool) -> Tensor:
    """The values of the tokens after the history, behind ``before`` for all others."""
    return torch.cat((tail_t.new_full((sizes.instruction + sizes.length * sizes.tokens,), before), tail_t))
