# SPDX-License-Identifier: Apache-2.0
"""The paper's testable properties, and what the authors' code does in their place."""

import pytest
import torch

from tests.recsys.retrieval.backbones.tiny import DIM, KINDS, MAX_LENGTH, NO_PROMPT, build, histories

each_kind = pytest.mark.parametrize("kind", KINDS)
each_prompt = pytest.mark.parametrize("prompt", [{}, NO_PROMPT, {"instruction": ""}, {"response": ""}])


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def moved(one, other):
    """Which vectors differ by more than rounding."""
    return ((one - other).abs().amax(-1) > 1e-4).tolist()


def item_states(backbone, items, queries):
    """The tokens' states after each block of the (encoder) stack, ``[blocks, L, n, d]``, for one history that has been seen whole."""
    found = []
    blocks = backbone.encoder.block if hasattr(backbone, "encoder") else backbone.model.layers
    hooks = [block.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)) for block in blocks]
    backbone(items[:1], queries, torch.tensor([[items.shape[1]]]))
    for hook in hooks:
        hook.remove()
    first = len(backbone.instruction)
    length, tokens = items.shape[1:3]
    return torch.stack([hidden[0, first : first + length * tokens].unflatten(0, (length, tokens)) for hidden in found])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@each_kind
@each_prompt
def test_permuting_the_tokens_inside_items_changes_no_query(folders, kind, prompt):
    backbone = build(kind, folders[kind], **prompt)
    items, queries = histories(tokens=4)
    shuffled = torch.stack([torch.stack([item[torch.randperm(4)] for item in row]) for row in items])
    seen = torch.tensor([[5, 1], [3, 0], [4, 2]])
    assert not torch.equal(items, shuffled)
    close(backbone(items, queries, seen), backbone(shuffled, queries, seen))


@each_kind
@each_prompt
def test_tokens_of_one_item_do_not_see_each_other_and_later_items_see_them(folders, kind, prompt):
    backbone = build(kind, folders[kind], **prompt)
    items, queries = histories(rows=1)
    changed = items.clone()
    changed[0, 2, 1] += torch.randn(DIM)
    before, after = item_states(backbone, items, queries), item_states(backbone, changed, queries)
    assert len(before) == 3
    none, some, every = [False] * 3, [False, True, False], [True] * 3
    for one, other in zip(before, after, strict=True):
        assert moved(one, other) == [none, none, some, every, every]


@each_kind
def test_queries_do_not_see_each_other(folders, kind):
    backbone = build(kind, folders[kind])
    items, queries = histories()
    seen = torch.tensor([[0, 5], [3, 2], [1, 1]])
    changed = queries.clone()
    changed[1] += torch.randn(DIM)
    assert moved(backbone(items, queries, seen), backbone(items, changed, seen)) == [[[False, True, False]] * 2] * 3


@each_kind
@each_prompt
def test_a_state_equals_that_of_the_history_cut_there(folders, kind, prompt):
    """Whatever its batch mates, the items after it, and the other states."""
    backbone = build(kind, folders[kind], **prompt)
    items, queries = histories()
    seen = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 0, 0, 3, 3, 1], [2, 2, 5, 0, 4, 0]])
    together = backbone(items, queries, seen)
    assert together.shape == (3, 6, 3, DIM) and together.isfinite().all()
    for row, states in enumerate(seen.tolist()):
        for column, s in enumerate(states):
            close(together[row, column], backbone(items[row : row + 1, :s], queries, torch.tensor([[s]]))[0, 0])


@each_kind
@pytest.mark.parametrize("release", [False, True])
@each_prompt
def test_padding_and_batch_mates_never_matter(folders, kind, release, prompt):
    backbone = build(kind, folders[kind], release=release, **prompt)
    items, queries = histories()
    seen = torch.tensor([[2], [4], [0]])
    other = items.clone()
    for row, s in enumerate(seen[:, 0].tolist()):
        other[row, s:] = 100.0
    expected = backbone(items, queries, seen)
    close(backbone(other, queries, seen), expected)
    close(torch.cat([backbone(items[i : i + 1, : int(seen[i])], queries, seen[i : i + 1]) for i in range(3)]), expected)
    close(backbone(torch.cat((items, items[:, :1]), 1), queries, seen), expected)


