# SPDX-License-Identifier: Apache-2.0
"""Sums of squares: what they are in the dtype they are formed in, the two norms that they serve, how results lie in memory, errors."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import rms_norm

from kernels import backend
from kernels.square_sums import OP, square_sums
from kernels.testing import error_ratio, unwritten_is_nan
from recsys.ranking.mixers.token_mix import mix

WAYS = pytest.mark.parametrize("way", ["reference", "cpu", "native"])


def laid_out(order: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """``shape``, whose axes lie in memory in ``order``, the outermost first."""
    drawn = torch.randn([shape[axis] for axis in order], generator=torch.Generator().manual_seed(0)).to(dtype)
    return drawn.permute([order.index(axis) for axis in range(4)])


def padded(x: Tensor) -> Tensor:
    """The same numbers with a gap after each part."""
    return torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[3]]


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 16, 33, 64, 130])
def test_equals_sums_in_float64(width: int, dtype: torch.dtype, way: backend.Backend) -> None:
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3)):
        x = laid_out(order, (3, 5, 21, width), dtype)
        expected = x.double().square().sum(-1)
        for given in (x, padded(x), x[:, ::2], x[:, :1].expand(-1, 5, -1, -1)):
            with backend.use(way), unwritten_is_nan():
                found = square_sums(given)
            wanted = expected if given.shape == x.shape and given.stride(1) else given.double().square().sum(-1)
            assert found.dtype == torch.promote_types(dtype, torch.float32)
            assert found.shape == given.shape[:3] and found.is_contiguous()
            assert error_ratio(found, wanted) < 3e-7


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 33, 130])
def test_the_gradient_is_twice_the_number_and_lies_as_x_does(width: int, dtype: torch.dtype, way: backend.Backend) -> None:
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3)):
        x = laid_out(order, (3, 5, 21, width), dtype)
        for given in (x, padded(x)):
            leaf = given.detach().requires_grad_()
            with backend.use(way), unwritten_is_nan():
                sums = square_sums(leaf)
                upstream = torch.randn(21, 5, 3).to(sums.dtype).permute(2, 1, 0)
                (found,) = torch.autograd.grad(sums, leaf, upstream)
            assert found.dtype == dtype and found.stride() == torch.empty_like(leaf).stride()
            assert given is not x or found.stride() == x.stride()
            torch.testing.assert_close(
                found, (2 * given * upstream[..., None]).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
            )


def test_compilers_are_told_how_results_lie() -> None:
    shape = (3, 5, 4, 8)
    layouts = [laid_out(order, shape) for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3))]
    layouts += [padded(layouts[1]), layouts[2][:, ::2], layouts[0][:1].expand(3, -1, -1, -1), layouts[1][:, :, :1]]
    for x in layouts:
        sums = torch.ops.recsys.square_sums(x)
        dx = torch.ops.recsys.square_sums_backward(sums, x)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            told = torch.ops.recsys.square_sums(fake)
            told_dx = torch.ops.recsys.square_sums_backward(told, fake)
        assert told.stride() == sums.stride() and told.dtype == sums.dtype
        assert told_dx.stride() == dx.stride() and told_dx.dtype == dx.dtype


@WAYS
def test_windows_that_overlap_are_copied(way: backend.Backend) -> None:
    """Windows that move by one number: the order of two axes with the same step is anyone's choice."""
    x = torch.randn(2, 3, 12, requires_grad=True)
    with backend.use(way):
        sums = square_sums(x.unfold(2, 4, 1))
        (found,) = torch.autograd.grad(sums.sum(), x)
    (expected,) = torch.autograd.grad(x.unfold(2, 4, 1).square().sum(), x)
    torch.testing.assert_close(sums, x.unfold(2, 4, 1).square().sum(-1))
    torch.testing.assert_close(found, expected)


def normed(tokens: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, T, D]`` and their mixed tokens, each normed by its own scale, which come from the same sums."""
    _, count, dim = tokens.shape
    sums = square_sums(tokens.unflatten(2, (parts, -1)))
    of_tokens, of_mixed = (sums.sum(2) / dim + eps).rsqrt(), (sums.sum(1) / (count * dim // parts) + eps).rsqrt()
    return tokens * of_tokens[..., None], mix(tokens, parts) * of_mixed[..., None]


def normed_by_torch(tokens: Tensor, parts: int, eps: float) -> tuple[Tensor, Tensor]:
    mixed = mix(tokens, parts)
    return rms_norm(tokens, tokens.shape[2:], eps=eps), rms_norm(mixed, mixed.shape[2:], eps=eps)


@WAYS
@pytest.mark.parametrize(("tokens", "parts", "width"), [(8, 8, 8), (16, 16, 32), (3, 5, 7)])
def test_one_result_norms_tokens_and_mixed_tokens(tokens: int, parts: int, width: int, way: backend.Backend) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 6, parts * width, generator=generator).transpose(0, 1).requires_grad_()
    with backend.use(way):
        values = normed(x, parts, 1e-6)
        upstream = [torch.randn(value.shape, generator=generator) for value in values]
        (found,) = torch.autograd.grad(values, x, upstream)
    expected = normed_by_torch(x, parts, 1e-6)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, x, upstream)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [5, 8, 32])
def test_either_view_of_the_same_tokens_gives_the_same_bits(width: int) -> None:
    view = laid_out((1, 0, 2, 3), (5, 6, 20, width))
    with backend.use("native"):
        torch.testing.assert_close(square_sums(view.transpose(1, 2)), square_sums(view).transpose(1, 2), rtol=0, atol=0)


@WAYS
def test_no_rows_are_no_error(way: backend.Backend) -> None:
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        with backend.use(way):
            square_sums(x).sum().backward()
        assert x.grad is not None and x.grad.shape == shape


def test_the_recipes_inputs_are_mixed_views() -> None:
    (x,) = OP.inputs((4, 3, 2, 5), torch.bfloat16, torch.Generator())
    assert x.shape == (4, 2, 3, 5) and x.stride() == (10, 5, 40, 1) and x.dtype == torch.bfloat16 and x.requires_grad


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3, 4), r"x: expected four axes \[B, T, P, w\], got \(2, 3, 4\)"),
        (torch.ones(2, 3, 4, 5, dtype=torch.int64), r"x: expected floats, got torch.int64"),
        (torch.ones(2, 3, 4, 5, dtype=torch.complex64), r"x: expected floats, got torch.complex64"),
        (torch.ones(2, 3, 4, 0), r"x: expected parts of at least one number, got \(2, 3, 4, 0\)"),
    ],
    ids=["axes", "whole", "complex", "width"],
)
def test_what_has_no_such_sums_is_an_error(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        square_sums(x)
