# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantisation against vector-quantize-pytorch, and its own identities."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vector_quantize_pytorch import FSQ as Theirs

from kernels.fsq import Form
from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.tokenizers import FSQ

FORMS: list[Form] = ["tanh", "sigmoid"]
LEVELS = [(8, 8, 8, 6, 5), (8, 5, 5, 5), (3,), (4, 3), (7, 5, 5), (16, 9)]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def inverse_bound(fsq: FSQ, level: Tensor) -> Tensor:
    """Some z whose bound is, but for rounding, these levels; in float64."""
    sizes, level = fsq.levels.double(), level.double()
    if fsq.form == "sigmoid":
        return torch.logit(level / (sizes - 1), eps=1e-9)
    half = (sizes - 1) * 1.001 / 2
    offset = torch.where(fsq.levels % 2 == 0, 0.5, 0.0).double()
    return ((level + offset) / half).atanh() - (offset / half).atanh()


def unnormalised(fsq: FSQ, values: Tensor) -> Tensor:
    """The integer levels of normalised ones."""
    level = values * (fsq.levels // 2) if fsq.form == "tanh" else (values + 1) * (fsq.levels - 1) / 2
    return level.round()


# --- against vector-quantize-pytorch


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_tanh_is_theirs(levels: tuple[int, ...], scale: float) -> None:
    ours, theirs = FSQ(levels), Theirs(list(levels))
    z = normal(50, 40, len(levels), scale=scale).requires_grad_()
    other = z.detach().clone().requires_grad_()
    values, index = ours(z)
    expected, expected_index = theirs(other)
    assert torch.equal(values, expected) and torch.equal(index, expected_index.long())
    weight = normal(*values.shape, seed=1)
    (values * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)
    every = torch.arange(ours.size)
    assert torch.equal(ours.values(every), theirs.indices_to_codes(every))


@pytest.mark.parametrize("levels", [*LEVELS, (2, 2, 2), (2, 5)], ids=str)
def test_sigmoid_is_their_symmetric_one_at_half_of_z(levels: tuple[int, ...]) -> None:
    ours, theirs = FSQ(levels, "sigmoid"), Theirs(list(levels), preserve_symmetry=True)
    z = normal(50, 40, len(levels), scale=2.0)
    fraction = ours.bound(z) % 1
    clear = ((fraction - 0.5).abs() > 1e-5).all(-1)  # where two formulas cannot round to different sides
    assert clear.float().mean() > 0.99
    z = z[clear][None].requires_grad_()
    other = z.detach().clone().requires_grad_()
    values, index = ours(z)
    expected, expected_index = theirs(other / 2)
    torch.testing.assert_close(values, expected)
    assert torch.equal(index, expected_index.long())
    values.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(z.grad, other.grad)


# --- the numbering


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_codes_number_the_levels_and_back(levels: tuple[int, ...], form: Form) -> None:
    fsq = FSQ(levels, form)
    assert fsq.size == math.prod(levels)
    values = fsq.values(torch.arange(fsq.size))
    assert values.shape == (fsq.size, len(levels)) and values.dtype == torch.float32
    lowest = [level // 2 if form == "tanh" else 0 for level in levels]
    # The first level turns fastest: the index is Σ_j level_j Π_{m<j} L_m.
    expected = [combination[::-1] for combination in itertools.product(*(range(level) for level in levels[::-1]))]
    assert torch.equal(unnormalised(fsq, values) + torch.tensor(lowest), torch.tensor(expected).float())
    # Idempotent: a z whose bound is a level quantises to this level.
    again, index = fsq(inverse_bound(fsq, unnormalised(fsq, values)))
    assert torch.equal(index, torch.arange(fsq.size))
    torch.testing.assert_close(again.float(), values)


@given(
    levels=st.lists(st.integers(3, 40), min_size=1, max_size=6).map(tuple),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 20),
)
@settings(max_examples=60, deadline=None)
def test_quantised_values_are_those_of_their_codes(levels: tuple[int, ...], form: Form, seed: int, scale: float) -> None:
    fsq = FSQ(levels, form)
    z = normal(30, len(levels), seed=seed, scale=scale)
    values, index = fsq(z)
    assert index.dtype == torch.int64 and bool(((index >= 0) & (index < fsq.size)).all())
    torch.testing.assert_close(fsq.values(index), values)
    assert values.abs().max() <= 1 + 1e-6
    # Dimensions do not meet, whatever their order.
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(seed))
    permuted, permuted_index = FSQ(tuple(levels[j] for j in order.tolist()), form)(z[:, order])
    assert torch.equal(permuted, values[:, order])
    assert len(permuted_index.unique()) == len(index.unique())


