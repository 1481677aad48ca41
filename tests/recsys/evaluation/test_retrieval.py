# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged
from recsys.data.leave_one_out import LeaveOneOut, leave_one_out
from recsys.data.sequences import SequenceData
from recsys.evaluation.bootstrap import paired_mean_difference
from recsys.evaluation.retrieval import compare, event_ranks, gather_scorer, list_ranks, slices, vector_scorer
from recsys.retrieval.base import Retriever
from recsys.retrieval.baselines import Popularity, RepeatLast
from recsys.retrieval.catalogue import BeamIndex, Catalogue, DenseIndex, GatherIndex
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import RPG, TIGER, SASRec

N, USERS, LENGTH = 20, 30, 4


@pytest.fixture(scope="module")
def data() -> SequenceData:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return SequenceData.from_order([f"u{i}" for i in range(USERS)], Jagged(rng.integers(0, N - 3, offsets[-1]), offsets))


@pytest.fixture(scope="module")
def split(data: SequenceData) -> LeaveOneOut:
    return leave_one_out(data)


def items() -> ItemTable:
    codes = torch.stack((torch.arange(N) // 5, torch.arange(N) % 5), 1)
    return ItemTable(N, torch.ones(N, dtype=torch.bool), codes=CodeTable(codes, (5, 5), "t"))


def model_of(cls: type, **config: object) -> Retriever:
    torch.manual_seed(0)
    model: Retriever = cls(cls.Config(dim=8, heads=2, dropout=0.0, max_length=LENGTH, **config), items())
    return model.eval()


def brute_force(scores: np.ndarray, target: int, seen: set[int]) -> float:
    if target in seen:
        return np.inf
    others = [i for i in range(N) if i not in seen]
    above, equal = (sum(op(scores[i], scores[target]) for i in others) for op in (np.greater, np.equal))
    return above + (equal + 1) / 2


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_ranks_are_those_of_brute_force_whatever_the_chunk(data: SequenceData, split: LeaveOneOut, exclude_seen: bool) -> None:
    table = np.random.default_rng(1).normal(size=(N, N)).round(1)

    def scorer(batch: SequenceBatch) -> np.ndarray:
        last = batch.items[batch.offsets[1:] - 1].numpy()
        return table[last].astype(np.float32)

    expected = []
    for start, event in zip(split.test.start, split.test.event, strict=True):
        seen = set(data.items[start:event].tolist()) if exclude_seen else set()
        expected.append(brute_force(table[data.items[event - 1]].astype(np.float32), int(data.items[event]), seen))
    for chunk in (1, 7, 1000):
        found = event_ranks(scorer, data, split.test, LENGTH, exclude_seen=exclude_seen, chunk=chunk)
        np.testing.assert_array_equal(found, expected)


def test_lists_and_scores_of_all_items_rank_alike(data: SequenceData, split: LeaveOneOut) -> None:
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    sasrec, rpg = model_of(SASRec), model_of(RPG)
    assert isinstance(sasrec, SASRec)
    gather = GatherIndex.over(GatherIndex.Config(), rpg, view)
    cases = [
        (vector_scorer(sasrec), sasrec, DenseIndex.over(DenseIndex.Config(), sasrec, view)),
        (gather_scorer(rpg, gather), rpg, gather),
        (gather_scorer(rpg, gather), rpg, BeamIndex.over(BeamIndex.Config(width=N), rpg, view)),
    ]
    for scorer, model, index in cases:
        exact = event_ranks(scorer, data, split.test, LENGTH)
        listed = list_ranks(model, index, view, data, split.test, 10, chunk=11)
        np.testing.assert_array_equal(listed, np.where(exact <= 10, exact, np.inf))


def test_a_decoder_is_ranked_by_its_lists(data: SequenceData, split: LeaveOneOut) -> None:
    torch.manual_seed(0)
    model = TIGER(TIGER.Config(dim=8, layers=1, heads=2, head_dim=4, ffn=16, max_length=LENGTH), items()).eval()
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    index = BeamIndex.over(BeamIndex.Config(width=N), model, view)
    ranks = list_ranks(model, index, view, data, split.test, N, exclude_seen=False)
    assert np.isfinite(ranks).all() and sorted(set(ranks)) == sorted(set(np.round(ranks)))


def test_repeats_alone_are_what_repeat_last_finds(data: SequenceData, split: LeaveOneOut) -> None:
    """Its own definition: the last item again, then the one before."""
    repeat = RepeatLast(RepeatLast.Config()).fit(split.train, N)
    ranks = event_ranks(repeat.scores, data, split.test, 100, exclude_seen=False)
    chosen = slices(data, split.train, split.test, N)
    for rank, start, event in zip(ranks, split.test.start, split.test.event, strict=True):
        recent = list(dict.fromkeys(data.items[start:event][::-1].tolist()))
        target = int(data.items[event])
        if target in recent:
            assert rank == 1 + recent.index(target)
        else:
            assert rank == len(recent) + (N - len(recent) + 1) / 2
    assert chosen["repeated"].any() and np.isinf(event_ranks(repeat.scores, data, split.test, 100)[chosen["repeated"]]).all()


def test_slices_are_what_they_say(data: SequenceData, split: LeaveOneOut) -> None:
    chosen = slices(data, split.train, split.test, N)
    counts = np.bincount(split.train.items, minlength=N)
    head = set(np.lexsort((np.arange(N), -counts))[:4].tolist())
    for t, (start, event) in enumerate(zip(split.test.start, split.test.event, strict=True)):
        target, history = int(data.items[event]), data.items[start:event].tolist()
        assert chosen["repeated"][t] == (target in history) != chosen["new"][t]
        assert chosen["warm"][t] == (counts[target] > 0) != chosen["cold"][t]
        assert chosen["head"][t] == (target in head) != chosen["tail"][t]
        assert chosen["cold_user"][t] == (len(history) <= 3) and not chosen["empty_user"][t] and chosen["all"][t]


def test_models_are_compared_on_every_slice_with_paired_intervals(data: SequenceData, split: LeaveOneOut) -> None:
    popular = event_ranks(Popularity(Popularity.Config()).fit(split.train, N).scores, data, split.test, LENGTH)
    perfect = np.ones(len(popular))
    chosen = slices(data, split.train, split.test, N)
    rows = compare(
        {"popularity": [popular], "perfect": [perfect, perfect]}, split.test, chosen, baseline="popularity", cutoffs=(1, 5), resamples=200
    )
    assert {row.slice for row in rows} == {name for name, mask in chosen.items() if mask.any()}
    for row in rows:
        mask = chosen[row.slice]
        assert row.targets == mask.sum()
        if row.model == "popularity":
            assert row.metrics["recall@5"] == pytest.approx((popular[mask] <= 5).mean()) and not row.differences
        else:
            assert row.metrics == {"recall@1": 1.0, "recall@5": 1.0, "ndcg@1": 1.0, "ndcg@5": 1.0}
            expected = paired_mean_difference(
                perfect[mask], (popular[mask] <= 5) * 1.0, split.test.user_id.to_pandas()[mask], resamples=200
            )
            assert row.differences["recall@5"] == expected
            assert set(row.as_json()) >= {"model", "slice", "targets", "recall@1", "differences"}
    with pytest.raises(KeyError):
        compare({"perfect": [perfect]}, split.test, chosen, baseline="popularity")
