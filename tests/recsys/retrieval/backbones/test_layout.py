# SPDX-License-Identifier: Apache-2.0
"""Positions and masks against loops over all pairs of tokens, spelled out."""

import itertools

import pytest
import torch

from recsys.retrieval.backbones.layout import Sizes, additive, intended, released, sees, self_mask

SEEN = torch.tensor([[0, 2, 4], [3, 3, 0]])
SIZES = [
    Sizes(instruction=i, length=4, tokens=n, response=r, queries=q)
    for i, n, r, q in [(3, 2, 2, 2), (3, 2, 2, 0), (0, 2, 0, 2), (0, 1, 2, 0), (2, 3, 0, 3), (0, 1, 0, 0)]
]


def named(sizes, states):
    """The tokens in their order: (kind, item or state, index)."""
    yield from (("instruction", None, r) for r in range(sizes.instruction))
    yield from (("item", j, k) for j in range(sizes.length) for k in range(sizes.tokens))
    for p in range(states):
        yield from (("response", p, r) for r in range(sizes.response))
        yield from (("query", p, k) for k in range(sizes.queries))


def may_see(query, key, seen, causal):
    kind, owner, index = query
    other, other_owner, other_index = key
    if query == key:
        return True
    if other == "query":
        return False
    if other == "instruction":
        return kind != "instruction" or not causal or other_index < index
    if other == "item":
        if kind == "item":
            return other_owner < owner
        return kind in ("response", "query") and other_owner < seen[owner]
    if owner != other_owner or kind not in ("response", "query"):
        return False
    return kind == "query" or not causal or other_index < index


def position(token, seen, sizes):
    kind, owner, index = token
    if kind == "instruction":
        return index
    if kind == "item":
        return sizes.instruction + owner
    return sizes.instruction + seen[owner] + (index if kind == "response" else sizes.response)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_intended(sizes, causal):
    layout = intended(sizes, SEEN)
    order = list(named(sizes, SEEN.shape[1]))
    mask = self_mask(layout, causal)
    assert mask.shape == (2, len(order), len(order))
    for row, seen in enumerate(SEEN.tolist()):
        assert layout.position_bt[row].tolist() == [position(token, seen, sizes) for token in order]
        wanted = [[may_see(query, key, seen, causal) for key in order] for query in order]
        assert mask[row].tolist() == wanted
    assert int(layout.position_bt.max()) < layout.span


@pytest.mark.parametrize("sizes", [s for s in SIZES if not s.queries])
def test_what_the_queries_of_a_decoder_see(sizes):
    layout = intended(sizes, SEEN)
    order = list(named(sizes, SEEN.shape[1]))
    visible = sees(SEEN, torch.arange(SEEN.shape[1]), layout)
    for row, seen in enumerate(SEEN.tolist()):
        assert visible[row].tolist() == [[may_see(("query", p, 0), key, seen, False) for key in order] for p in range(SEEN.shape[1])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_released(sizes, causal):
    """All that is not padding is seen; positions are those of a sequence with the padding between instruction and history."""
    max_length, seen = 6, SEEN.reshape(-1, 1)
    layout = released(sizes, seen, max_length)
    order = list(named(sizes, 1))
    mask = self_mask(layout, causal)
    history = max_length * sizes.tokens
    for row, ((s,), positions) in enumerate(zip(seen.tolist(), layout.position_bt.tolist(), strict=True)):
        real = [kind != "item" or j < s for kind, j, _ in order]
        for (kind, j, index), place, exists in zip(order, positions, real, strict=True):
            if not exists:
                continue
            raw = {
                "instruction": index,
                "item": sizes.instruction + ((max_length - s + (j or 0)) * sizes.tokens + index),
                "response": sizes.instruction + history + index,
                "query": sizes.instruction + history + sizes.response + index,
            }[kind]
            shared = sizes.instruction + (raw - sizes.instruction) // sizes.tokens
            assert place == (shared if kind == "item" else raw)
        for (q, _), (k, _) in itertools.product(enumerate(order), repeat=2):
            if real[q]:
                assert mask[row, q, k] == (q == k or (real[k] and (k < q or not causal)))
    assert int(layout.position_bt.max()) < layout.span


def test_an_additive_mask_is_zero_or_minus_infinity():
    visible = torch.tensor([[[True, False]]])
    assert additive(visible, torch.zeros(1, dtype=torch.bfloat16)).tolist() == [[[[0.0, -torch.inf]]]]
