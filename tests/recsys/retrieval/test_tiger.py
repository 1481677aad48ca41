# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.efficiency.decoding.token_recycling import AdjacencyDraft, TrieDraft
from recsys.retrieval.catalogue import BeamIndex, Catalogue, GatherIndex, check_pair
from recsys.retrieval.models import TIGER
from tests.recsys.retrieval.coded import HISTORIES, TARGETS, N, batch_of, build, table_of

SIZES = (5, 4, 6)


def tiger(softmax: str) -> TIGER:
    model = build("tiger", table_of(sizes=SIZES), softmax=softmax)
    assert isinstance(model, TIGER)
    return model


def log_likelihood(model: TIGER, history: list[int], item: int) -> Tensor:
    """Of an item's codes after a history, by the decoder's pass over all of them at once."""
    tokens = F.pad(model.tokens[torch.tensor(history, dtype=torch.int64)].flatten(), (1, 0))[None]
    valid = torch.ones_like(tokens, dtype=torch.bool)
    before = F.pad(model.tokens[item][:-1], (1, 0))[None]
    states = model.t5.decode(before, model.t5.encode(tokens, valid), valid)
    levels = [model.log_probs(states[:, level], level)[0, model.table.codes[item, level]] for level in range(len(SIZES))]
    return torch.stack(levels).sum()


@pytest.mark.parametrize("softmax", ["level", "vocabulary"])
def test_the_loss_is_the_mean_negative_log_likelihood_of_the_targets(softmax: str) -> None:
    model = tiger(softmax)
    loss, parts = model.loss(batch_of(HISTORIES, TARGETS))
    expected = torch.stack([-log_likelihood(model, HISTORIES[row][:position], item) for row, position, item in TARGETS]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(), loss.detach())


@pytest.mark.parametrize("softmax", ["level", "vocabulary"])
@torch.no_grad()
def test_the_beam_is_the_exhaustive_search_when_it_is_wide_enough(softmax: str) -> None:
    model = tiger(softmax).eval()
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    index = BeamIndex.over(BeamIndex.Config(width=N), model, view)
    rows, scores = index.search(model.encode(batch_of(HISTORIES)), N, view)
    for history, found, scored in zip(HISTORIES, rows, scores, strict=True):
        exact = np.array([float(log_likelihood(model, history, item)) for item in range(N)])
        np.testing.assert_allclose(scored, np.sort(exact)[::-1], atol=1e-5)
        np.testing.assert_allclose(exact[found], scored, atol=1e-5)
    np.testing.assert_allclose(index.score(model.encode(batch_of(HISTORIES)), rows), scores, atol=1e-5)


@torch.no_grad()
def test_the_probabilities_of_all_code_tuples_sum_to_one() -> None:
    """Over a catalogue that has every tuple once, under the softmax over levels."""
    every = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
    table = table_of(sizes=SIZES)
    model = build("tiger", type(table)(every, SIZES, "t")).eval()
    view = Catalogue([str(i) for i in range(len(every))]).snapshot()
    index = BeamIndex.over(BeamIndex.Config(), model, view)
    scores = index.score(model.encode(batch_of(HISTORIES)), np.tile(np.arange(len(every)), (4, 1)))
    np.testing.assert_allclose(np.exp(scores).sum(1), 1.0, atol=1e-5)


def test_a_gather_over_its_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match="retriever 'tiger' gives EncoderMemory, but index 'gather' accepts SlotLogProbs"):
        check_pair(tiger("level"), GatherIndex)


@pytest.mark.parametrize("softmax", ["level", "vocabulary"])
@torch.no_grad()
def test_the_nodes_of_a_tree_are_scored_as_the_decoder_scores_their_paths(softmax: str) -> None:
    model = tiger(softmax).eval()
    state = model.encode(batch_of(HISTORIES))
    paths = {user: [(1,), (4,), (1, 3), (4, 0)][: user + 1] for user in range(4)}
    tree = model.tree(state.values, state.valid)
    wanted = [(user, path) for user, own in paths.items() for path in own if len(path) == 1]
    nodes = dict(zip(wanted, tree.children([(tree.roots[user], path[0]) for user, path in wanted]), strict=True))
    deeper = [(user, path) for user, own in paths.items() for path in own if len(path) == 2]
    nodes |= zip(deeper, tree.children([(nodes[user, path[:1]], path[1]) for user, path in deeper]), strict=True)
    assert tree.counts.forwards == 3
    tree.keep([nodes[3, (1, 3)]])  # what is left is renumbered, and goes on
    (nodes[3, (1, 2)],) = tree.children([(nodes[3, (1,)], 2)])
    for (user, path), node in nodes.items():
        tokens = torch.tensor([[0, *(model._first[level] + code for level, code in enumerate(path))]])
        alone = model.t5.decode(tokens, state.values[user : user + 1], state.valid[user : user + 1])
        expected = model.log_probs(alone[:, -1:], len(path))[0, 0]
        torch.testing.assert_close(node.logits[: len(expected)], expected)
        assert node.logits[len(expected) :].eq(-torch.inf).all()


@torch.no_grad()
def test_lists_are_the_same_with_drafts_and_need_fewer_passes() -> None:
    model = tiger("level").eval()
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    index = BeamIndex.over(BeamIndex.Config(width=4), model, view)
    rows, scores = index.search(model.encode(batch_of(HISTORIES)), 4, view)
    children: dict[tuple[int, ...], set[int]] = {}
    for codes in model.table.codes.tolist():
        for depth in range(len(codes)):
            children.setdefault(tuple(codes[:depth]), set()).add(codes[depth])
    adjacency = AdjacencyDraft(max(SIZES), successors=4, levels=3, level_sizes=(4, 12))
    sources = ([adjacency], [adjacency], [TrieDraft(lambda prefix: sorted(children.get(tuple(prefix), ())), nodes=40)])
    passes = []
    for drafts in sources:
        model.drafts, calls = drafts, []
        original = model.t5.decoder_norm.forward
        model.t5.decoder_norm.forward = lambda x, calls=calls, original=original: calls.append(len(x)) or original(x)
        again = index.search(model.encode(batch_of(HISTORIES)), 4, view)
        model.t5.decoder_norm.forward = original
        np.testing.assert_array_equal(again[0], rows)
        np.testing.assert_allclose(again[1], scores, atol=1e-5)
        passes.append(len(calls))
    assert passes[0] == len(SIZES)  # nothing is known yet
    assert passes[2] == 1  # forty nodes hold the whole trie
    assert passes[1] <= passes[0]
