# SPDX-License-Identifier: Apache-2.0
"""Per-token pattention: TokenFormer's layer for each token, and a ranker that grows without a jump."""

import pytest
import torch
from torch import nn

from recsys.core.errors import ConfigError
from recsys.efficiency.growth.tokenformer import Pattention, grow_optimizer_state
from recsys.ranking.per_token import PerTokenPattention, SwiGLU, grow

TOKENS, DIM = 3, 6


def build(expansion: float = 2.0) -> PerTokenPattention:
    torch.manual_seed(0)
    return PerTokenPattention(PerTokenPattention.Config(expansion=expansion, down_init=1.0), TOKENS, DIM).double()


def drawn(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, TOKENS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_token_has_a_pattention_of_its_own() -> None:
    module, x = build(), drawn()
    for t in range(TOKENS):
        alone = Pattention(DIM, DIM, module.pairs).double()
        with torch.no_grad():
            alone.key.copy_(module.key[:, t])
            alone.value.copy_(module.value[:, t])
        torch.testing.assert_close(module(x)[:, t], alone(x[:, t]))


def test_growing_changes_no_result_and_new_pairs_learn() -> None:
    module, x = build(), drawn()
    before = module(x).detach()
    module.grow(7)
    assert module.pairs == 19
    torch.testing.assert_close(module(x), before, atol=1e-10, rtol=0)
    (module(x) * drawn()).sum().backward()
    assert module.key.grad is not None and module.value.grad is not None
    assert bool((module.key.grad[12:].abs() > 0).all())
    assert module.value.grad[12:].eq(0).all()  # their scores are zero at first


def test_a_grown_module_is_loaded_into_a_small_one() -> None:
    grown, fresh, x = build(), build(), drawn()
    grown.grow(4)
    with torch.no_grad():
        grown.key.add_(0.1)
    fresh.load_state_dict(grown.state_dict())
    assert fresh.pairs == 16
    torch.testing.assert_close(fresh(x), grown(x), atol=0, rtol=0)


def test_a_model_grows_as_a_whole_and_its_optimizer_goes_on() -> None:
    model = nn.Sequential(build(), build(1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = drawn()

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    step()
    before = model(x).detach()
    moments = optimizer.state[model[0].key]["exp_avg"].clone()
    assert grow(model, 2.0) == TOKENS * (12 + 6)
    grow_optimizer_state(optimizer)
    torch.testing.assert_close(model(x), before, atol=1e-10, rtol=0)
    torch.testing.assert_close(optimizer.state[model[0].key]["exp_avg"][:12], moments)
    for _ in range(3):
        step()
    assert not model[0].key[12:].eq(0).all()
    assert float((model(x).detach() - 1).square().mean()) < float((before - 1).square().mean())


def test_flops_are_those_of_two_products() -> None:
    module = build()
    assert module.flops == 4 * TOKENS * DIM * module.pairs
    module.grow(2)
    assert module.flops == 4 * TOKENS * DIM * 14


def test_what_cannot_grow_says_so() -> None:
    with pytest.raises(ConfigError, match="expected a model whose per_token is 'pattention'"):
        grow(SwiGLU(SwiGLU.Config(), TOKENS, DIM), 2.0)
    with pytest.raises(ConfigError, match=r"factor: expected at least 1, got 0\.5"):
        grow(build(), 0.5)
    with pytest.raises(ConfigError, match="pairs: expected at least 0, got -1"):
        build().grow(-1)
