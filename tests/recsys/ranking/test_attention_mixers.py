# SPDX-License-Identifier: Apache-2.0
"""Attention against loops in numpy and against torch's own, and what its three kinds have in common."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.ranking.mixers import HeteroAttention, HiFormer, SelfAttention
from recsys.ranking.mixers.attention import attend

KINDS = ["self_attention", "hetero_attention", "hiformer"]
SHAPES = [(4, 8, 2), (3, 6, 1), (5, 6, 6), (1, 4, 2)]  # T, D, H
NAMES = ("query", "key", "value")


def build(name: str, tokens: int, dim: int, heads: int, **settings: Any) -> Any:
    cls = components.get("mixer", name)
    torch.manual_seed(0)
    return cls(cls.Config(heads=heads, **settings), tokens, dim).double()


def tokens_of(tokens: int, dim: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def looped(x: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, out: np.ndarray, heads: int) -> np.ndarray:
    """Heterogeneous attention of one row, matrices ``[T, D, D]``, one inner product after another."""
    tokens, dim = x.shape
    width, result = dim // heads, np.zeros_like(x)
    q, k, v = (np.stack([x[t] @ matrices[t] for t in range(tokens)]) for matrices in (query, key, value))
    for i in range(tokens):
        mixed = np.zeros(dim)
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            weights = np.exp([q[i, own] @ k[j, own] / np.sqrt(width) for j in range(tokens)])
            mixed[own] = sum(weights[j] * v[j, own] for j in range(tokens)) / weights.sum()
        result[i] = mixed @ out[i]
    return result


def make_composite(module: HiFormer, twin: HeteroAttention) -> None:
    """Give ``module`` the block-diagonal projections diag(Q_1, …, Q_T) and so on, and the output matrices of ``twin``."""
    with torch.no_grad():
        for name in NAMES:
            getattr(module, name).factors[0].copy_(torch.block_diag(*getattr(twin, name)))
        module.out.copy_(twin.out)


@pytest.mark.parametrize(("tokens", "dim", "heads"), SHAPES)
def test_heterogeneous_attention_equals_loops(tokens: int, dim: int, heads: int) -> None:
    module, x = build("hetero_attention", tokens, dim, heads), tokens_of(tokens, dim)
    matrices = [getattr(module, name).detach().numpy() for name in (*NAMES, "out")]
    expected = np.stack([looped(row, *matrices, heads) for row in x.numpy()])
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("tokens", "dim", "heads"), SHAPES)
def test_self_attention_equals_that_of_torch(tokens: int, dim: int, heads: int) -> None:
    module, x = build("self_attention", tokens, dim, heads), tokens_of(tokens, dim)
    peer = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([getattr(module, name).weight for name in NAMES]))
        peer.out_proj.weight.copy_(module.out.weight)
    torch.testing.assert_close(module(x), peer(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(("tokens", "dim", "heads"), SHAPES)
def test_equal_matrices_make_heterogeneous_attention_vanilla(tokens: int, dim: int, heads: int) -> None:
    shared, module, x = build("self_attention", tokens, dim, heads), build("hetero_attention", tokens, dim, heads), tokens_of(tokens, dim)
    before = module(x)
    with torch.no_grad():
        for name in (*NAMES, "out"):
            getattr(module, name).copy_(getattr(shared, name).weight.T.expand(tokens, dim, dim))
    torch.testing.assert_close(module(x), shared(x))
    assert not torch.allclose(before, shared(x))


@pytest.mark.parametrize(("tokens", "dim", "heads"), SHAPES)
def test_block_diagonal_projections_make_hiformer_heterogeneous_attention(tokens: int, dim: int, heads: int) -> None:
    twin, module, x = build("hetero_attention", tokens, dim, heads), build("hiformer", tokens, dim, heads), tokens_of(tokens, dim)
    make_composite(module, twin)
    torch.testing.assert_close(module(x), twin(x))
    if tokens > 1:
        with torch.no_grad():
            module.query.factors[0][0, -1] += 1  # off the diagonal: the last token's query reads the first token
        assert not torch.allclose(module(x), twin(x))


def test_low_rank_projections_equal_the_full_one_with_their_product() -> None:
    low, full, x = build("hiformer", 4, 6, 3, rank=5), build("hiformer", 4, 6, 3), tokens_of(4, 6)
    with torch.no_grad():
        for name in NAMES:
            left, right = getattr(low, name).factors
            assert (left.shape, right.shape) == ((24, 5), (5, 24))
            getattr(full, name).factors[0].copy_(left @ right)
        full.out.copy_(low.out)
    torch.testing.assert_close(low(x), full(x))


def test_a_rank_of_all_coordinates_loses_nothing() -> None:
    """The factors of a singular value decomposition of Q̂ with r = T D give the full projections."""
    low, full, x = build("hiformer", 3, 4, 2, rank=12), build("hiformer", 3, 4, 2), tokens_of(3, 4)
    with torch.no_grad():
        for name in NAMES:
            u, s, vh = torch.linalg.svd(getattr(full, name).factors[0])
            left, right = getattr(low, name).factors
            left.copy_(u * s)
            right.copy_(vh)
        low.out.copy_(full.out)
    torch.testing.assert_close(low(x), full(x))


def test_self_attention_does_not_see_the_order_of_tokens() -> None:
    module, x, order = build("self_attention", 5, 8, 2), tokens_of(5, 8), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


@pytest.mark.parametrize("name", ["hetero_attention", "hiformer"])
def test_permuting_tokens_and_weights_permutes_the_result(name: str) -> None:
    tokens, dim, order = 5, 6, torch.tensor([3, 0, 4, 1, 2])
    module, other, x = build(name, tokens, dim, 3), build(name, tokens, dim, 3), tokens_of(tokens, dim)
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])
    with torch.no_grad():
        other.out.copy_(module.out[order])
        for part in NAMES:
            if name == "hetero_attention":
                getattr(other, part).copy_(getattr(module, part)[order])
            else:
                blocks = getattr(module, part).factors[0].unflatten(0, (tokens, dim)).unflatten(2, (tokens, dim))
                getattr(other, part).factors[0].copy_(blocks[order][:, :, order].flatten(2).flatten(0, 1))
    torch.testing.assert_close(other(x[:, order]), module(x)[:, order])


def test_only_hiformer_lets_a_query_read_other_tokens() -> None:
    for name, reads in (("self_attention", False), ("hetero_attention", False), ("hiformer", True)):
        module = build(name, 3, 4, 2)
        jacobian = torch.autograd.functional.jacobian(lambda x, module=module: module.project(x)[0], tokens_of(3, 4, rows=1))
        between = jacobian[0, :, :, 0].abs().amax(dim=(1, 3)) > 0
        assert torch.equal(between, torch.ones(3, 3, dtype=torch.bool) if reads else torch.eye(3, dtype=torch.bool)), name


def test_equal_keys_make_attention_the_mean_of_the_values() -> None:
    x = tokens_of(4, 6)
    torch.testing.assert_close(attend(x, torch.ones_like(x), x, heads=3), x.mean(1, keepdim=True).expand_as(x))


def test_the_scale_multiplies_the_inner_products() -> None:
    q, k, v = tokens_of(4, 6, rows=9).split(3)
    torch.testing.assert_close(attend(q, k, v, heads=2, scale=1.0), attend(q * 3**0.5, k, v, heads=2))
    weights = functional.softmax(torch.einsum("btd,bsd->bts", q, k), dim=-1)
    torch.testing.assert_close(attend(q, k, v, heads=1, scale=1.0), weights @ v)


@pytest.mark.parametrize(("tokens", "dim", "heads"), SHAPES)
@pytest.mark.parametrize(("name", "rank"), [("self_attention", None), ("hetero_attention", None), ("hiformer", None), ("hiformer", 3)])
def test_parameters_and_flops_equal_the_formulas(name: str, rank: int | None, tokens: int, dim: int, heads: int) -> None:
    module = build(name, tokens, dim, heads, **({} if rank is None else {"rank": rank})).float()
    weights = {
        "self_attention": 4 * dim**2,
        "hetero_attention": 4 * tokens * dim**2,
        "hiformer": tokens * dim**2 + (3 * tokens**2 * dim**2 if rank is None else 6 * rank * tokens * dim),
    }[name]
    assert sum(p.numel() for p in module.parameters()) == weights
    used = 4 * tokens * dim**2 if name == "self_attention" else weights
    assert module.flops == 2 * used + 4 * tokens**2 * dim
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            module(torch.randn(7, tokens, dim))
        assert counter.get_total_flops() == 7 * module.flops


@pytest.mark.parametrize("name", KINDS)
def test_tokens_lie_outermost_in_memory(name: str) -> None:
    x = torch.randn(4, 5, 8, dtype=torch.float64).transpose(0, 1)
    assert build(name, 4, 8, 2)(x).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_near_and_graphs_export(name: str) -> None:
    module, x = build(name, 4, 8, 2).float(), tokens_of(4, 8).float()
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(exported(x[:2]), module(x[:2]))
    expected = module(x)
    got = module.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", KINDS)
def test_heads_must_divide_dim(name: str) -> None:
    with pytest.raises(ConfigError, match="dim=8 and heads=3"):
        build(name, 4, 8, 3)


def test_projections_that_all_tokens_share_do_not_depend_on_their_number() -> None:
    few, many = build("self_attention", 2, 8, 2), build("self_attention", 7, 8, 2)
    assert isinstance(many, SelfAttention)
    many.load_state_dict(few.state_dict())
    x = tokens_of(2, 8)
    torch.testing.assert_close(many(x), few(x))
