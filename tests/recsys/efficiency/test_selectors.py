# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import MMR, Coverage, Elbow, Selector, Threshold, TopK, ranks, top_keys
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = [6, 0, 9, 1, 14]


def view(lengths: list[int] = LENGTHS, seed: int = 0, **others: Tensor | None) -> TokenView:
    values = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TokenView.of(values, offsets_of(torch.tensor(lengths, dtype=torch.long)), **others)


def drawn(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def protected(count: int, seed: int = 2, share: float = 0.25) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share


def free_counts(made: TokenView) -> Tensor:
    units, _ = made.units()
    free = torch.ones(len(units.values), dtype=torch.bool) if units.protected is None else ~units.protected
    return torch.tensor([int(free[units.rows == b].sum()) for b in range(len(made))], dtype=torch.long)


SELECTORS: list[Selector] = [
    TopK(TopK.Config()),
    MMR(MMR.Config()),
    MMR(MMR.Config(importance=0.0)),
    MMR(MMR.Config(importance=0.3, similarity="total")),
    MMR(MMR.Config(parallel=3)),
    Threshold(Threshold.Config(threshold=0.6)),
    Elbow(Elbow.Config(at_least=2)),
    Coverage(Coverage.Config(tail=0.2)),
]
EXACT = SELECTORS[:5]


def rows_of(made: TokenView, chosen: RowSelection) -> list[set[int]]:
    """What each row keeps, counted from the row's begin."""
    mask = chosen.mask()
    return [set(mask[made.offsets[b] : made.offsets[b + 1]].nonzero()[:, 0].tolist()) for b in range(len(made))]


# ---- oracles, one row at a time


def slow_order(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -i))


def slow_top_k(scores: list[float], free: list[bool], k: int) -> set[int]:
    return set([i for i in slow_order(scores) if free[i]][:k])


def slow_mmr(x: Tensor, scores: list[float], free: list[bool], k: int, weight: float, total: bool = False, parallel: int = 1) -> set[int]:
    own = [s for s, f in zip(scores, free, strict=True) if f] or [0.0]
    low, high = min(own), max(own)
    importance = [(s - low) / (high - low) if high > low else 0.0 for s in scores]
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).tolist()
    kept, order, left = [i for i in range(len(scores)) if not free[i]], [], k
    while left > 0:
        candidates = [i for i in range(len(scores)) if i not in kept]

        def value(i: int, kept: list[int] = kept) -> float:
            if not kept:
                return importance[i]
            near = [cosine[i][c] for c in kept]
            return weight * importance[i] - (1 - weight) * (sum(near) if total else max(near))

        ranked = sorted(candidates, key=lambda i: (-value(i), -i))
        step = ranked[: 1 if not kept else min(parallel, left)]
        kept, order, left = kept + step, order + step, left - len(step)
    return set(order)


def slow_elbow(scores: list[float], free: list[bool], at_least: int) -> set[int]:
    order = [i for i in slow_order(scores) if free[i]]
    y = [scores[i] for i in order]
    n = len(y)
    if n == 0:
        return set()
    length = math.hypot(n - 1, y[-1] - y[0])
    far = [((y[-1] - y[0]) * j - (n - 1) * (y[j] - y[0])) / length if length else 0.0 for j in range(n)]  # below the chord is positive
    if max(far) <= 1e-9:
        return set(order)
    return set(order[: max(far.index(max(far)), at_least)])


def slow_coverage(scores: list[float], free: list[bool], tail: float, at_least: int) -> set[int]:
    order = [i for i in slow_order(scores) if free[i]]
    whole, dropped, mass = sum(scores[i] for i in order), 0, 0.0
    for i in reversed(order):
        mass += scores[i]
        if mass < tail * whole:
            dropped += 1
        else:
            break
    return set(order[: max(len(order) - dropped, min(at_least, len(order)))])


