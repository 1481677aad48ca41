# SPDX-License-Identifier: Apache-2.0
"""The interactions of Wukong and of DHEN against what numpy says of them."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.ranking.mixers import Cross, Dot, Ensemble, FactorizationMachine, Linear, Mixer, TokenMix

SHAPES = [(4, 8), (5, 6), (2, 3)]  # T, D


def factorization(tokens: int, dim: int, **settings: Any) -> FactorizationMachine:
    torch.manual_seed(0)
    return FactorizationMachine(FactorizationMachine.Config(**settings), tokens, dim).double()


def ensemble(tokens: int, dim: int, **settings: Any) -> Ensemble:
    torch.manual_seed(0)
    return Ensemble(parse(Ensemble.Config, settings, source="test"), tokens, dim).double()


def tokens_of(tokens: int, dim: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def hold_flops(module: Mixer) -> None:
    with FlopCounterMode(display=False) as counter:
        module.float()(torch.randn(7, module.tokens, module.dim))
    assert counter.get_total_flops() == 7 * module.flops


@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_identity_projection_gives_all_inner_products(tokens: int, dim: int) -> None:
    module, x = factorization(tokens, dim, rank=tokens), tokens_of(tokens, dim)
    nn.init.eye_(module.projection)
    products = module.interactions(x)
    np.testing.assert_allclose(products.detach().numpy(), np.stack([row @ row.T for row in x.numpy()]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(products, products.transpose(1, 2))


@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_projected_interactions_are_the_projection_of_all_inner_products(tokens: int, dim: int) -> None:
    module, x = factorization(tokens, dim, rank=3), tokens_of(tokens, dim)
    torch.testing.assert_close(module.interactions(x), x @ x.transpose(1, 2) @ module.projection)
    torch.testing.assert_close(module.interactions(-2 * x), 4 * module.interactions(x))  # of second order


@pytest.mark.parametrize(("tokens", "dim", "fm_tokens"), [(4, 8, None), (5, 6, 4), (5, 6, 1), (2, 3, None)])
def test_the_two_blocks_stand_one_after_the_other(tokens: int, dim: int, fm_tokens: int | None) -> None:
    module, x = factorization(tokens, dim, rank=2, fm_tokens=fm_tokens, hidden=(7,)), tokens_of(tokens, dim)
    first = tokens // 2 if fm_tokens is None else fm_tokens
    nn.init.uniform_(module.norm.weight, 0.5, 1.5)
    nn.init.uniform_(module.norm.bias)
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    for row, got in zip(x.numpy(), module(x).detach().numpy(), strict=True):
        flat = (row @ row.T @ weights["projection"]).reshape(-1)
        normed = (flat - flat.mean()) / np.sqrt(flat.var() + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
        hidden = np.maximum(weights["mlp.0.weight"] @ normed + weights["mlp.0.bias"], 0)
        expected = (weights["mlp.2.weight"] @ hidden + weights["mlp.2.bias"]).reshape(first, dim)
        np.testing.assert_allclose(got[:first], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(got[first:], weights["compression"] @ row, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("tokens", "dim", "rank", "fm_tokens", "hidden"), [(4, 8, 8, 2, (32, 32)), (6, 3, 2, 5, (7,)), (3, 4, 1, 1, ())])
def test_parameters_and_flops_equal_the_formulas(tokens: int, dim: int, rank: int, fm_tokens: int, hidden: tuple[int, ...]) -> None:
    module = factorization(tokens, dim, rank=rank, fm_tokens=fm_tokens, hidden=hidden)
    widths = (tokens * rank, *hidden, fm_tokens * dim)
    products = [a * b for a, b in pairwise(widths)]
    linear = tokens * rank + (tokens - fm_tokens) * tokens
    assert sum(p.numel() for p in module.parameters()) == linear + 2 * tokens * rank + sum(products) + sum(widths[1:])
    assert module.flops == 4 * tokens * dim * rank + 2 * (tokens - fm_tokens) * tokens * dim + 2 * sum(products)
    hold_flops(module)


@pytest.mark.parametrize(("tokens", "fm_tokens"), [(4, 0), (4, 4), (1, None), (4, -1)])
def test_both_blocks_need_a_token(tokens: int, fm_tokens: int | None) -> None:
    with pytest.raises(ConfigError, match=r"fm_tokens from 1 to tokens - 1"):
        factorization(tokens, 8, fm_tokens=fm_tokens)


def test_dot_reads_every_pair_once() -> None:
    torch.manual_seed(0)
    module, x = Dot(Dot.Config(), 4, 3).double(), tokens_of(4, 3)
    expected = [[float(row[i] @ row[j]) for i in range(4) for j in range(i + 1, 4)] for row in x.numpy()]
    np.testing.assert_allclose(module.products(x).numpy(), expected, rtol=1e-12)
    assert sum(p.numel() for p in module.parameters()) == 6 * 12 + 12
    assert module.flops == 2 * 16 * 3 + 2 * 6 * 12
    hold_flops(module)
    with pytest.raises(ConfigError, match="at least 2 tokens, got 1"):
        Dot(Dot.Config(), 1, 3)


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_is_the_first_cross_layer_without_its_residual(rank: int | None) -> None:
    torch.manual_seed(0)
    module, x = Cross(Cross.Config(rank=rank), 3, 4).double(), tokens_of(3, 4)
    layers = [module.weight] if rank is None else list(module.weight)
    matrix, flat = layers[-1].weight if rank is None else layers[1].weight @ layers[0].weight, x.flatten(1)
    torch.testing.assert_close(module(x).flatten(1), flat * (flat @ matrix.T + layers[-1].bias))
    assert sum(p.numel() for p in module.parameters()) == (12 * 12 if rank is None else 2 * 2 * 12) + 12
    hold_flops(module)
    nn.init.zeros_(layers[-1].weight)
    nn.init.ones_(layers[-1].bias)
    torch.testing.assert_close(module(x.float()), x.float())


def test_linear_combines_tokens_alike_in_all_channels() -> None:
    torch.manual_seed(0)
    module, x = Linear(Linear.Config(), 3, 4).double(), tokens_of(3, 4)
    torch.testing.assert_close(module(x), torch.einsum("st,btd->bsd", module.weight, x))
    assert module.flops == 2 * 9 * 4
    hold_flops(module)


MEMBERS = [{"name": "dot"}, {"name": "self_attention", "heads": 2}, {"name": "cross", "rank": 3}, {"name": "linear"}]


@pytest.mark.parametrize("members", [MEMBERS, MEMBERS[1:3], [{"name": "factorization_machine"}, {"name": "identity"}]])
def test_the_sum_is_that_of_its_members(members: list[dict[str, Any]]) -> None:
    module, x = ensemble(5, 6, interactions=members), tokens_of(5, 6)
    assert [type(member) for member in module.interactions] == [components.get("mixer", member["name"]) for member in members]
    torch.testing.assert_close(module(x), sum(member(x) for member in module.interactions))
    hold_flops(module)


@pytest.mark.parametrize(("tokens", "shares"), [(5, [2, 1, 1, 1]), (4, [1, 1, 1, 1]), (11, [3, 3, 3, 2])])
def test_concatenation_shares_the_tokens_out(tokens: int, shares: list[int]) -> None:
    module, x = ensemble(tokens, 6, interactions=MEMBERS, combine="concat"), tokens_of(tokens, 6)
    assert [share.mixed_tokens for share in module.shares] == shares
    pieces = module(x).split(shares, dim=1)
    for piece, share, member in zip(pieces, module.shares, module.interactions, strict=True):
        torch.testing.assert_close(piece, share.weight @ member(x))
    hold_flops(module)


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_every_member_learns(combine: str) -> None:
    module = ensemble(5, 6, interactions=MEMBERS, combine=combine)
    module(tokens_of(5, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_ensembles_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="at least one mixer, got none"):
        ensemble(4, 6, interactions=[])
    with pytest.raises(ConfigError, match=r"at most as many interactions as tokens \(3\), got 4"):
        ensemble(3, 6, interactions=MEMBERS, combine="concat")
    with pytest.raises(ConfigError, match=r"stay \(4, 6\), got \(2, 12\) from TokenMix"):
        ensemble(4, 6, interactions=[TokenMix.Config(heads=2)])
    with pytest.raises(ConfigError, match="did you mean 'cross'"):
        ensemble(4, 6, interactions=[{"name": "crosss"}])
