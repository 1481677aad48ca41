# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torch import nn

from kernels import backend
from kernels.testing import error_ratio
from recsys.core.errors import ConfigError
from recsys.ranking.flops import mix_revert_flops, mix_revert_parameters, mix_revert_weights
from recsys.ranking.mixers import Identity, ReversibleMixer, TokenMix
from recsys.ranking.part import NORM_EPS
from recsys.ranking.per_token import PerToken, SwiGLU
from recsys.ranking.stacks import Block, MixRevertBlock, Residual, Sequence

RESIDUALS: tuple[Residual, ...] = ("input", "stream")


class Add(Block):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x_btd: torch.Tensor, penalties: object = None) -> torch.Tensor:
        return x_btd + self.amount


class Chain(Sequence):
    """A sequence of given blocks."""

    normalised = False


def block(
    tokens: int, dim: int, heads: int | None = None, residual: Residual = "input", down_init: float = 1.0, mixing: bool = True
) -> MixRevertBlock:
    mixer: ReversibleMixer
    mixer = TokenMix(TokenMix.Config(heads=heads), tokens, dim) if mixing else Identity(Identity.Config(), tokens, dim)
    config = SwiGLU.Config(expansion=1.5, down_init=down_init)
    return MixRevertBlock(mixer, SwiGLU(config, mixer.mixed_tokens, mixer.mixed_dim), SwiGLU(config, tokens, dim), residual)


def reference(module: MixRevertBlock, x_btd: torch.Tensor, heads: int) -> np.ndarray:
    """The block in numpy, one sample and one token at a time."""

    def norm(v: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return gain * v / np.sqrt(np.mean(v**2) + NORM_EPS)

    def swiglu(v: np.ndarray, layer: nn.Module, token: int) -> np.ndarray:
        gate, up = np.split(layer.gate_up.detach().numpy()[token], 2, axis=1)
        a = v @ gate
        return (a / (1 + np.exp(-a)) * (v @ up)) @ layer.down.detach().numpy()[token]

    def mix(x: np.ndarray) -> np.ndarray:
        d = x.shape[1] // heads
        return np.stack([np.concatenate([x[t, h * d : (h + 1) * d] for t in range(len(x))]) for h in range(heads)])

    def revert(m: np.ndarray, tokens: int) -> np.ndarray:
        d = m.shape[1] // tokens
        return np.stack([np.concatenate([m[h, t * d : (t + 1) * d] for h in range(heads)]) for t in range(tokens)])

    gain1, gain2 = module.norm1.weight.detach().numpy(), module.norm2.weight.detach().numpy()
    out = []
    for x in x_btd.numpy():
        tokens = len(x)
        if module.residual == "input":
            mixed = mix(x)
            mixed = mixed + np.stack([swiglu(norm(v, gain1), module.mixed, h) for h, v in enumerate(mixed)])
            inner, residual = revert(mixed, tokens), x
        else:
            mixed = mix(np.stack([norm(v, gain1) for v in x]))
            inner = x + revert(np.stack([swiglu(v, module.mixed, h) for h, v in enumerate(mixed)]), tokens)
            residual = inner
        out.append(residual + np.stack([swiglu(norm(v, gain2), module.token, t) for t, v in enumerate(inner)]))
    return np.stack(out)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(4, 4, 8), (3, 2, 6), (2, 6, 6), (3, 1, 2), (1, 1, 4)])
