# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.core.errors import ConfigError
from recsys.ranking.mixers import TokenMix, mix
from recsys.ranking.part import NORM_EPS
from recsys.ranking.per_token import SwiGLU
from recsys.ranking.stacks import Block, Parts, Siamese
from recsys.ranking.stacks.siamese import UniMixerBlock

TOKENS, DIM = 4, 8


class Zero(Block):
    def forward(self, x_btd: Tensor, penalties: object = None) -> Tensor:
        return torch.zeros_like(x_btd)


class Recording(Block):
    """Gives a constant, and keeps what it read."""

    def __init__(self, out_btd: Tensor) -> None:
        super().__init__()
        self.out_btd = out_btd

    def forward(self, x_btd: Tensor, penalties: object = None) -> Tensor:
        self.read = x_btd
        return self.out_btd


def build(blocks: int = 3, per_token: bool = True, heads: int | None = None) -> Siamese:
    torch.manual_seed(0)
    parts = Parts(TOKENS, DIM, TokenMix.Config(heads=heads), SwiGLU.Config(expansion=1.5, down_init=1.0) if per_token else None)
    return Siamese(Siamese.Config(), parts, blocks).double()


def random_gains(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.RMSNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)


def rows(batch: int = 3) -> Tensor:
    return torch.randn(batch, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def rms_norm(x: np.ndarray, gain: np.ndarray | float = 1.0) -> np.ndarray:
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_blocks_that_give_zero_leave_twice_the_normed_input(blocks: int) -> None:
    stack, x = build(blocks), rows()
    stack.blocks = nn.ModuleList(Zero() for _ in range(blocks))
    states = stack(x)
    assert len(states) == blocks
    for state in states:
        np.testing.assert_allclose(state.detach().numpy(), 2 * rms_norm(x.numpy()), rtol=1e-5)


def test_zero_down_matrices_make_blocks_that_give_zero() -> None:
    stack, x = build(), rows()
    for block in stack.blocks:
        nn.init.zeros_(block.per_token.down)
    np.testing.assert_allclose(stack(x)[-1].detach().numpy(), 2 * rms_norm(x.numpy()), rtol=1e-5)


def reference(stack: Siamese, x_btd: Tensor) -> list[np.ndarray]:
    """The published recursion in numpy, one sample at a time."""

    def gain(norm: nn.Module) -> np.ndarray:
        return norm.weight.detach().numpy()

    def block(module: Any, x: np.ndarray) -> np.ndarray:
        d = DIM // TOKENS
        mixed = np.stack([np.concatenate([x[t, h * d : (h + 1) * d] for t in range(TOKENS)]) for h in range(TOKENS)])
        s = rms_norm(x + mixed, gain(module.norm))
        if module.per_token is None:
            return s
        out = []
        for t in range(TOKENS):
            gate, up = np.split(s[t] @ module.per_token.gate_up.detach().numpy()[t], 2)
            out.append((gate / (1 + np.exp(-gate)) * up) @ module.per_token.down.detach().numpy()[t])
        return np.stack(out)

    samples = []
    for x in x_btd.numpy():
        normed, raw, states = x, x, []
        for number, module in enumerate(stack.blocks):
            o = block(module, normed + rms_norm(raw, gain(stack.read_norms[number])))
            normed, raw = rms_norm(normed + o, gain(stack.stream_norms[number])), raw + o
            states.append(normed + rms_norm(raw, gain(stack.read_norms[number + 1])))
        samples.append(np.stack(states))
    return list(np.stack(samples, axis=1))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("blocks", [1, 3])
def test_it_is_the_published_recursion(blocks: int, per_token: bool) -> None:
    stack, x = build(blocks, per_token), rows()
    random_gains(stack)
    for got, expected in zip(stack(x), reference(stack, x), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_raw_stream_is_the_plain_sum_of_input_and_block_outputs() -> None:
    stack, x = build(3), rows()
    outs = [(10.0**k) * torch.randn(3, TOKENS, DIM, dtype=torch.float64) for k in range(3)]
    stack.blocks = nn.ModuleList(Recording(out) for out in outs)
    raw: list[Tensor] = []
    for norm in stack.read_norms:
        norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))
    stack(x)
    for number, got in enumerate(raw):
        torch.testing.assert_close(got, x + sum(outs[:number]))
    assert len(raw) == 4


def test_each_block_reads_the_state_before_it() -> None:
    stack, x = build(3), rows()
    stack.blocks = nn.ModuleList(Recording(torch.randn(3, TOKENS, DIM, dtype=torch.float64)) for _ in range(3))
    states = stack(x)
    np.testing.assert_allclose(stack.blocks[0].read.detach().numpy(), x.numpy() + rms_norm(x.numpy()), rtol=1e-12)
    for block, state in zip(stack.blocks[1:], states, strict=False):
        assert torch.equal(block.read, state)


def test_the_state_stays_bounded_however_large_the_blocks_outputs() -> None:
    stack = build(6)
    stack.blocks = nn.ModuleList(Recording(1e4 * torch.randn(3, TOKENS, DIM, dtype=torch.float64)) for _ in range(6))
    for state in stack(rows()):
        assert (state.square().mean(-1).sqrt() <= 2 + 1e-9).all()


def test_the_block_is_norm_of_input_plus_mixed_then_the_per_token_transformation() -> None:
    module, x = build(1).blocks[0], rows()
    assert isinstance(module, UniMixerBlock)
    random_gains(module)
    s = functional.rms_norm(x + mix(x, TOKENS), (DIM,), module.norm.weight, NORM_EPS)
    torch.testing.assert_close(module(x), module.per_token(s))


@pytest.mark.parametrize("per_token", [True, False])
def test_gradients_agree_with_finite_differences_and_reach_every_parameter(per_token: bool) -> None:
    stack = build(2, per_token)
    parameters = dict(stack.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(stack, dict(zip(parameters, values, strict=True)), (x,))[-1]

    assert torch.autograd.gradcheck(call, (rows(2).requires_grad_(), *parameters.values()), fast_mode=True)
    # A cube, since the sum of squares of normed values is nearly a constant.
    stack(rows())[-1].pow(3).sum().backward()
    assert [name for name, p in parameters.items() if p.grad is None or p.grad.abs().max() == 0] == []
    assert len(stack.read_norms) == 3
    assert len(stack.stream_norms) == 2


def test_penalties_come_through() -> None:
    class Charging(SwiGLU):
        def forward(self, x_btd: Tensor, penalties: list[Tensor] | None = None) -> Tensor:
            if penalties is not None:
                penalties.append(torch.ones(()))
            return super().forward(x_btd)

    stack, penalties = build(3), list[Tensor]()
    for block in stack.blocks:
        block.per_token = Charging(SwiGLU.Config(), TOKENS, DIM).double()
    stack(rows(), penalties)
    assert len(penalties) == 3
    stack(rows())


def test_a_mixer_that_changes_the_shape_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"needs its input's shape \(tokens, dim\) = \(4, 8\), got \(2, 16\)"):
        build(heads=2)


def test_a_compiled_stack_equals_the_eager_one() -> None:
    stack, x = build(2), rows().requires_grad_()
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x), stack(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_in_bf16_it_follows_the_float32_stack() -> None:
    stack, x = build(2), rows()
    expected = stack(x)[-1]
    got = stack.bfloat16()(x.bfloat16())[-1]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=5e-2, atol=5e-2)
