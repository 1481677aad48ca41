# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import ConfigError
from recsys.efficiency.budget import allocate, keep_counts
from recsys.efficiency.selectors import TopK
from recsys.efficiency.view import TokenView, offsets_of


def view(lengths: list[int], **others: torch.Tensor | None) -> TokenView:
    return TokenView.of(torch.zeros(sum(lengths), 2), offsets_of(torch.tensor(lengths, dtype=torch.long)), **others)


# ---- keep_counts


def test_counts_of_a_share():
    assert keep_counts(view([10, 0, 1, 3, 100]), share=0.25).tolist() == [2, 0, 1, 1, 25]
    assert keep_counts(view([10, 0, 1]), share=1.0).tolist() == [10, 0, 1]
    assert keep_counts(view([]), share=0.5).tolist() == []


def test_counts_of_a_number():
    assert keep_counts(view([10, 0, 3]), count=4).tolist() == [4, 0, 3]


def test_counts_are_of_units():
    assert keep_counts(view([5], groups=torch.tensor([0, 0, 1, 1, 2])), share=0.34).tolist() == [1]
    assert keep_counts(view([5], groups=torch.tensor([0, 0, 1, 1, 2])), count=9).tolist() == [3]


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_counts_can_be_selected_where_tokens_are_protected(share: float):
    made = view([5, 2, 1], protected=torch.tensor([True, False, False, False, False, True, True, True]))
    chosen = TopK(TopK.Config()).select(made, torch.zeros(8), keep_counts(made, share=share))
    assert bool(chosen.mask()[made.protected].all())


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({}, "either share or count"),
        ({"share": 0.5, "count": 2}, "either share or count"),
        ({"share": 0.0}, "share.*0.0"),
        ({"share": 1.5}, "share.*1.5"),
        ({"share": float("nan")}, "share.*nan"),
        ({"count": 0}, "count.*0"),
    ],
)
def test_a_budget_out_of_range_is_named(given_: dict[str, float], text: str):
    with pytest.raises(ConfigError, match=text):
        keep_counts(view([3]), **given_)


# ---- allocate


def exact_shares(weights: list[Fraction], total: int, caps: list[int], floors: list[int]) -> list[Fraction]:
    """Water-filling in rational numbers, by trying every level at which a group reaches its floor or its cap."""
    positive = [i for i, w in enumerate(weights) if w > 0]
    whole = sum(caps[i] if i in positive else floors[i] for i in range(len(weights)))
    filling = positive if whole > total else [i for i in range(len(weights)) if i not in positive]
    w = {i: weights[i] if whole > total else Fraction(1) for i in filling}
    fixed = {i: Fraction(floors[i] if whole > total else caps[i]) for i in range(len(weights)) if i not in filling}
    left = total - sum(fixed.values())

    def at(level: Fraction) -> dict[int, Fraction]:
        return {i: min(max(level * w[i], Fraction(floors[i])), Fraction(caps[i])) for i in filling}

    corners = sorted({Fraction(0)} | {Fraction(c) / w[i] for i in filling for c in (caps[i], floors[i])})
    below = max(c for c in corners if sum(at(c).values()) <= left)
    got = at(below)
    if sum(got.values()) < left:
        above = min(c for c in corners if c > below)
        rising = sum(at(above).values()) - sum(got.values())
        got = at(below + (above - below) * (left - sum(got.values())) / rising)
    return [got.get(i, fixed.get(i, Fraction(0))) for i in range(len(weights))]


def run(weights: list[float], total: int, caps: list[int], floors: list[int] | None = None) -> list[int]:
    offsets = torch.tensor([0, len(weights)])
    given_floors = None if floors is None else torch.tensor(floors, dtype=torch.long)
    w = torch.tensor(weights, dtype=torch.float64)
    return allocate(w, offsets, torch.tensor([total]), torch.tensor(caps, dtype=torch.long), given_floors).tolist()


GROUP = st.tuples(st.integers(0, 16), st.integers(0, 3), st.integers(0, 8))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.lists(GROUP, max_size=6), st.floats(0, 1)), max_size=3))
def test_against_water_filling_in_rational_numbers(rows: list[tuple[list[tuple[int, int, int]], float]]):
    weights, floors, caps, totals, shares = [], [], [], [], []
    for groups, part in rows:
        w, f, c = ([g[0] for g in groups], [g[1] for g in groups], [g[1] + g[2] for g in groups])
        total = sum(f) + round(part * (sum(c) + 2 - sum(f)))
        shares.append(exact_shares([Fraction(x) for x in w], min(total, sum(c)), c, f))
        weights, floors, caps, totals = weights + w, floors + f, caps + c, [*totals, total]
    offsets = offsets_of(torch.tensor([len(groups) for groups, _ in rows], dtype=torch.long))
    integers = (torch.tensor(x, dtype=torch.long) for x in (totals, caps, floors))
    found = allocate(torch.tensor(weights, dtype=torch.float64), offsets, *integers).tolist()
    for b, wanted in enumerate(shares):
        begin = int(offsets[b])
        got = found[begin : begin + len(wanted)]
        assert sum(got) == sum(wanted)
        assert all(f <= n <= c for f, n, c in zip(floors[begin:], got, caps[begin:], strict=False))
        assert all(abs(n - share) < 1 for n, share in zip(got, wanted, strict=True))
        up = [share % 1 for n, share in zip(got, wanted, strict=True) if n > share]
        down = [share % 1 for n, share in zip(got, wanted, strict=True) if n < share]
        assert not up or not down or min(up) >= max(down) - Fraction(1, 10**9)  # the largest remainders


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e300, allow_subnormal=True), st.integers(0, 3), st.integers(0, 50)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_sums_are_exact_for_weights_of_any_size(groups: list[tuple[float, int, int]], part: float):
    weights, floors, caps = [g[0] for g in groups], [g[1] for g in groups], [g[1] + g[2] for g in groups]
    total = sum(floors) + round(part * (sum(caps) - sum(floors)))
    found = run(weights, total, caps, floors)
    assert sum(found) == total
    assert all(f <= n <= c for f, n, c in zip(floors, found, caps, strict=True))