def rowwise(made: TokenView, scores: Tensor, rule: Any) -> list[set[int]]:
    found = []
    for b in range(len(made)):
        place = slice(int(made.offsets[b]), int(made.offsets[b + 1]))
        free = [True] * (place.stop - place.start) if made.protected is None else (~made.protected[place]).tolist()
        forced = {i for i, f in enumerate(free) if not f}
        found.append((rule(b, made.values[place], scores[place].tolist(), free) if free else set()) | forced)
    return found


@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_top_k_against_a_loop(shield: bool, seed: int):
    made = view(seed=seed, protected=protected(30, seed) if shield else None)
    scores = (drawn(30, seed) * 4).round()  # many ties
    k = (free_counts(made) * drawn(5, seed + 50)).long()
    wanted = rowwise(made, scores, lambda b, x, s, f: slow_top_k(s, f, int(k[b])))
    assert rows_of(made, TopK(TopK.Config()).select(made, scores, k)) == wanted


@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_mmr_against_a_loop(shield: bool, weight: float, total: bool, parallel: int):
    selector = MMR(MMR.Config(importance=weight, similarity="total" if total else "nearest", parallel=parallel))
    for seed in range(4):
        made = view(seed=seed, protected=protected(30, seed) if shield else None)
        scores = drawn(30, seed)
        k = (free_counts(made) * (0.3 + 0.7 * drawn(5, seed + 50))).round().long()
        wanted = rowwise(made, scores, lambda b, x, s, f, k=k: slow_mmr(x, s, f, int(k[b]), weight, total, parallel))
        assert rows_of(made, selector.select(made, scores, k)) == wanted


def test_mmr_at_its_ends():
    made, scores, k = view(), drawn(30), torch.tensor([3, 0, 4, 1, 6])
    top = TopK(TopK.Config()).select(made, scores, k)
    assert torch.equal(MMR(MMR.Config(importance=1.0)).select(made, scores, k).index, top.index)
    one = torch.tensor([1, 0, 1, 1, 1])
    for weight in (0.0, 0.4, 1.0):
        assert torch.equal(
            MMR(MMR.Config(importance=weight)).select(made, scores, one).index, TopK(TopK.Config()).select(made, scores, one).index
        )


