# SPDX-License-Identifier: Apache-2.0
"""§5 of the specification, property by property."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.budget import allocate
from recsys.efficiency.pruning.quota import QuotaAllocator, Relevance, SessionQuota, context_relevance
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import TopK
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = [12, 0, 20, 1]
SESSIONS = torch.tensor([0] * 3 + [1] * 5 + [2] * 4 + [0] * 8 + [1] * 2 + [5] * 6 + [1] * 4 + [9])
SIZES = [3, 5, 4, 8, 2, 6, 4, 1]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(lengths: list[int] = LENGTHS, seed: int = 0, **others: Tensor | None) -> TokenView:
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.long))
    return TokenView.of(drawn(sum(lengths), 4, seed=seed), offsets, **{"context": drawn(len(lengths), 2, 4, seed=9), **others})


def fixed(*values: float) -> Relevance:
    return lambda sessions: torch.tensor(values, dtype=torch.float64)


def quota(relevance: Relevance | None = None, **others: Any) -> QuotaAllocator:
    return QuotaAllocator(QuotaAllocator.Config(**others), relevance)


def in_sessions(kept: Tensor) -> list[int]:
    return [int(part.sum()) for part in kept.split(SIZES)]


CHANCES = (0.9, 0.1, 0.5, 0.2, 0.8, 0.8, 0.05, 0.7)


@pytest.mark.parametrize("fill", ["select", "merge"])
@pytest.mark.parametrize("events", [1, 5, 9, 13, 40])
def test_sums_are_exact_and_quotas_are_filled(fill: str, events: int):
    made, own = view(), quota(fixed(*CHANCES), events=events, fill=fill)
    quotas, chosen = own.quotas(made, SESSIONS), own(made, SESSIONS)
    assert chosen.lengths.tolist() == [min(events, n) for n in LENGTHS]
    assert in_sessions(chosen.mask()) == quotas.tolist()
    assert all(q <= n for q, n in zip(quotas.tolist(), SIZES, strict=True))
    assert bool((chosen.index[1:] > chosen.index[:-1]).all()) and torch.equal(chosen.source, made.offsets)


def test_shares_go_by_the_square_of_the_relevance():
    """100 events in each of 3 sessions: no cap is reached, and the remainders are the paper's."""
    made, sessions = view([300]), torch.arange(300) // 100
    assert quota(fixed(0.3, 0.6, 0.1), events=46).quotas(made, sessions).tolist() == [9, 36, 1]
    assert quota(fixed(0.3, 0.6, 0.1), events=100, exponent=1.0).quotas(made, sessions).tolist() == [30, 60, 10]
    assert quota(fixed(0.3, 0.6, 0.1), events=99, exponent=0.0).quotas(made, sessions).tolist() == [33, 33, 33]


