# SPDX-License-Identifier: Apache-2.0
"""Drafts change what decoding costs, and never what it finds."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.decoding.search import beam, greedy
from recsys.efficiency.decoding.token_recycling import LEVELS, AdjacencyDraft, TrieDraft, template
from recsys.efficiency.decoding.tree import Draft, PrefixTree
from tests.recsys.efficiency.decoding.toy import Toy, ToyNodes

V = 12
CONTEXT = [3, 1, 4, 1, 5]


def plain_greedy(toy: Toy, context: list[int], length: int, allowed: dict[tuple[int, ...], list[int]] | None = None) -> list[int]:
    """By the definition: the whole prefix again for every token."""
    found: list[int] = []
    for _ in range(length):
        logits = toy.logits(context, found)
        if allowed is not None:
            mask = torch.zeros(V, dtype=torch.bool)
            mask[allowed[tuple(found)]] = True
            logits = logits.masked_fill(~mask, -torch.inf)
        found.append(int(logits.argmax()))
    return found


def plain_beam(toy: Toy, context: list[int], width: int, length: int) -> list[tuple[float, list[int]]]:
    beams = [(0.0, list[int]())]
    for _ in range(length):
        grown = []
        for score, prefix in beams:
            log_probs = toy.logits(context, prefix).log_softmax(-1)
            grown += [(score + float(log_probs[token]), [*prefix, token]) for token in range(V)]
        beams = sorted(grown, key=lambda own: (-own[0], own[1]))[:width]
    return beams


def paths_of(items: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    children: dict[tuple[int, ...], set[int]] = {}
    for item in items:
        for depth in range(len(item)):
            children.setdefault(tuple(item[:depth]), set()).add(item[depth])
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def mask_of(children: dict[tuple[int, ...], list[int]], prefix: Sequence[int]) -> Tensor:
    mask = torch.zeros(V, dtype=torch.bool)
    mask[children.get(tuple(prefix), [])] = True
    return mask


class Wrong:
    """Drafts tokens at random."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(5)

    def propose(self, prefix: Sequence[int], depth: int) -> Draft:
        if depth < 1:
            return Draft([], [])
        tokens = torch.randint(V, (6,), generator=self.draw).tolist()
        return Draft(
            [-1, -1, -1, 0, 1, 3][: 3 if depth == 1 else 5 if depth == 2 else 6], tokens[: 3 if depth == 1 else 5 if depth == 2 else 6]
        )

    def observe(self, depths: Tensor, tokens: Tensor, logits: Tensor) -> None:
        return None


def test_the_default_template_is_the_authors_tree_of_eighty_nodes() -> None:
    levels = template(LEVELS, 8)
    assert [len(level) for level in levels] == [8, 21, 25, 15, 8, 3]
    assert sum(map(len, levels)) == 80
    assert levels[0] == [(0, rank) for rank in range(8)]
    for above, below in pairwise(levels):
        assert len(set(below)) == len(below)
        assert all(0 <= at < len(above) and 0 <= rank < 8 for at, rank in below)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [8, 512])
def test_recycled_greedy_is_greedy_token_for_token(seed: int, window: int) -> None:
    toy = Toy(V, seed)
    draft = AdjacencyDraft(V, successors=4, level_sizes=(4, 6, 4))
    for context in (CONTEXT, [0, 2], [7] * 6):
        tree = PrefixTree(ToyNodes(toy, context), V, [draft], depth=30)
        assert greedy(tree, 30, window=window) == plain_greedy(toy, context, 30)
        assert tree.counts.forwards <= 30


def test_recycling_saves_forwards_on_what_repeats() -> None:
    toy = Toy(V, 1)
    draft = AdjacencyDraft(V, successors=4, level_sizes=(4, 6, 4))
    forwards = []
    for _ in range(2):
        tree = PrefixTree(ToyNodes(toy, CONTEXT), V, [draft], depth=60)
        greedy(tree, 60)
        forwards.append(tree.counts.forwards)
    assert forwards[1] <= 0.55 * 60
    assert forwards[1] <= forwards[0]