@pytest.mark.parametrize("form", FORMS)
def test_codes_beyond_int32_are_exact(form: Form) -> None:
    fsq = FSQ((1000,) * 6, form)
    ends = torch.tensor([0, fsq.size - 1, 123_456_789_012_345_678])
    _, index = fsq(inverse_bound(fsq, unnormalised(fsq, fsq.values(ends))))
    assert torch.equal(index, ends)


@pytest.mark.parametrize("wrong", [-1, 60])
def test_a_code_outside_is_an_error(wrong: int) -> None:
    with pytest.raises(DataError, match=f"0 to 59.*{wrong}"):
        FSQ((3, 4, 5)).values(torch.tensor([0, wrong, 59]))


@pytest.mark.parametrize(
    ("levels", "form", "message"),
    [
        ((), "tanh", "one or more of 3 to 1000"),
        ((5, 2), "tanh", "one or more of 3 to 1000"),
        ((5, 1001), "tanh", "one or more of 3 to 1000"),
        ((5, 1), "sigmoid", "one or more of 2 to"),
        ((0,), "sigmoid", "one or more of 2 to"),
        ((1 << 20,) * 4, "sigmoid", "int64"),
    ],
)
def test_bad_levels_are_an_error(levels: tuple[int, ...], form: Form, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FSQ(levels, form)


# --- the bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [3, 4, 5, 6, 7, 8, 16, 33, 256, 1000])
def test_each_dimension_has_exactly_its_levels(form: Form, size: int) -> None:
    z = torch.linspace(-12, 12, 100_001)[:, None]
    values, index = FSQ((size,), form)(z)
    assert torch.equal(index.unique(), torch.arange(size))
    assert bool((index.diff() >= 0).all()) and bool((values[:, 0].diff() >= 0).all()), "monotone"


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_zero_is_the_centre(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    values, index = fsq(torch.zeros(len(levels)))
    assert torch.equal(values, torch.zeros(len(levels)))
    assert int(index) == sum(level // 2 * math.prod(levels[:j]) for j, level in enumerate(levels))
    torch.testing.assert_close(fsq.bound(torch.zeros(len(levels))), torch.zeros(len(levels)), atol=1e-6, rtol=0)
    odd = FSQ(tuple(level | 1 for level in levels), "sigmoid")
    assert torch.equal(odd(torch.zeros(len(levels)))[0], torch.zeros(len(levels)))


@pytest.mark.parametrize("form", FORMS)
def test_far_values_are_finite_and_at_the_ends(form: Form) -> None:
    levels = (8, 5, 3, 64)
    fsq = FSQ(levels, form)
    z = torch.full((2, 4), 1e4) * torch.tensor([[1.0], [-1.0]])
    z.requires_grad_()
    values, index = fsq(z)
    assert index.tolist() == [fsq.size - 1, 0]
    values.sum().backward()
    assert bool(values.isfinite().all()) and z.grad is not None and bool(z.grad.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_the_bounds(form: Form) -> None:
    fsq = FSQ((8, 8, 8, 6, 5), form)
    z = normal(64, 5, scale=2.0).double().requires_grad_()
    width = fsq.levels // 2 if form == "tanh" else (fsq.levels - 1) / 2
    (expected,) = torch.autograd.grad((fsq.bound(z) / width).sum(), z)
    (got,) = torch.autograd.grad(fsq(z)[0].sum(), z)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(fsq.bound, (z,))


# --- narrow types


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_codes_of_float32(form: Form, dtype: torch.dtype) -> None:
    fsq = FSQ((8, 8, 8, 6, 5), form)
    z = normal(500, 5, scale=2.0).to(dtype)
    expected, codes = fsq(z.float())
    values, index = fsq(z)
    assert values.dtype == dtype and torch.equal(index, codes) and torch.equal(values, expected.to(dtype))
    with torch.autocast("cpu", dtype):
        values, index = fsq(z.float())
    assert values.dtype == torch.float32 and torch.equal(index, codes) and torch.equal(values, expected)