def test_the_papers_96_groups_lose_nothing():
    made, sessions = view([9600]), torch.arange(9600) // 100
    chances = torch.rand(96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = quota(lambda _: chances, events=2000).quotas(made, sessions)
    weights = (100 * chances) ** 2
    plain = (2000 * weights / weights.sum()).floor().long()
    assert int(found.sum()) == 2000 and int(plain.sum()) < 2000 and set((found - plain).tolist()) == {0, 1}


def test_more_relevant_sessions_get_no_less_and_equal_ones_alike():
    made, sessions = view([400]), torch.arange(400) // 20
    for seed in range(10):
        chances = torch.randint(0, 5, (20,), generator=torch.Generator().manual_seed(seed)).double() / 4
        found = quota(lambda _, c=chances: c, events=97, floor=seed % 3).quotas(made, sessions)
        for i in range(20):
            more, same = chances < chances[i], chances == chances[i]
            assert bool((found[more] <= found[i]).all()) and int((found[same] - found[i]).abs().max()) <= 1


def test_caps_are_respected_and_the_excess_goes_on():
    made, sessions = view([40]), torch.arange(40) // 10
    assert quota(fixed(1.0, 0.1, 0.1, 0.1), events=22).quotas(made, sessions).tolist() == [10, 4, 4, 4]
    assert quota(fixed(1.0, 0.1, 0.1, 0.1), events=22, cap=7).quotas(made, sessions).tolist() == [7, 5, 5, 5]
    assert quota(fixed(1.0, 0.1, 0.1, 0.1), events=22, cap=3).quotas(made, sessions).tolist() == [3, 3, 3, 3]


def test_no_relevance_anywhere_is_an_even_share():
    made, sessions = view([40]), torch.arange(40) // 10
    assert quota(fixed(0.0, 0.0, 0.0, 0.0), events=8).quotas(made, sessions).tolist() == [2, 2, 2, 2]
    assert quota(fixed(0.0, 1e-200, 0.0, 0.0), events=8).quotas(made, sessions).sum() == 8


def test_a_floor_feeds_sessions_that_the_exponent_would_starve():
    made, sessions = view([40]), torch.arange(40) // 10
    assert quota(fixed(1.0, 0.001, 0.001, 0.001), events=8).quotas(made, sessions).tolist() == [8, 0, 0, 0]
    assert quota(fixed(1.0, 0.001, 0.001, 0.001), events=8, floor=1).quotas(made, sessions).tolist() == [5, 1, 1, 1]
    few = quota(fixed(1.0, 0.3, 0.2, 0.1), events=2, floor=1).quotas(made, sessions).tolist()
    assert few == [1, 1, 0, 0]


def test_the_share_of_the_truly_relevant():
    """The specification's measure: more of the budget for the relevant sessions than an even share gives."""
    found = even = 0
    for seed in range(10):
        made, sessions = view([200], seed=seed), torch.arange(200) // 20
        relevant = torch.zeros(10, dtype=torch.bool)
        relevant[[2, 7]] = True
        values = made.values + 2 * made.context[0, 0] * relevant[sessions][:, None]
        made = made.with_values(values)
        found += int(quota(events=40).quotas(made, sessions)[relevant].sum())
        even += int(quota(events=40, exponent=0.0).quotas(made, sessions)[relevant].sum())
    assert found > 1.5 * even


def test_context_relevance_is_the_highest_cosine_of_the_mean():
    made = view()
    units, _ = replace(made, groups=SESSIONS).units()
    found = context_relevance(units)
    begin = 0
    for g, size in enumerate(SIZES):
        mean, row = made.values[begin : begin + size].mean(0), int(made.rows[begin])
        wanted = max(float(torch.cosine_similarity(mean, c, dim=0)) for c in made.context[row])
        assert float(found[g]) == pytest.approx(max(wanted, 0.0), abs=1e-12)
        begin += size


def test_a_two_tower_score_judges_each_session_once():
    calls = []

    def tower(sessions: TokenView) -> Tensor:
        calls.append(sessions)
        return torch.einsum("gd,gd->g", sessions.values, sessions.context[sessions.rows, 0]).sigmoid()

    own = quota(tower, events=6)
    own.quotas(view(), SESSIONS)
    assert len(calls) == 1 and len(calls[0].values) == 8 and calls[0].lengths.tolist() == [3, 0, 4, 1]


# ---- what fills the quota


def test_the_most_recent_events_of_each_session():
    made, own = view(), quota(fixed(*CHANCES), events=7)
    quotas, mask = own.quotas(made, SESSIONS).tolist(), own(made, SESSIONS).mask()
    for part, n in zip(mask.split(SIZES), quotas, strict=True):
        assert part.tolist() == [False] * (len(part) - n) + [True] * n


def test_the_best_events_of_each_session():
    made, own = view(), quota(fixed(*CHANCES), events=7, scorer={"name": "norm"})
    quotas, mask = own.quotas(made, SESSIONS).tolist(), own(made, SESSIONS).mask()
    for part, norms, n in zip(mask.split(SIZES), made.values.norm(dim=1).split(SIZES), quotas, strict=True):
        assert set(part.nonzero()[:, 0].tolist()) == set(norms.topk(n).indices.tolist())


@pytest.mark.parametrize("selector", ["top_k", "mmr"])
@pytest.mark.parametrize("scorer", ["recency", "context", "random"])
def test_any_scorer_and_selector(selector: str, scorer: str):
    own = quota(events=7, scorer={"name": scorer}, selector={"name": selector})
    assert in_sessions(own(view(), SESSIONS).mask()) == own.quotas(view(), SESSIONS).tolist()


def test_a_selector_sees_the_context_of_its_row():
    made, own = view(), quota(fixed(*CHANCES), events=7)
    seen = []

    class Watching(TopK):
        def select(self, view: TokenView, scores: Tensor, k: Tensor | None = None) -> RowSelection:
            seen.append(view)
            return super().select(view, scores, k)

    own.selector = Watching(TopK.Config())
    own(made, SESSIONS)
    assert seen[0].lengths.tolist() == SIZES and torch.equal(seen[0].context, made.context[[0, 0, 0, 2, 2, 2, 2, 3]])


@pytest.mark.parametrize("fill", ["select", "merge"])
def test_protected_events_stay_and_count(fill: str):
    shield = torch.zeros(33, dtype=torch.bool)
    shield[[0, 1, 11, 30, 32]] = True
    made, own = view(protected=shield), quota(fixed(*CHANCES), events=6, fill=fill)
    chosen = own(made, SESSIONS)
    assert bool(chosen.mask()[shield].all()) and chosen.lengths.tolist() == [6, 0, 6, 1]
    assert in_sessions(chosen.mask() & ~shield) == own.quotas(made, SESSIONS).tolist()
    kept = chosen.gather(made.values)
    torch.testing.assert_close(kept[torch.isin(chosen.index, shield.nonzero()[:, 0])], made.values[shield])
    few = quota(fixed(*CHANCES), events=1, fill=fill)(made, SESSIONS)
    assert few.lengths.tolist() == [3, 0, 1, 1]


def test_groups_stay_whole():
    groups = torch.tensor([0, 0, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 0])
    made = view(groups=groups)
    own = quota(fixed(*CHANCES), events=4)
    chosen = own(made, SESSIONS)
    units, unit = made.units()
    kept = chosen.mask()
    for u in range(len(units.values)):
        assert len(set(kept[unit == u].tolist())) == 1
    of_units = torch.zeros(len(units.values), dtype=torch.bool).index_put((unit[kept],), torch.tensor(True))
    assert [int(of_units[units.rows == b].sum()) for b in range(4)] == [4, 0, 4, 1]
    with pytest.raises(ConfigError, match="merged"):
        quota(fixed(*CHANCES), events=4, fill="merge")(made, SESSIONS)
    with pytest.raises(DataError, match="group in one session"):
        own(made, torch.arange(33))


# ---- averages


def merge(made: TokenView, sessions: Tensor, relevance: Relevance | None = None, **others: Any) -> RowSelection:
    return quota(relevance, fill="merge", **others)(made, sessions)


def test_a_quota_of_all_is_the_identity():
    made = view()
    chosen = merge(made, SESSIONS, share=1.0)
    assert torch.equal(chosen.gather(made.values), made.values) and torch.equal(chosen.index, torch.arange(33))


@pytest.mark.parametrize("events", [1, 2, 3, 4, 6, 12])
def test_averages_of_a_divisor_are_adaptive_average_pooling(events: int):
    made = view([12])
    chosen = merge(made, torch.zeros(12, dtype=torch.long), events=events)
    wanted = torch.nn.functional.adaptive_avg_pool1d(made.values.T[None], events)[0].T
    torch.testing.assert_close(chosen.gather(made.values), wanted)
    torch.testing.assert_close(chosen.gather(made.values).mean(0), made.values.mean(0))
    assert chosen.index.tolist() == [(i + 1) * 12 // events - 1 for i in range(events)]


@pytest.mark.parametrize("events", range(1, 12))
def test_averages_against_a_loop(events: int):
    made, own = view(), quota(fixed(*CHANCES), events=events, fill="merge")
    quotas, chosen = own.quotas(made, SESSIONS).tolist(), own(made, SESSIONS)
    wanted, places, begin = [], [], 0
    for size, b in zip(SIZES, quotas, strict=True):
        parts: list[list[int]] = [[] for _ in range(b)]
        for j in range(size if b else 0):
            parts[j * b // size].append(begin + j)
        wanted += [made.values[part].mean(0) for part in parts]
        places += [part[-1] for part in parts]
        assert all(parts) and max(map(len, parts), default=0) - min(map(len, parts), default=0) <= 1
        begin += size
    torch.testing.assert_close(chosen.gather(made.values), torch.stack(wanted))
    assert chosen.index.tolist() == places
    assert chosen.merge is not None
    used = chosen.merge.into >= 0
    sums = torch.zeros(len(places), dtype=torch.float64).index_add(0, chosen.merge.into[used], chosen.merge.weights[used])
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert used.tolist() == [bool(q) for size, q in zip(SIZES, quotas, strict=True) for _ in range(size)]


def test_averages_keep_the_positions_and_pass_gradients():
    made = view()
    chosen = merge(made, SESSIONS, fixed(*CHANCES), events=5)
    kept = chosen.view(made)
    assert torch.equal(kept.positions, made.positions[chosen.index]) and kept.lengths.tolist() == [5, 0, 5, 1]
    assert torch.autograd.gradcheck(chosen.gather, (made.values.clone().requires_grad_(),))


# ---- what holds for all


@pytest.mark.parametrize("fill", ["select", "merge"])
def test_a_row_does_not_depend_on_its_batch_mates(fill: str):
    made, own = view(), quota(events=7, fill=fill)
    whole = own(made, SESSIONS)
    values = whole.gather(made.values)
    for b, n in enumerate(LENGTHS):
        begin = int(made.offsets[b])
        row, mine = slice(begin, begin + n), slice(int(whole.offsets[b]), int(whole.offsets[b + 1]))
        alone = TokenView.of(made.values[row], torch.tensor([0, n]), context=made.context[b : b + 1])
        chosen = own(alone, SESSIONS[row])
        assert (chosen.index + begin).tolist() == whole.index[mine].tolist()
        torch.testing.assert_close(chosen.gather(alone.values), values[mine])


@pytest.mark.parametrize("fill", ["select", "merge"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_share_out(fill: str, lengths: list[int]):
    made, none = view(lengths), torch.zeros(0, dtype=torch.long)
    assert quota(events=3, fill=fill)(made, none).lengths.tolist() == [0] * len(lengths)
    assert quota(events=3, fill=fill).quotas(made, none).tolist() == []


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({}, "exactly one"),
        ({"share": 0.5, "events": 3}, "exactly one"),
        ({"share": 1.5}, "share"),
        ({"events": 0}, "events"),
        ({"events": 3, "exponent": -1.0}, "exponent"),
        ({"events": 3, "floor": 4, "cap": 3}, "floor.*cap=3.*got 4"),
        ({"events": 3, "fill": "bilinear"}, "fill"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(bad: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        QuotaAllocator.Config(**bad)


def test_wrong_input_is_named():
    made = view()
    with pytest.raises(DataError, match="33 events"):
        quota(events=3)(made, SESSIONS[:-1])
    with pytest.raises(ConfigError, match="8 sessions"):
        quota(fixed(0.1), events=3)(made, SESSIONS)
    with pytest.raises(ConfigError, match="relevance"):
        quota(fixed(*[-c for c in CHANCES]), events=3)(made, SESSIONS)
    with pytest.raises(ConfigError, match="context"):
        quota(events=3)(view(context=None), SESSIONS)


@pytest.mark.parametrize("within", ["score", "recent"])
@pytest.mark.parametrize("floor", [0, 1])
def test_the_selector_shares_out_among_runs_counted_from_the_end(within: str, floor: int) -> None:
    """Against a loop: quotas by `allocate` for each row alone, then the best or the last of each run."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([11, 0, 3, 8])
    view = TokenView.of(torch.randn(22, 4, generator=draw, dtype=torch.float64), offsets_of(lengths))
    scores = torch.randn(22, generator=draw, dtype=torch.float64)
    k = torch.tensor([5, 0, 2, 8])
    selector = SessionQuota(SessionQuota.Config(session=4, floor=floor, within=within))
    kept = set(selector.select(view, scores, k).index.tolist())
    expected: set[int] = set()
    for b, length in enumerate(lengths.tolist()):
        begin = int(view.offsets[b])
        runs: dict[int, list[int]] = {}
        for i in range(length):
            runs.setdefault(-((length - 1 - i) // 4), []).append(begin + i)
        own = [runs[number] for number in sorted(runs)]
        if not own:
            continue
        weights = torch.stack([scores[run].clamp(min=0).mean() ** 2 for run in own])
        place = sorted(range(len(own)), key=lambda j: (-float(weights[j]), -j))
        floors = torch.tensor([min(floor, len(run)) if (place.index(j) + 1) * floor <= int(k[b]) else 0 for j, run in enumerate(own)])
        quota = allocate(weights, torch.tensor([0, len(own)]), k[b : b + 1], torch.tensor([len(run) for run in own]), floors)
        for run, count in zip(own, quota.tolist(), strict=True):
            ordered = sorted(run, key=lambda i: (-float(scores[i]), -i)) if within == "score" else run[::-1]
            expected |= set(ordered[:count])
    assert kept == expected