@pytest.mark.parametrize("fill", [-1, 0, 7])
def test_whatever_stands_in_the_matrix_the_result_is_the_same(fill: int) -> None:
    toy = Toy(V, 2)
    draft = AdjacencyDraft(V, successors=3, level_sizes=(3, 4))
    draft.matrix.fill_(fill)
    tree = PrefixTree(ToyNodes(toy, CONTEXT), V, [draft, Wrong()], depth=20)
    assert greedy(tree, 20) == plain_greedy(toy, CONTEXT, 20)
    assert tree.counts.forwards <= 20  # each gives at least one token


def test_logits_of_a_drafted_node_are_those_of_decoding_its_path() -> None:
    toy = Toy(V, 3)
    nodes = ToyNodes(toy, CONTEXT)
    parents, tokens = torch.tensor([-1, 0, 0, 1, 2, 3]), torch.tensor([V, 5, 6, 7, 5, 1])
    logits = nodes.extend(torch.zeros(6, dtype=torch.long), parents, tokens)
    for row, prefix in ((0, []), (1, [5]), (2, [6]), (3, [5, 7]), (4, [6, 5]), (5, [5, 7, 1])):
        torch.testing.assert_close(logits[row], toy.logits(CONTEXT, prefix), atol=1e-10, rtol=0)


def test_what_is_kept_after_compaction_is_what_sequential_decoding_has() -> None:
    toy = Toy(V, 4)
    tree = PrefixTree(nodes := ToyNodes(toy, CONTEXT), V, [Wrong()], depth=10)
    (node,) = tree.children([(tree.root, 3)])
    (node,) = tree.children([(node, 8)])
    tree.keep([node])
    sequential = ToyNodes(toy, CONTEXT)
    sequential.extend(torch.zeros(3, dtype=torch.long), torch.tensor([-1, 0, 1]), torch.tensor([V, 3, 8]))
    for (key, value), (other_key, other_value) in zip(nodes.past, sequential.past, strict=True):
        torch.testing.assert_close(key, other_key, atol=1e-10, rtol=0)
        torch.testing.assert_close(value, other_value, atol=1e-10, rtol=0)
    (after,) = tree.children([(node, 2)])
    torch.testing.assert_close(after.logits, toy.logits(CONTEXT, [3, 8, 2]), atol=1e-10, rtol=0)


def test_the_end_token_stops_inside_an_accepted_draft() -> None:
    toy = Toy(V, 1)
    whole = plain_greedy(toy, CONTEXT, 40)
    end = whole[7]
    draft = AdjacencyDraft(V, successors=4, level_sizes=(4, 6, 4))
    greedy(PrefixTree(ToyNodes(toy, CONTEXT), V, [draft], depth=40), 40)
    found = greedy(PrefixTree(ToyNodes(toy, CONTEXT), V, [draft], depth=40), 40, end=end)
    assert found == whole[: whole.index(end) + 1]


def test_the_tree_is_as_deep_as_there_are_tokens_left() -> None:
    toy = Toy(V, 5)
    draft = AdjacencyDraft(V, successors=4, level_sizes=(4, 8, 8, 8))
    greedy(PrefixTree(ToyNodes(toy, CONTEXT), V, [draft], depth=30), 30)
    tree = PrefixTree(ToyNodes(toy, CONTEXT), V, [draft], depth=2)
    assert tree.counts.nodes <= 1 + 4  # nothing is asked below the first token
    assert greedy(tree, 2) == plain_greedy(toy, CONTEXT, 2)


ITEMS = [(0, 4, 1), (0, 4, 2), (0, 5, 1), (3, 4, 1), (3, 9, 9), (7, 0, 0), (7, 11, 2), (8, 1, 1)]


