# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch

from benchmarks.catalogue_decoding import gathers, live, sets, tokens
from recsys.retrieval.catalogue import BeamIndex, Catalogue
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs
from recsys.retrieval.t5 import T5, T5Config


def test_a_free_search_finds_the_best_of_all_sequences() -> None:
    values = torch.randn(3, 2, 5).log_softmax(-1)
    sequences, scores = tokens.free_search(SlotLogProbs(values, "t").begin(), 3, 2, 5)
    everything = values[:, 0, :, None] + values[:, 1, None]
    best, place = everything.flatten(1).topk(5)
    np.testing.assert_allclose(scores, best)
    np.testing.assert_array_equal(sequences, torch.stack((place // 5, place % 5), -1))


def test_where_the_catalogue_holds_every_sequence_the_trie_changes_nothing() -> None:
    codes = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    view = Catalogue([str(i) for i in range(36)]).snapshot()
    index = BeamIndex.build(BeamIndex.Config(width=4), CodeTable(codes, (6, 6), "t"), view)
    state = SlotLogProbs(torch.randn(5, 2, 6).log_softmax(-1), "t")
    rows, scores = index.search(state, 4, view)
    assert tokens.same((codes.numpy()[rows], scores), tokens.free_search(state.begin(), 5, 2, 4))


def test_searches_that_differ_are_told_apart_and_near_ties_are_not() -> None:
    codes = np.array([[[0, 1], [1, 1], [2, 2]]])
    scores = np.array([[-1.0, -1.00001, -3.0]])
    assert tokens.same((codes, scores), (codes[:, [1, 0, 2]], scores))
    assert not tokens.same((codes, scores), (codes[:, [0, 2, 1]], scores))
    assert not tokens.same((codes, scores), (codes, scores - 0.1))


def test_slots_at_once_do_not_see_each_other_and_beams_of_one_are_greedy() -> None:
    torch.manual_seed(0)
    model = T5(T5Config(dim=16, layers=2, heads=2, head_dim=8, ffn=32), 1 + sets.CODES).eval()
    history = torch.randint(1, 10, (2, 6))
    valid = torch.ones_like(history, dtype=torch.bool)
    with torch.no_grad():
        four, two = (sets.at_once(model, history, valid, slots) for slots in (4, 2))
        torch.testing.assert_close(four[:, :2], two)
        scores = sets.one_by_one(model, history, valid, 3, 1)
        memory, taken, total = model.encode(history, valid), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)
        for _ in range(3):
            log_probs = model.logits(model.decode(taken, memory, valid)[:, -1:], slice(1, 1 + sets.CODES)).log_softmax(-1)[:, 0]
            best, code = log_probs.max(1)
            total, taken = total + best, torch.cat((taken, 1 + code[:, None]), 1)
        torch.testing.assert_close(scores[:, 0], total, atol=1e-4, rtol=1e-4)


def test_what_is_timed_beside_the_gather_computes_the_same_scores() -> None:
    index, view, state = gathers.index_of(300)
    assert len(view.ids) == 300 and index.score_all(state).shape == (gathers.USERS, 300)
    gathers.bag(index, state)()
    gathers.plain(index, state, 2)()
    assert gathers._in_turns({"nothing": lambda: None}, 3)["nothing"] != []


def test_the_share_that_is_live_is_the_one_asked_for() -> None:
    assert live.live_view(1000, 0.01).live_count == 10
    assert live.vectors(5, 1).shape == (5, live.DIM)
