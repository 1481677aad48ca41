# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from recsys.core.errors import DataError
from recsys.efficiency.view import TokenView, from_padded, group_means, group_sums, held, offsets_of, row_of, row_sums, to_padded

LENGTHS = torch.tensor([3, 0, 5, 1, 0])


def view(lengths: torch.Tensor = LENGTHS, dim: int = 4, **others: torch.Tensor | None) -> TokenView:
    values = torch.randn(int(lengths.sum()), dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TokenView.of(values, offsets_of(lengths), **others)


def test_positions_begin_at_zero_in_every_row():
    made = view()
    assert made.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert made.rows.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3]
    assert made.lengths.tolist() == LENGTHS.tolist() and len(made) == 5


def test_padded_and_back():
    padded = torch.randn(5, 6, 4)
    made = TokenView.padded(padded, LENGTHS)
    back = to_padded(made.values, made.offsets, fill=7.0, width=6)
    for b, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(back[b, :length], padded[b, :length])
        assert bool((back[b, length:] == 7.0).all())
    assert to_padded(made.values, made.offsets).shape == (5, 5, 4)
    assert torch.equal(held(LENGTHS, 6).sum(1), LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_both_ways_and_their_gradients_against_a_loop(dtype: torch.dtype, shape: tuple[int, ...]):
    offsets, count = offsets_of(LENGTHS), int(LENGTHS.sum())
    values = torch.randn(count, *shape).to(dtype).requires_grad_()
    padded = to_padded(values, offsets, fill=-2.0, width=7)
    assert padded.shape == (5, 7, *shape) and padded.dtype == dtype
    back = from_padded(padded, offsets, count)
    assert torch.equal(back, values)
    for b, length in enumerate(LENGTHS.tolist()):
        assert torch.equal(padded[b, :length], values[offsets[b] : offsets[b + 1]])
        assert bool((padded[b, length:] == -2.0).all())
    upstream = torch.randn(padded.shape).to(dtype)
    (found,) = torch.autograd.grad(padded, values, upstream, retain_graph=True)
    assert torch.equal(found, upstream[held(LENGTHS, 7)])
    leaf, own = upstream.clone().requires_grad_(), torch.randn(count, *shape).to(dtype)
    (found,) = torch.autograd.grad(from_padded(leaf, offsets, count), leaf, own)
    assert torch.equal(found[held(LENGTHS, 7)], own) and not bool(found[~held(LENGTHS, 7)].any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_padding_keeps_the_dtype(dtype: torch.dtype):
    values = torch.tensor([1, 0, 1]).to(dtype)
    assert to_padded(values, torch.tensor([0, 1, 3])).dtype == dtype
    assert to_padded(values, torch.tensor([0, 1, 3])).tolist() == torch.tensor([[1, 0], [0, 1]]).to(dtype).tolist()


def test_gradients_pass_through_padding():
    values = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: to_padded(v, torch.tensor([0, 1, 1, 4])).square(), (values,))


def test_units_without_groups_are_the_tokens():
    made = view()
    units, unit = made.units()
    assert units is made and unit.tolist() == list(range(9))


def test_units_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        lengths = torch.randint(0, 7, (4,), generator=generator)
        count = int(lengths.sum())
        groups = torch.randint(0, 2, (count,), generator=generator).cumsum(0) % 3  # runs; the same number again in the next row and later
        protected = torch.rand(count, generator=generator) < 0.3
        made = view(lengths, groups=groups, protected=protected)
        units, unit = made.units()
        runs: list[list[int]] = []
        for s in range(count):
            same = s > 0 and int(groups[s]) == int(groups[s - 1]) and int(made.rows[s]) == int(made.rows[s - 1])
            if same:
                runs[-1].append(s)
            else:
                runs.append([s])
        assert len(units.values) == len(runs)
        assert units.rows.tolist() == [int(made.rows[run[0]]) for run in runs]
        for u, run in enumerate(runs):
            assert unit[run].tolist() == [u] * len(run)
            torch.testing.assert_close(units.values[u], made.values[run].mean(0))
            assert int(units.positions[u]) == int(made.positions[run[0]])
            assert bool(units.protected[u]) == bool(protected[run].any())
        assert units.groups is None


def test_a_group_ends_with_its_row():
    made = view(torch.tensor([2, 0, 2]), groups=torch.tensor([7, 7, 7, 7]))
    units, unit = made.units()
    assert units.lengths.tolist() == [1, 0, 1] and unit.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_see(lengths: list[int]):
    made = view(
        torch.tensor(lengths, dtype=torch.long), groups=torch.zeros(0, dtype=torch.long), protected=torch.zeros(0, dtype=torch.bool)
    )
    units, unit = made.units()
    assert len(made) == len(units) == len(lengths) and unit.tolist() == [] and made.rows.tolist() == []
    assert to_padded(made.values, made.offsets).shape == (len(lengths), 0, 4)


def test_means_of_groups_without_members_are_zero():
    means = group_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 4)
    assert means.tolist() == [2.0, 0.0, 5.0, 0.0]


