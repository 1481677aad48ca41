# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from recsys.ranking.per_token import FFN, PerToken, SwiGLU, hidden_width, xavier_uniform_per_token_

T, D = 3, 4


def build(cls: type[PerToken], *, bias: bool = True, down_init: float = 1.0) -> PerToken:
    module = cls(cls.Config(expansion=1.5, bias=bias, down_init=down_init), T, D).double()  # type: ignore[attr-defined]
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def linear(weight_io: torch.Tensor, bias_1o: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(*weight_io.shape, bias=bias_1o is not None).double()
    layer.weight.data = weight_io.T.clone()
    if bias_1o is not None:
        layer.bias.data = bias_1o[0].clone()
    return layer


def at(parameter: nn.Parameter | None, token: int) -> torch.Tensor | None:
    return None if parameter is None else parameter.data[token]


def oracle(module: PerToken, token: int, x_bd: torch.Tensor) -> torch.Tensor:
    """One token's transformation out of ``nn.Linear`` layers."""
    down = linear(module.down.data[token], at(module.down_bias, token))
    if isinstance(module, FFN):
        return down(nn.GELU()(linear(module.up.data[token], at(module.up_bias, token))(x_bd)))
    both = at(module.gate_up_bias, token)
    gates, ups = (None, None) if both is None else both.chunk(2, dim=1)
    gate, up = module.gate_up.data[token].chunk(2, dim=1)
    return down(functional.silu(linear(gate, gates)(x_bd)) * linear(up, ups)(x_bd))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [SwiGLU, FFN])
def test_each_token_is_a_network_of_linear_layers(cls: type[PerToken], bias: bool) -> None:
    module, x = build(cls, bias=bias), torch.randn(5, T, D, dtype=torch.float64)
    expected = torch.stack([oracle(module, t, x[:, t]) for t in range(T)], dim=1)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("cls", [SwiGLU, FFN])
def test_equal_weights_make_one_shared_network(cls: type[PerToken]) -> None:
    module, x = build(cls), torch.randn(5, T, D, dtype=torch.float64)
    for parameter in module.parameters():
        parameter.data[:] = parameter.data[:1].clone()
    torch.testing.assert_close(module(x), oracle(module, 0, x))


@pytest.mark.parametrize("cls", [SwiGLU, FFN])
def test_weights_of_a_token_touch_that_token_alone(cls: type[PerToken]) -> None:
    module, x = build(cls), torch.randn(5, T, D, dtype=torch.float64)
    before = module(x)
    for parameter in module.parameters():
        parameter.data[1] += 0.1
    changed = (module(x) != before).any(dim=(0, 2))
    assert changed.tolist() == [False, True, False]
    module(x)[:, 2].sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad[:2].abs().max() == 0
        assert parameter.grad[2].abs().max() > 0


@pytest.mark.parametrize("cls", [SwiGLU, FFN])
def test_tokens_may_be_permuted_together_with_their_weights(cls: type[PerToken]) -> None:
    module, x, order = build(cls), torch.randn(5, T, D, dtype=torch.float64), torch.tensor([2, 0, 1])
    before = module(x)
    for parameter in module.parameters():
        parameter.data = parameter.data[order]
    torch.testing.assert_close(module(x[:, order]), before[:, order])


@pytest.mark.parametrize("cls", [SwiGLU, FFN])
def test_gradients_agree_with_finite_differences(cls: type[PerToken]) -> None:
    module = build(cls)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_fans_are_those_of_one_tokens_matrix() -> None:
    weight = torch.empty(7, 30, 50)
    torch.manual_seed(0)
    xavier_uniform_per_token_(weight, fan_out=50)
    bound = math.sqrt(6 / 80)
    for token in weight:
        assert bound * 0.98 < token.abs().max() <= bound
        assert token.var().item() == pytest.approx(2 / 80, rel=0.1)  # Xavier: 2 / (fan_in + fan_out)


def test_swiglu_starts_with_a_small_down_matrix_only() -> None:
    torch.manual_seed(0)
    module = SwiGLU(SwiGLU.Config(expansion=2.0), tokens=4, dim=20)
    bound = math.sqrt(6 / (20 + 40))  # gate and up are D x hidden each, not one D x 2 hidden
    gate, up = module.gate_up.data.chunk(2, dim=2)
    for matrix, scale in ((gate, 1), (up, 1), (module.down.data, 0.01)):
        highest = matrix.abs().amax(dim=(1, 2))
        assert (highest > 0.98 * scale * bound).all()
        assert (highest <= scale * bound).all()
    assert module.gate_up_bias is None
    assert module.down_bias is None


def test_biases_start_at_zero() -> None:
    for module in (SwiGLU(SwiGLU.Config(bias=True), T, D), FFN(FFN.Config(), T, D)):
        biases = [p for name, p in module.named_parameters() if "bias" in name]
        assert len(biases) == 2
        assert all(bias.abs().max() == 0 for bias in biases)


def test_parameter_counts() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    tokens, dim = 5, 6
    assert count(SwiGLU(SwiGLU.Config(expansion=2), tokens, dim)) == 3 * 2 * tokens * dim**2
    assert count(FFN(FFN.Config(expansion=4), tokens, dim)) == tokens * (2 * 4 * dim**2 + 4 * dim + dim)


@pytest.mark.parametrize(("expansion", "dim", "expected"), [(2.0, 8, 16), (8 / 3, 12, 32), (0.01, 8, 1), (1.5, 3, 4)])
def test_hidden_width_is_rounded_and_positive(expansion: float, dim: int, expected: int) -> None:
    assert hidden_width(expansion, dim) == expected


def test_results_lie_tokens_outermost_in_memory() -> None:
    for module in (build(SwiGLU), build(FFN)):
        y = module(torch.randn(5, T, D, dtype=torch.float64))
        assert y.transpose(0, 1).is_contiguous()
