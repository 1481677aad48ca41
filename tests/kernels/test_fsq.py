# SPDX-License-Identifier: Apache-2.0
"""FSQ against its definition, bit for bit, and its own identities; the tokenizer's tests hold it against vector-quantize-pytorch."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.fsq import cpu, fsq, reference

CASES = [
    ("tanh", (8, 8, 8, 6, 5)),
    ("tanh", (3,)),
    ("tanh", (1000, 4)),
    ("sigmoid", (2, 2, 2)),
    ("sigmoid", (8, 5, 5, 5)),
    ("sigmoid", (1 << 20,)),
]


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("form", "levels"), CASES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("way", ["cpu", "native"])
def test_is_the_definition_to_the_last_bit(form, levels: tuple[int, ...], dtype: torch.dtype, scale: float, way: backend.Backend) -> None:
    z = drawn(200, 3, len(levels), scale=scale).to(dtype)
    z[0] = 0.0
    z.requires_grad_()
    other = z.detach().clone().requires_grad_()
    with backend.use(way):
        values, index = fsq(z, levels, form)
    expected, expected_index = reference.fsq(other, levels, form)
    upstream = drawn(*z.shape, seed=1).to(dtype)
    assert torch.equal(values, expected) and torch.equal(torch.signbit(values), torch.signbit(expected))
    assert values.dtype == dtype and index.dtype == torch.int64 and torch.equal(index, expected_index)
    with backend.use(way):
        values.backward(upstream)
    expected.backward(upstream)
    assert z.grad is not None and other.grad is not None
    exact = {"rtol": 0.0, "atol": 0.0} if way == "cpu" else {}  # of the gradient no code depends
    torch.testing.assert_close(z.grad, other.grad, **exact)


@pytest.mark.parametrize(("form", "levels"), [("tanh", (4, 3, 5)), ("sigmoid", (2, 3, 4))])
def test_every_code_is_the_number_of_its_levels(form, levels: tuple[int, ...]) -> None:
    """The first level runs fastest; z is the middle of every cell."""
    cells = torch.tensor([cell[::-1] for cell in itertools.product(*(range(level) for level in levels[::-1]))]).double()
    sizes = torch.tensor(levels).double()
    if form == "sigmoid":
        z, wanted = torch.logit(cells / (sizes - 1), eps=1e-6), 2 * cells / (sizes - 1) - 1
    else:
        half, offset, shift = reference.box(levels, torch.float64, torch.device("cpu"))
        level = cells - sizes.long() // 2
        z, wanted = ((level + offset) / half).atanh() - shift, level / (sizes.long() // 2)
    values, index = fsq(z.float(), levels, form)
    assert torch.equal(index, torch.arange(len(cells)))
    torch.testing.assert_close(values, wanted.float())


@pytest.mark.parametrize(("form", "levels"), CASES[:5], ids=str)
def test_the_gradient_is_that_of_the_bound(form, levels: tuple[int, ...]) -> None:
    """By finite differences of the bound: those of the levels themselves are zero."""
    z = drawn(4, 2, len(levels)).double().requires_grad_()
    upstream = drawn(4, 2, len(levels), seed=1).double()

    def smooth(x: Tensor) -> Tensor:
        return reference.normalised(reference.bound(x, levels, form), levels, form)

    (expected,) = torch.autograd.grad(smooth(z), z, upstream)
    torch.testing.assert_close(cpu.backward(upstream, z.detach(), levels, form), expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(smooth, z)


@pytest.mark.parametrize("form", ["tanh", "sigmoid"])
def test_codes_beyond_int32_are_exact(form) -> None:
    levels = (1000,) * 6
    z = torch.tensor([-30.0, 30.0])[:, None].expand(2, 6)
    _, index = fsq(z, levels, form)
    assert index.tolist() == [0, 1000**6 - 1]


def test_any_leading_axes_and_none_of_an_axis() -> None:
    z = drawn(2, 3, 4, 2)
    values, index = fsq(z, (5, 5))
    assert values.shape == z.shape and index.shape == (2, 3, 4)
    assert torch.equal(fsq(z[1, 2, 3], (5, 5))[1], index[1, 2, 3])
    empty = torch.zeros(0, 4, 2, requires_grad=True)
    values, index = fsq(empty, (5, 5))
    values.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4, 2) and index.shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="form: expected one of tanh, sigmoid, got 'relu'"):
        fsq(torch.zeros(1, 1), (5,), "relu")  # type: ignore[arg-type]
    for form, levels, limits in (
        ("tanh", (2,), "3 to 1000"),
        ("tanh", (1001,), "3 to 1000"),
        ("sigmoid", (1,), "2 to 1048576"),
        ("tanh", (), "3 to 1000"),
    ):
        with pytest.raises(ValueError, match=f"levels: expected one or more of {limits} for the form '{form}', got"):
            fsq(torch.zeros(1, len(levels)), levels, form)
    with pytest.raises(ValueError, match="more than an int64 can number"):
        fsq(torch.zeros(1, 7), (1000,) * 7)
    with pytest.raises(
        ValueError, match=r"z: expected floating-point \[\.\.\., 2\], as there are levels, got torch.float32 of shape \(1, 3\)"
    ):
        fsq(torch.zeros(1, 3), (5, 5))
    with pytest.raises(ValueError, match="z: expected floating-point"):
        fsq(torch.zeros(1, 2, dtype=torch.int64), (5, 5))