def test_block_is_the_published_equations(tokens: int, heads: int, dim: int, residual: Residual) -> None:
    module = block(tokens, dim, heads, residual).double()
    for norm in (module.norm1, module.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(3, tokens, dim, dtype=torch.float64)
    np.testing.assert_allclose(module(x).detach().numpy(), reference(module, x, heads), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_zero_down_matrices_make_the_block_the_identity(residual: Residual) -> None:
    module, x = block(4, 8, 2, residual, down_init=0.0), torch.randn(3, 4, 8)
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_small_initialisation_keeps_the_block_near_the_identity(residual: Residual) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 32)
    for down_init in (0.01, 0.001):
        moved = block(4, 32, residual=residual, down_init=down_init)(x) - x
        assert 0 < torch.linalg.norm(moved) <= 2 * down_init * torch.linalg.norm(x)


def depends(module: nn.Module, tokens: int, dim: int) -> np.ndarray:
    """bool [T, T]: whether output token t depends on input token s."""
    x = torch.randn(1, tokens, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x)[0, :, :, 0]
    return jacobian.abs().amax(dim=(1, 3)).numpy() > 1e-12


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("heads", [4, 2])
def test_one_block_lets_every_token_depend_on_every_token(heads: int, residual: Residual) -> None:
    assert depends(block(4, 8, heads, residual).double(), 4, 8).all()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_without_mixing_tokens_stay_apart(residual: Residual) -> None:
    np.testing.assert_array_equal(depends(block(4, 8, residual=residual, mixing=False).double(), 4, 8), np.eye(4, dtype=bool))


class Scaling(PerToken):
    """F as a diagonal scaling of the coordinates."""

    flops = 0

    def forward(self, x_btd: torch.Tensor, penalties: object = None) -> torch.Tensor:
        return 0.1 * torch.arange(1, 1 + x_btd[0].numel(), dtype=x_btd.dtype).reshape(x_btd.shape[1:]) * x_btd


def test_token_semantics_stay_aligned_in_the_stream() -> None:
    tokens, dim, heads = 3, 4, 2
    mixer = TokenMix(TokenMix.Config(heads=heads), tokens, dim)
    scaling, zero = Scaling(heads, tokens * dim // heads), SwiGLU(SwiGLU.Config(down_init=0.0), tokens, dim)
    module = MixRevertBlock(mixer, scaling, zero, "stream").double()
    module.norm1 = nn.Identity()
    x = torch.randn(1, tokens, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, x)[0].flatten(0, 1)[:, 0].flatten(1)
    scale = mixer.revert(scaling(torch.ones(1, heads, tokens * dim // heads, dtype=torch.float64)))
    torch.testing.assert_close(jacobian, torch.eye(tokens * dim) + torch.diag(scale.flatten()), check_dtype=False)


def test_one_token_and_one_head_is_a_plain_pre_norm_network() -> None:
    module, x = block(1, 6, 1, "stream").double(), torch.randn(5, 1, 6, dtype=torch.float64)

    def sublayer(h: torch.Tensor, norm: nn.RMSNorm, layer: SwiGLU) -> torch.Tensor:
        gate, up = (nn.functional.rms_norm(h, (6,), norm.weight, 1e-6) @ layer.gate_up[0]).chunk(2, dim=-1)
        return h + (nn.functional.silu(gate) * up) @ layer.down[0]

    expected = sublayer(sublayer(x[:, 0], module.norm1, module.mixed), module.norm2, module.token)
    torch.testing.assert_close(module(x)[:, 0], expected)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_gradients_agree_with_finite_differences(residual: Residual) -> None:
    module = block(3, 4, 2, residual).double()
    parameters = dict(module.named_parameters())

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("tokens", "heads", "dim", "expansion"), [(4, 4, 8, 2.0), (4, 2, 8, 2.0), (3, 6, 6, 1.0), (16, 8, 32, 2.5)])
def test_parameters_equal_the_formula(tokens: int, heads: int, dim: int, expansion: float, residual: Residual) -> None:
    mixer, config = TokenMix(TokenMix.Config(heads=heads), tokens, dim), SwiGLU.Config(expansion=expansion)
    module = MixRevertBlock(mixer, SwiGLU(config, mixer.mixed_tokens, mixer.mixed_dim), SwiGLU(config, tokens, dim), residual)
    counted = sum(p.numel() for p in module.parameters())
    matrices = 3 * expansion * tokens**2 * dim**2 / heads + 3 * expansion * tokens * dim**2
    assert mix_revert_weights(tokens, dim, heads, expansion) == matrices
    assert counted == matrices + dim + (tokens * dim // heads if residual == "input" else dim)
    assert counted == mix_revert_parameters(tokens, dim, heads, expansion, residual)


def test_flops_equal_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module, batch = block(4, 8, 2), 5
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(batch, 4, 8))
    assert counter.get_total_flops() == batch * mix_revert_flops(4, 8, 2, 1.5)


@pytest.mark.parametrize(("blocks", "gap", "amplitude"), [(4, 2, 2), (6, 2, 4), (6, 3, 2), (8, 2, 8), (4, None, 1), (3, 3, 1), (3, 5, 1)])
def test_inter_layer_residuals_double_identity_blocks(blocks: int, gap: int | None, amplitude: int) -> None:
    x = torch.randn(2, 3, 4)
    states = Chain((Add(0.0) for _ in range(blocks)), gap)(x)
    assert len(states) == blocks
    assert torch.equal(states[-1], amplitude * x)


def test_inter_layer_residual_adds_the_state_of_gap_blocks_before() -> None:
    states = Chain([Add(1.0), Add(10.0), Add(100.0), Add(1000.0), Add(10000.0)], gap=2)(torch.zeros(1, 1, 1))
    # X1 = 1; X2 = 11 + X0; X3 = 111; X4 = 1111 + X2; X5 = 11122
    assert [int(s) for s in states] == [1, 11, 111, 1122, 11122]


def test_a_gap_below_one_block_is_an_error() -> None:
    with pytest.raises(ConfigError, match="gap of at least 1 block, or null, got 0"):
        Chain([Add(0.0)], gap=0)


def test_parts_that_do_not_fit_are_an_error() -> None:
    mixer, config = TokenMix(TokenMix.Config(heads=2), 4, 8), SwiGLU.Config()
    with pytest.raises(ConfigError, match=r"mixed: expected \(tokens, dim\) = \(2, 16\), got \(4, 8\)"):
        MixRevertBlock(mixer, SwiGLU(config, 4, 8), SwiGLU(config, 4, 8))
    with pytest.raises(ConfigError, match=r"token: expected \(tokens, dim\) = \(4, 8\), got \(2, 16\)"):
        MixRevertBlock(mixer, SwiGLU(config, 2, 16), SwiGLU(config, 2, 16))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_blocks_keep_tokens_outermost_in_memory(residual: Residual) -> None:
    x = torch.randn(4, 5, 8).transpose(0, 1)
    assert block(4, 8, 2, residual)(x).transpose(0, 1).is_contiguous()
    assert block(4, 8, 2, residual).norm2(x).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_compiled_stack_equals_the_eager_one(residual: Residual) -> None:
    torch.manual_seed(0)
    stack = Chain((block(4, 8, 2, residual) for _ in range(3)), gap=2)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4, 8, requires_grad=True)
    expected, got = stack(x), compiled(x)
    torch.testing.assert_close(got, expected)
    weights = list(stack.parameters())
    for a, b in zip(
        torch.autograd.grad(got[-1].square().sum(), (x, *weights)),
        torch.autograd.grad(expected[-1].square().sum(), (x, *weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("mixing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_norms_and_mixing_inside_the_products_change_nothing(
    residual: Residual, mixing: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU has them; results lie tokens-outermost either way."""
    torch.manual_seed(0)
    module = block(4, 8, 2 if mixing else None, residual, mixing=mixing).to(dtype)
    for norm in (module.norm1, module.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(4, 5, 8, dtype=dtype).transpose(0, 1).requires_grad_()
    upstream = torch.randn_like(x)

    def course() -> tuple[torch.Tensor, ...]:
        y = module(x)
        assert y.transpose(0, 1).is_contiguous()
        return y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), upstream)

    with backend.record() as ran:
        expected = course()
        assert "square_sums" not in {choice.op for choice in ran}
        monkeypatch.setattr("recsys.ranking.per_token.swiglu.reads_where_it_lies", lambda _: True)
        found = course()
    assert {"square_sums", "token_swiglu"} <= {choice.op for choice in ran}
    for mine, theirs in zip(found, expected, strict=True):
        assert error_ratio(mine, theirs) < (1e-12 if dtype == torch.float64 else 2e-2)