def test_with_values_keeps_the_rest():
    made = view(groups=torch.arange(9))
    other = made.with_values(torch.zeros(9, 2))
    assert other.values.shape == (9, 2) and other.groups is made.groups and other.positions is made.positions


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"offsets": torch.tensor([0, 5])}, "offsets"),
        ({"offsets": torch.tensor([1, 9])}, "offsets"),
        ({"offsets": torch.tensor([], dtype=torch.long)}, "offsets"),
        ({"offsets": torch.tensor([0, 5, 3, 9])}, "do not fall"),
        ({"positions": torch.arange(8)}, "positions"),
        ({"groups": torch.arange(10)}, "groups"),
        ({"protected": torch.zeros(3, dtype=torch.bool)}, "protected"),
        ({"context": torch.zeros(9, 4)}, "context"),
        ({"context": torch.zeros(2, 1, 4)}, "context"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, torch.Tensor], named: str):
    given = {"values": torch.zeros(9, 4), "offsets": torch.tensor([0, 9]), "positions": torch.arange(9), **changed}
    with pytest.raises(DataError, match=named):
        TokenView(**given)


@pytest.mark.parametrize("offsets", [[0, 5], [0, 12], [0, 5, 3, 9], [0, 3, -1, 9]])
def test_of_names_what_does_not_fit_too(offsets: list[int]):
    with pytest.raises(DataError, match="offsets"):
        TokenView.of(torch.zeros(9, 4), torch.tensor(offsets))


@pytest.mark.parametrize("lengths", [[7, 1], [-1, 3]])
def test_padded_names_what_does_not_fit_too(lengths: list[int]):
    with pytest.raises(DataError):
        TokenView.padded(torch.zeros(2, 6, 4), torch.tensor(lengths))


def test_a_width_below_the_longest_row_does_not_shift_rows():
    """Either an error or rows that are cut; never tokens of one row in another."""
    values = torch.arange(5.0)
    try:
        cut = to_padded(values, torch.tensor([0, 3, 5]), width=2)
    except DataError:
        return
    assert cut.tolist() == [[0.0, 1.0], [3.0, 4.0]]


def test_rows_of_offsets():
    assert row_of(torch.tensor([0, 0, 2, 2, 3])).tolist() == [1, 1, 3]
    assert offsets_of(torch.tensor([0, 2, 0, 1])).tolist() == [0, 0, 2, 2, 3]


def test_long_sums_in_half_precision_do_not_stand_still() -> None:
    ones, group = torch.ones(1000, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long)
    assert float(group_means(ones, group, 1)) == 1.0
    assert float(row_sums(ones, torch.tensor([0, 1000]))) == 1000.0
    assert group_sums(torch.ones(3, dtype=torch.long), torch.tensor([0, 0, 1]), 2).tolist() == [2, 1]
