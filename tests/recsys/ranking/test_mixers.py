# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from recsys.core.errors import ConfigError
from recsys.ranking.mixers import TokenMix, mix, revert

SHAPES = [(4, 4, 8), (3, 2, 6), (2, 3, 6), (5, 1, 4), (1, 4, 4), (6, 4, 12)]  # T, H, D


def permutation(tokens: int, heads: int) -> np.ndarray:
    """G [TH, TH]: block h * T + t of the output reads block t * H + h of the input."""
    matrix = np.zeros((tokens * heads, tokens * heads))
    for t in range(tokens):
        for h in range(heads):
            matrix[h * tokens + t, t * heads + h] = 1
    return matrix


@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_mix_is_the_permutation_g_kron_identity(tokens: int, heads: int, dim: int) -> None:
    x = torch.randn(3, tokens, dim)
    matrix = np.kron(permutation(tokens, heads), np.eye(dim // heads))
    expected = (x.flatten(1).numpy() @ matrix.T).reshape(3, heads, tokens * dim // heads)
    np.testing.assert_array_equal(mix(x, heads).numpy(), expected.astype(np.float32))


def test_mix_of_the_worked_example_of_unimixer() -> None:
    x = torch.arange(1.0, 13.0).reshape(1, 2, 6)
    assert mix(x, 2).tolist() == [[[1, 2, 3, 7, 8, 9], [4, 5, 6, 10, 11, 12]]]


@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_revert_undoes_mix_bitwise_and_is_mix_with_roles_exchanged(tokens: int, heads: int, dim: int) -> None:
    x = torch.randn(3, tokens, dim)
    mixed = mix(x, heads)
    assert mixed.shape == (3, heads, tokens * dim // heads)
    assert torch.equal(revert(mixed, tokens), x)
    assert torch.equal(mix(mixed, tokens), x)
    assert torch.equal(mix(revert(mixed, tokens), heads), mixed)


@pytest.mark.parametrize(("tokens", "heads", "dim"), SHAPES)
def test_mix_is_an_isometry_whose_gradient_is_revert(tokens: int, heads: int, dim: int) -> None:
    x = torch.randn(3, tokens, dim, dtype=torch.float64, requires_grad=True)
    mixed = mix(x, heads)
    assert torch.linalg.norm(mixed).item() == pytest.approx(torch.linalg.norm(x).item(), rel=1e-14)
    upstream = torch.randn_like(mixed)
    (gradient,) = torch.autograd.grad(mixed, x, upstream)
    assert torch.equal(gradient, revert(upstream, tokens))
    assert torch.autograd.gradcheck(lambda v: mix(v, heads), x)
    assert torch.autograd.gradcheck(lambda v: revert(v, tokens), upstream.requires_grad_())


@pytest.mark.parametrize(("tokens", "heads"), [(4, 4), (3, 2), (2, 4), (6, 4)])
def test_the_permutation_is_doubly_stochastic_and_an_involution_exactly_when_square(tokens: int, heads: int) -> None:
    basis = torch.eye(tokens * heads).reshape(-1, tokens, heads)
    matrix = mix(basis, heads).flatten(1).T.numpy()  # column j is the image of the j-th basis vector
    np.testing.assert_array_equal(matrix.sum(0), 1)
    np.testing.assert_array_equal(matrix.sum(1), 1)
    assert (np.array_equal(matrix, matrix.T) and np.array_equal(matrix @ matrix, np.eye(len(matrix)))) == (tokens == heads)


def test_every_mixed_token_holds_one_slice_of_every_token() -> None:
    tokens, heads, dim = 4, 4, 8
    x = torch.randn(1, tokens, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: mix(v, heads), x)[0, :, :, 0]  # [H, T*d, T, D]
    for h in range(heads):
        for t in range(tokens):
            assert torch.linalg.matrix_rank(jacobian[h, :, t]) == dim // heads


def test_heads_default_to_the_number_of_tokens() -> None:
    module = TokenMix(TokenMix.Config(), tokens=4, dim=8)
    assert (module.mixed_tokens, module.mixed_dim) == (4, 8)


@pytest.mark.parametrize("heads", [5, 0, -2])
def test_heads_that_do_not_divide_dim_are_named(heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"dim=8 and heads={heads}"):
        TokenMix(TokenMix.Config(heads=heads), tokens=4, dim=8)
    with pytest.raises(ConfigError, match=r"dim=8 and heads=3"):
        TokenMix(TokenMix.Config(), tokens=3, dim=8)