@each_kind
@pytest.mark.parametrize("release", [False, True])
def test_nothing_but_the_query_is_seen_by_an_empty_state_without_a_prompt(folders, kind, release):
    backbone = build(kind, folders[kind], release=release, **NO_PROMPT)
    items, queries = histories()
    seen = torch.zeros(3, 2, dtype=torch.int64)
    outputs = backbone(items, queries, seen)
    assert outputs.isfinite().all()
    close(outputs, backbone(items + 1, queries, seen))
    close(outputs, backbone(items[:, :0], queries, seen))
    assert moved(outputs, backbone(items, queries + torch.randn(3, DIM), seen)) == [[[True] * 3] * 2] * 3


@each_kind
def test_no_states_or_no_rows_are_empty(folders, kind):
    backbone = build(kind, folders[kind])
    items, queries = histories()
    assert backbone(items, queries, torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0, 3, DIM)
    assert backbone(items[:0], queries, torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 3, DIM)


@each_kind
@pytest.mark.parametrize("part", ["instruction", "response"])
def test_the_prompt_is_read(folders, kind, part):
    items, queries = histories()
    seen = torch.tensor([[0, 4]] * 3)
    outputs = [build(kind, folders[kind], **{part: text})(items, queries, seen) for text in ("34", "43", "3")]
    for other in outputs[1:]:
        assert moved(outputs[0], other) == [[[True] * 3] * 2] * 3


@each_kind
def test_the_order_of_items_matters(folders, kind):
    backbone = build(kind, folders[kind])
    items, queries = histories()
    seen = torch.full((3, 1), 5)
    assert moved(backbone(items, queries, seen), backbone(items.flip(1), queries, seen)) == [[[True] * 3]] * 3


@each_kind
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("prompt", [{}, NO_PROMPT])
def test_fused_and_eager_attention_agree(folders, kind, release, prompt):
    backbone = build(kind, folders[kind], release=release, **prompt)
    items, queries = histories()
    seen = torch.tensor([[0, 5], [3, 2], [1, 1]])
    stacks = [backbone.encoder, backbone.decoder] if kind == "t5" else [backbone.model]
    assert {stack.config._attn_implementation for stack in stacks} == {"sdpa"}
    fused = backbone(items, queries, seen)
    for stack in stacks:
        stack.set_attn_implementation("eager")
    close(backbone(items, queries, seen), fused)


@each_kind
def test_runs_in_mixed_precision(folders, kind):
    backbone = build(kind, folders[kind])
    items, queries = histories()
    seen = torch.tensor([[0, 5], [3, 2], [1, 1]])
    full = backbone(items, queries, seen)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = backbone(items, queries, seen)
    assert mixed.dtype == torch.float32
    assert (mixed - full).norm() < 0.1 * full.norm()


# What the authors' code does.


@pytest.mark.parametrize(("kind", "slots"), [("t5", [True, True, True]), ("qwen2", [False, True, True])])
def test_released_queries_see_each_other(folders, kind, slots):
    """All of each other in T5's decoder, the earlier ones under the stock causal mask of Qwen."""
    backbone = build(kind, folders[kind], release=True)
    items, queries = histories()
    seen = torch.tensor([[0, 5], [3, 2], [1, 1]])
    changed = queries.clone()
    changed[1] += torch.randn(DIM)
    assert moved(backbone(items, queries, seen), backbone(items, changed, seen)) == [[slots] * 2] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_released_tokens_of_one_item_see_each_other(folders, kind):
    backbone = build(kind, folders[kind], release=True)
    items, queries = histories(rows=1)
    changed = items.clone()
    changed[0, 2, 1] += torch.randn(DIM)
    before, after = item_states(backbone, items, queries), item_states(backbone, changed, queries)
    every = [True] * 3
    expected = [every] * 5 if kind == "t5" else [[False] * 3, [False] * 3, [False, True, True], every, every]
    assert moved(before[-1], after[-1]) == expected


@each_kind
def test_released_positions_depend_on_the_longest_history_and_intended_ones_do_not(folders, kind):
    items, queries = histories()
    seen = torch.tensor([[1, 5], [3, 2], [1, 1]])
    for release in (False, True):
        short, long = (build(kind, folders[kind], length, release=release)(items, queries, seen) for length in (MAX_LENGTH, 20))
        assert moved(short, long) == [[[release] * 3] * 2] * 3