@pytest.mark.parametrize("weights", [[1e-310, 1.0], [1e-310, 1e-310], [1e-320, 0.0], [1e308, 1e308]])
def test_the_smallest_and_the_largest_weights(weights: list[float]):
    assert sum(run(weights, 5, [0, 9])) == 5
    assert sum(run(weights, 5, [4, 4])) == 5


def test_the_papers_case_of_lost_tokens():
    """96 groups share 12 544: a plain floor loses tens of them."""
    weights = torch.rand(96, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(100).square()
    caps = torch.full((96,), 100_000)
    found = allocate(weights, torch.tensor([0, 96]), torch.tensor([12_544]), caps)
    assert int(found.sum()) == 12_544
    plain = (12_544 * weights / weights.sum()).floor().long()
    assert int(plain.sum()) < 12_544 and int((found - plain).max()) == 1 and int((found - plain).min()) == 0


def test_monotone_in_weights_and_equal_for_equal_ones():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randint(0, 6, (12,), generator=generator).double()
        found = run(weights.tolist(), 29, [7] * 12)
        for i in range(12):
            for j in range(12):
                if weights[i] > weights[j]:
                    assert found[i] >= found[j]
                if weights[i] == weights[j]:
                    assert abs(found[i] - found[j]) <= 1


def test_ties_go_to_the_later_group():
    assert run([1.0, 1.0, 1.0], 4, [9, 9, 9]) == [1, 1, 2]
    assert run([1.0, 1.0, 1.0], 5, [9, 9, 9]) == [1, 2, 2]


def test_groups_without_weight_come_last():
    assert run([0.0, 1.0, 0.0], 4, [9, 9, 9]) == [0, 4, 0]
    assert run([0.0, 1.0, 0.0], 9, [9, 5, 9]) == [2, 5, 2]
    assert run([0.0, 1.0, 0.0], 5, [9, 9, 9], [1, 0, 2]) == [1, 2, 2]
    assert run([0.0, 0.0], 5, [9, 9]) == [2, 3]


def test_what_a_full_group_cannot_take_goes_to_the_others():
    assert run([100.0, 1.0, 1.0], 10, [4, 9, 9]) == [4, 3, 3]
    assert run([8.0, 4.0, 1.0, 1.0], 12, [2, 4, 9, 9]) == [2, 4, 3, 3]
    assert run([1.0, 2.0], 99, [3, 4]) == [3, 4]


def test_a_row_does_not_depend_on_its_batch_mates():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([5, 0, 9, 1])
    weights = torch.rand(15, generator=generator, dtype=torch.float64)
    weights[5:14] *= 1e12
    caps, totals, offsets = torch.randint(1, 6, (15,), generator=generator), torch.tensor([7, 0, 13, 1]), offsets_of(lengths)
    whole = allocate(weights, offsets, totals, caps)
    for b in range(4):
        place = slice(int(offsets[b]), int(offsets[b + 1]))
        own = allocate(weights[place], torch.tensor([0, place.stop - place.start]), totals[b : b + 1], caps[place])
        assert torch.equal(whole[place], own)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_group(lengths: list[int]):
    empty = torch.zeros(0, dtype=torch.long)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.long))
    assert allocate(torch.zeros(0), offsets, torch.zeros(len(lengths), dtype=torch.long), empty).tolist() == []
    assert allocate(torch.zeros(0), offsets, torch.ones(len(lengths), dtype=torch.long), empty).tolist() == []


@pytest.mark.parametrize(
    ("weights", "total", "caps", "floors", "text"),
    [
        ([-1.0, 1.0], 2, [3, 3], None, "weights.*-1.0"),
        ([float("nan"), 1.0], 2, [3, 3], None, "weights.*nan"),
        ([float("inf"), 1.0], 2, [3, 3], None, "weights.*inf"),
        ([1.0, 1.0], 6, [3, 3], [4, 0], "floors"),
        ([1.0, 1.0], 2, [3, 3], [2, 1], "row 0: expected at least 3.*got 2"),
        ([1.0, 1.0], -1, [3, 3], None, "got -1"),
        ([1.0], 1, [3, 3], None, r"caps: expected 1 values, got \(2,\)"),
    ],
)
def test_wrong_input_is_named(weights: list[float], total: int, caps: list[int], floors: list[int] | None, text: str):
    with pytest.raises(ConfigError, match=text):
        run(weights, total, caps, floors)