@pytest.mark.parametrize("importance", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mmr_prefers_the_later_of_equal_tokens(importance: float, dtype: torch.dtype):
    """Equal vectors and equal scores tie, whatever the width of the batch and the place in it."""
    for length in (5, 8, 17, 33):
        generator = torch.Generator().manual_seed(length)
        kinds = torch.randn(3, 19, generator=generator, dtype=dtype)
        kind = torch.randint(0, 3, (length,), generator=generator)
        kind[:3] = torch.tensor([0, 1, 2])
        made = TokenView.of(kinds[kind], torch.tensor([0, length]))
        kept = MMR(MMR.Config(importance=importance)).select(made, torch.zeros(length), torch.tensor([3])).index.tolist()
        assert kept == sorted(max(i for i in range(length) if int(kind[i]) == c) for c in range(3))


@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("at_least", [0, 2, 5])
def test_threshold_against_a_loop(shield: bool, at_least: int):
    made, scores = view(protected=protected(30) if shield else None), (drawn(30) * 8).round() / 8

    def rule(b: int, x: Tensor, s: list[float], f: list[bool]) -> set[int]:
        return {i for i in range(len(s)) if f[i] and s[i] > 0.5} | slow_top_k(s, f, at_least)

    chosen = Threshold(Threshold.Config(threshold=0.5, at_least=at_least)).select(made, scores)
    assert rows_of(made, chosen) == rowwise(made, scores, rule)


@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_elbow_against_a_loop(shield: bool, seed: int):
    made = view(seed=seed, protected=protected(30, seed) if shield else None)
    scores = (drawn(30, seed) * 4).exp()
    chosen = Elbow(Elbow.Config(at_least=2)).select(made, scores)
    assert rows_of(made, chosen) == rowwise(made, scores, lambda b, x, s, f: slow_elbow(s, f, 2))


def test_a_straight_line_has_no_elbow():
    made = view([12, 12])
    for slope in (0.0, 1.0, 1e-8, 1e8):
        scores = torch.arange(24, dtype=torch.float64) * slope
        assert len(Elbow(Elbow.Config(at_least=1)).select(made, scores).index) == 24
    knee = torch.tensor([10.0, 9.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert Elbow(Elbow.Config(at_least=1)).select(view([12]), knee).index.tolist() == [0, 1]


@pytest.mark.parametrize("shield", [False, True])
@pytest.mark.parametrize("tail", [0.0, 0.1, 0.5, 0.99])
def test_coverage_against_a_loop(shield: bool, tail: float):
    for seed in range(4):
        made = view(seed=seed, protected=protected(30, seed) if shield else None)
        scores = drawn(30, seed).square()
        chosen = Coverage(Coverage.Config(tail=tail)).select(made, scores)
        assert rows_of(made, chosen) == rowwise(made, scores, lambda b, x, s, f: slow_coverage(s, f, tail, 1))


def test_coverage_next_to_a_row_of_huge_scores():
    small = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    selector = Coverage(Coverage.Config(tail=0.25))
    alone = selector.select(view([4]), small).index
    together = selector.select(view([2, 4]), torch.cat((torch.tensor([1e18, 2e18], dtype=torch.float64), small))).index
    assert (together[together >= 2] - 2).tolist() == alone.tolist() == [0, 1]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.config.name}")
def test_k_bounds_and_exact_numbers(selector: Selector):
    made, scores = view(protected=protected(30)), drawn(30)
    counts = free_counts(made)
    for k in (torch.zeros_like(counts), counts // 2, counts):
        chosen = selector.select(made, scores, k)
        kept = chosen.lengths - (torch.bincount(made.rows[made.protected], minlength=5))
        assert bool((kept == k).all()) if selector in EXACT else bool((kept <= k).all())
        assert bool(chosen.mask()[made.protected].all())
        assert bool((chosen.index[1:] > chosen.index[:-1]).all())
    if selector in EXACT:
        assert torch.equal(selector.select(made, scores, counts).index, torch.arange(30))


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.config.name}")
def test_a_row_does_not_depend_on_its_batch_mates(selector: Selector):
    made, scores = view(protected=protected(30)), drawn(30)
    k = free_counts(made) // 2
    whole = rows_of(made, selector.select(made, scores, k))
    for b in range(5):
        place = slice(int(made.offsets[b]), int(made.offsets[b + 1]))
        alone = TokenView.of(made.values[place], torch.tensor([0, place.stop - place.start]), protected=made.protected[place])
        assert rows_of(alone, selector.select(alone, scores[place], k[b : b + 1]))[0] == whole[b]
        assert torch.equal(
            selector.select(alone, scores[place], k[b : b + 1]).index, selector.select(alone, scores[place], k[b : b + 1]).index
        )


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.config.name}")
def test_groups_are_kept_whole(selector: Selector):
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 0, 0, 1, 2, 2, 2, 3, 3, 4, 0, 0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6])
    made = view(groups=groups, protected=protected(30, share=0.1))
    scores = drawn(30)
    units, unit = made.units()
    k = free_counts(made) // 2
    chosen = selector.select(made, scores, k)
    means = torch.stack([scores[unit == u].mean() for u in range(len(units.values))])
    of_units = selector.select(units, means, k)
    assert torch.equal(chosen.mask(), of_units.mask()[unit])
    assert bool(chosen.mask()[made.protected].all()) and torch.equal(chosen.source, made.offsets)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.config.name}")
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_choose_from(selector: Selector, lengths: list[int]):
    chosen = selector.select(view(lengths), torch.zeros(0), torch.zeros(len(lengths), dtype=torch.long))
    assert chosen.index.tolist() == [] and chosen.lengths.tolist() == [0] * len(lengths)


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.config.name}")
def test_all_tokens_protected(selector: Selector):
    made = view(protected=torch.ones(30, dtype=torch.bool))
    assert torch.equal(selector.select(made, drawn(30), torch.zeros(5, dtype=torch.long)).index, torch.arange(30))


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: f"{s.config.name}")
def test_single_precision_works(selector: Selector):
    made = view()
    single = made.with_values(made.values.float())
    assert selector.select(single, drawn(30).float(), torch.tensor([2, 0, 3, 1, 5])).index.dtype == torch.long


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_top_k_of_any_row(data: st.DataObject):
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=4))
    count = sum(lengths)
    scores = data.draw(st.lists(st.sampled_from([-1e300, -1.0, 0.0, 0.5, 1.0, 1e300]), min_size=count, max_size=count))
    shield = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    made = view(lengths, protected=torch.tensor(shield, dtype=torch.bool))
    counts = free_counts(made)
    k = torch.tensor([data.draw(st.integers(0, int(c))) for c in counts], dtype=torch.long)
    given_scores = torch.tensor(scores, dtype=torch.float64)
    wanted = rowwise(made, given_scores, lambda b, x, s, f: slow_top_k(s, f, int(k[b])))
    assert rows_of(made, TopK(TopK.Config()).select(made, given_scores, k)) == wanted


