# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from recsys.core.config import validate
from recsys.core.errors import ConfigError
from recsys.efficiency.history import HistoryPruning, last_events
from recsys.efficiency.scoring import Table
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = torch.tensor([7, 0, 1, 20])


def view_of(**others: torch.Tensor) -> TokenView:
    draw = torch.Generator().manual_seed(0)
    return TokenView.of(torch.randn(28, 4, generator=draw, dtype=torch.float64), offsets_of(LENGTHS), **others)


def pruning(**config: object) -> HistoryPruning:
    given = {"scorer": {"name": "recency"}, "selector": {"name": "top_k"}, **config}
    return HistoryPruning(validate(HistoryPruning.Config, given))


def test_recency_and_top_k_keep_the_last_events() -> None:
    kept = pruning(events=5)(view_of())
    assert kept.index.tolist() == [2, 3, 4, 5, 6, 7, *range(23, 28)]
    assert kept.lengths.tolist() == [5, 0, 1, 5]


@pytest.mark.parametrize("scorer", [{"name": "context"}, {"name": "random"}, {"name": "norm"}])
@pytest.mark.parametrize("selector", [{"name": "top_k"}, {"name": "mmr", "importance": 0.0}])
def test_a_share_counts_the_recent_ones_that_are_always_kept(scorer: dict[str, object], selector: dict[str, object]) -> None:
    kept = pruning(share=0.5, recent=2, scorer=scorer, selector=selector)(view_of())
    assert kept.lengths.tolist() == [4, 0, 1, 10]  # half of 7 is 4, to the nearest even
    assert {5, 6, 7, 26, 27} <= set(kept.index.tolist())
    alone = TokenView.of(view_of().values[8:], offsets_of(torch.tensor([20])))
    assert pruning(share=0.5, recent=2, scorer=scorer, selector=selector)(alone).index.tolist() == (kept.index[5:] - 8).tolist()


def test_short_histories_stay_whole() -> None:
    assert pruning(share=0.25, min_length=7)(view_of()).lengths.tolist() == [7, 0, 1, 5]


def test_events_are_judged_for_the_last_ones() -> None:
    view = view_of()
    context = last_events(view, 2)
    torch.testing.assert_close(context[0], view.values[5:7])
    assert context[1].eq(0).all()
    torch.testing.assert_close(context[2], view.values[[7, 7]])
    kept = pruning(events=2, scorer={"name": "context"})(view)
    rows = torch.nn.functional.normalize(view.values, dim=1)
    assert int(kept.index[-2]) == 8 + int((rows[8:27] @ rows[27]).argmax())


def test_groups_are_kept_whole() -> None:
    groups = torch.arange(28) // 3
    kept = pruning(events=2)(view_of(groups=groups)).mask()
    for row in (range(0, 7), range(8, 28)):
        for group in set(groups[row].tolist()):
            own = [i for i in row if int(groups[i]) == group]
            assert len({bool(kept[i]) for i in own}) == 1


def test_a_table_scores_what_the_tokens_are() -> None:
    config = validate(HistoryPruning.Config, {"events": 2, "scorer": {"name": "recency"}, "selector": {"name": "top_k"}})
    popular = HistoryPruning(config, Table(torch.tensor([0.0, 5.0, 1.0])))
    ids = torch.zeros(28, dtype=torch.long)
    ids[1], ids[9], ids[10] = 2, 2, 1
    assert popular(view_of(ids=ids)).index.tolist() == [1, 6, 7, 10, 27]
    with pytest.raises(ConfigError, match="expected a view with ids"):
        popular(view_of())


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "exactly one of them"),
        ({"share": 0.5, "events": 3}, "exactly one of them"),
        ({"share": 0.0}, "greater than 0"),
        ({"share": 1.5}, "less than or equal to 1"),
        ({"events": 0}, "greater than or equal to 1"),
        ({"events": 2, "recent": 3}, "recent: expected at most events=2, got 3"),
    ],
)
def test_budgets_out_of_range_are_refused(config: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        pruning(**config)


def test_what_is_short_stays_whole_whatever_the_selector_would_keep() -> None:
    threshold = {"name": "threshold", "threshold": 1e9}
    assert pruning(share=0.5, min_length=7, selector=threshold)(view_of()).lengths.tolist() == [7, 0, 1, 2]
    assert pruning(events=20, selector=threshold)(view_of()).lengths.tolist() == LENGTHS.tolist()


def test_only_the_last_events_within_reach_are_looked_at() -> None:
    kept = pruning(share=0.5, reach=6, scorer={"name": "norm"})(view_of())
    assert kept.lengths.tolist() == [3, 0, 1, 3]
    assert min(kept.index[4:].tolist()) >= 22
    assert kept.size == 28