@pytest.mark.parametrize("seed", range(4))
def test_held_to_a_catalogue_drafts_are_prefixes_of_items_and_the_result_is_constrained_greedy(seed: int) -> None:
    toy, children = Toy(V, seed), paths_of(ITEMS)
    prefixes = {item[:depth] for item in ITEMS for depth in range(4)}
    draft = AdjacencyDraft(V, successors=V, levels=3, level_sizes=(6, 6), allowed=lambda prefix: mask_of(children, prefix))
    trie = TrieDraft(lambda prefix: children.get(tuple(prefix), []), nodes=6)
    for source in (draft, trie):
        for prefix in ([], [0], [3], [7, 11]):
            proposed = source.propose(prefix, 3 - 1 - len(prefix))
            paths: list[tuple[int, ...]] = []
            for parent, token in zip(proposed.parents, proposed.tokens, strict=True):
                paths.append(((*prefix,) if parent < 0 else paths[parent]) + (token,))
            assert set(paths) <= prefixes
    for _ in range(2):
        tree = PrefixTree(ToyNodes(toy, CONTEXT), V, [draft, trie], depth=3)
        found = greedy(tree, 3, allowed=lambda prefix: mask_of(children, prefix))
        assert found == plain_greedy(toy, CONTEXT, 3, children)
        assert tuple(found) in ITEMS
    assert tree.counts.forwards <= 2


@pytest.mark.parametrize(("seed", "width"), [(0, 1), (0, 4), (1, 7), (2, 30)])
def test_beams_are_the_same_with_drafts_and_without(seed: int, width: int) -> None:
    toy = Toy(V, seed)
    expected = plain_beam(toy, CONTEXT, width, 4)
    draft = AdjacencyDraft(V, successors=6, levels=4, level_sizes=(6, 12, 12))
    costs = []
    for sources in ([], [draft], [draft], [Wrong()]):
        tree = PrefixTree(ToyNodes(toy, CONTEXT), V, sources, depth=4)
        found = beam(tree, width, 4)
        assert found.tokens.tolist() == [tokens for _, tokens in expected]
        torch.testing.assert_close(found.scores, torch.tensor([score for score, _ in expected], dtype=torch.float64))
        costs.append(tree.counts.forwards)
    assert costs[0] == 4
    assert max(costs) <= 4


def test_a_draft_saves_a_beam_passes() -> None:
    toy = Toy(V, 0, sharp=12.0)
    draft = AdjacencyDraft(V, successors=6, levels=4, level_sizes=(6, 18, 30))
    for _ in range(3):
        tree = PrefixTree(ToyNodes(toy, CONTEXT), V, [draft], depth=4)
        beam(tree, 3, 4)
    assert tree.counts.forwards < 4


def test_the_matrix_is_small_and_keeps_the_last_of_equal_tokens() -> None:
    assert AdjacencyDraft(32_000).nbytes < 2_000_000
    draft = AdjacencyDraft(4, successors=2, level_sizes=(2,))
    logits = torch.tensor([[0.0, 1, 2, 3], [3.0, 2, 1, 0], [0.0, 9, 8, 0]])
    draft.observe(torch.tensor([1, 2, 0]), torch.tensor([2, 2, 3]), logits)
    assert draft.matrix[0, 2].tolist() == [0, 1]
    assert draft.matrix[0, 4].tolist() == [1, 2]  # what stands before the first token


def test_bad_input_is_named() -> None:
    toy = Toy(V, 0)
    tree = PrefixTree(ToyNodes(toy, CONTEXT), V)
    with pytest.raises(ConfigError, match="length: expected at least 1, got 0"):
        greedy(tree, 0)
    with pytest.raises(ConfigError, match="width, length"):
        beam(tree, 0, 1)
    with pytest.raises(DataError, match="nothing is allowed after"):
        greedy(tree, 1, allowed=lambda prefix: torch.zeros(V, dtype=torch.bool))
    with pytest.raises(ConfigError, match="successors: expected 1 to 12, got 13"):
        AdjacencyDraft(V, successors=13)
    with pytest.raises(ConfigError, match="level 1: expected 1 to 4, got 5"):
        template((2, 5), 2)
    with pytest.raises(ConfigError, match="depth"):
        PrefixTree(ToyNodes(toy, CONTEXT), V, depth=0)
    with pytest.raises(ConfigError, match="nodes"):
        TrieDraft(lambda prefix: [], nodes=0)


def test_what_cannot_follow_is_not_drafted() -> None:
    draft = AdjacencyDraft(5, successors=4, level_sizes=(4,))
    draft.observe(torch.tensor([1]), torch.tensor([2]), torch.tensor([[0.5, -torch.inf, -torch.inf, 1.0, -torch.inf]]))
    assert draft.propose([2], 1).tokens == [3, 0]