@pytest.mark.parametrize("selector", [TopK(TopK.Config()), MMR(MMR.Config())], ids=lambda s: s.config.name)
def test_minus_infinity_beside_protected_tokens_still_makes_exactly_k(selector: Selector):
    """Either an error, or as many as were asked for."""
    made = view([3], protected=torch.tensor([False, False, True]))
    scores = torch.tensor([1.0, -torch.inf, 0.0], dtype=torch.float64)
    try:
        chosen = selector.select(made, scores, torch.tensor([2]))
    except ConfigError:
        return
    assert chosen.index.tolist() == [0, 1, 2]


def test_mmr_takes_infinite_scores_as_most_important_or_refuses_them():
    made = view([5])
    scores = torch.tensor([0.1, torch.inf, 0.3, 0.2, 0.0], dtype=torch.float64)
    try:
        chosen = MMR(MMR.Config(importance=1.0)).select(made, scores, torch.tensor([2]))
    except ConfigError:
        return
    assert chosen.index.tolist() == [1, 2]


def test_a_protected_token_does_not_rescale_the_importance_of_others():
    """What is kept anyway, however important, should not make the rest look alike."""
    selector, k = MMR(MMR.Config(importance=0.8)), torch.tensor([4])
    for seed in range(8):
        made = view([12], seed=seed, protected=torch.arange(12) == 11)
        scores = drawn(12, seed)
        plain = selector.select(made, scores, k).index.tolist()
        scores[11] = 1e6
        assert selector.select(made, scores, k).index.tolist() == plain


def test_wrong_input_is_named():
    made, scores = view(), drawn(30)
    top = TopK(TopK.Config())
    with pytest.raises(ConfigError, match=r"k: row 2: expected 0 to its 9 units, got 10"):
        top.select(made, scores, torch.tensor([1, 0, 10, 1, 1]))
    with pytest.raises(ConfigError, match=r"k: row 1: expected 0 to its 0 units, got 1"):
        top.select(made, scores, torch.tensor([1, 1, 1, 1, 1]))
    with pytest.raises(ConfigError, match=r"row 0.*got -1"):
        top.select(made, scores, torch.tensor([-1, 0, 1, 1, 1]))
    with pytest.raises(ConfigError, match="30 tokens, got"):
        top.select(made, scores[:-1], torch.tensor([1, 0, 1, 1, 1]))
    with pytest.raises(ConfigError, match="number"):
        top.select(made, scores.masked_fill(scores > 0.9, torch.nan), torch.tensor([1, 0, 1, 1, 1]))
    for selector in EXACT:
        with pytest.raises(ConfigError, match=f"'{selector.config.name}'.*k"):
            selector.select(made, scores)
    with pytest.raises(ConfigError, match="at least 0"):
        Coverage(Coverage.Config()).select(made, scores - 1)


@pytest.mark.parametrize("k", [torch.tensor(1), torch.tensor([1]), torch.ones(4, dtype=torch.long)])
def test_k_for_another_number_of_rows_is_an_error(k: Tensor):
    made = view([3, 4])
    with pytest.raises(ConfigError, match="k"):
        TopK(TopK.Config()).select(made, drawn(7), k)


def test_components_are_found_by_name():
    for name in ("top_k", "mmr", "threshold", "elbow", "coverage"):
        assert issubclass(components.get("selector", name), Selector)


def test_ranks_against_sorting():
    scores = (drawn(30) * 5).round()
    offsets = offsets_of(torch.tensor(LENGTHS))
    found = ranks(scores, offsets)
    for b, length in enumerate(LENGTHS):
        own = scores[offsets[b] : offsets[b + 1]].tolist()
        order = slow_order(own)
        assert [order.index(i) for i in range(length)] == found[offsets[b] : offsets[b + 1]].tolist()


# ---- keys for blocks of queries


@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_top_keys_against_a_loop(k: int):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 2, 3, 9, generator=generator)
    allowed = torch.rand(2, 1, 3, 9, generator=generator) < 0.6
    forced = torch.rand(1, 1, 1, 9, generator=generator) < 0.2
    allowed[0, 0, 0] = False
    most = int((forced & allowed).sum(-1).max())
    if k < most:
        with pytest.raises(ConfigError, match=f"at least the {most} forced keys, got {k}"):
            top_keys(scores, k, allowed, forced)
        return
    found = top_keys(scores, k, allowed, forced).mask(9)
    for b in range(2):
        for g in range(2):
            for q in range(3):
                may = [n for n in range(9) if bool(allowed[b, 0, q, n])]
                first = sorted(may, key=lambda n: (not bool(forced[0, 0, 0, n]), -float(scores[b, g, q, n])))
                assert found[b, g, q].nonzero()[:, 0].tolist() == sorted(first[:k])


def test_top_keys_are_ascending_and_without_what_is_not_allowed():
    scores = torch.rand(1, 1, 4, 7, generator=torch.Generator().manual_seed(1))
    selection = top_keys(scores, 5, torch.arange(7) <= torch.arange(4)[:, None])
    assert selection.valid.sum(-1)[0, 0].tolist() == [1, 2, 3, 4]
    for q in range(4):
        kept = selection.index[0, 0, q][selection.valid[0, 0, q]].tolist()
        assert kept == sorted(kept) == list(range(q + 1))


def test_more_forced_keys_than_k_are_all_read_or_refused():
    forced = torch.tensor([True, True, True, False])
    try:
        selection = top_keys(torch.zeros(1, 1, 1, 4), 2, forced=forced)
    except ConfigError:
        return
    assert selection.mask(4)[0, 0, 0].tolist() == forced.tolist()


def test_top_keys_prefer_the_later_of_equal_ones():
    for keys in (4, 9, 40, 300):
        selection = top_keys(torch.zeros(1, 1, 2, keys), 3)
        assert selection.index[0, 0, 0].tolist() == [keys - 3, keys - 2, keys - 1]


def test_top_keys_of_nothing():
    assert top_keys(torch.zeros(2, 1, 3, 0), 4).index.shape == (2, 1, 3, 0)
    assert top_keys(torch.zeros(0, 1, 3, 5), 4).index.shape == (0, 1, 3, 4)
    with pytest.raises(ConfigError, match="k: expected at least 1, got 0"):
        top_keys(torch.zeros(1, 1, 1, 3), 0)
