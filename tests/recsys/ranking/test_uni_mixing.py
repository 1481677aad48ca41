# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.ranking.mixers import UniMixing, UniMixingLite, fold_mixing, mix
from recsys.ranking.mixers.uni_mixing import BlockMixing, FixedMixing, mix_blocks, nearest_divisor, permutation

KINDS: tuple[type[BlockMixing], ...] = (UniMixing, UniMixingLite)
SHAPES = [(4, 8, 4), (3, 4, 6), (2, 6, 1), (5, 4, 20), (4, 6, 8)]  # T, D, B; a block may be part of a token or cut through several


def build(cls: type[Any] = UniMixing, tokens: int = 4, dim: int = 8, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return cls(parse(cls.Config, settings, source="test"), tokens, dim).double()


def spread(module: BlockMixing) -> Any:
    """The module with weights from N(0, 1), in evaluation mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def rows(tokens: int = 4, dim: int = 8, batch: int = 3) -> Tensor:
    return torch.randn(batch, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def normalise(matrix: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdims=True)
        matrix = matrix / matrix.sum(1, keepdims=True)
    return matrix


def big_matrix(global_nn: Tensor, local_nio: Tensor) -> np.ndarray:
    """The mixing as one L × L matrix on column vectors: block (i, j) is ``W_G[i, j] (W_B^j)ᵀ``."""
    outer, local = global_nn.detach().numpy(), local_nio.detach().numpy()
    return np.block([[outer[i, j] * local[j].T for j in range(len(outer))] for i in range(len(outer))])


@pytest.mark.parametrize(("tokens", "dim", "block"), SHAPES)
@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("constrained", [False, True])
def test_it_is_one_matrix_on_the_flat_vector(cls: type, constrained: bool, tokens: int, dim: int, block: int) -> None:
    module, x = spread(build(cls, tokens, dim, block=block, constrained=constrained)), rows(tokens, dim)
    expected = x.flatten(1).numpy() @ big_matrix(*module.matrices()).T
    np.testing.assert_allclose(module(x).detach().flatten(1).numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_matrices_are_the_published_equations(symmetric: bool) -> None:
    module = spread(build(block=4, symmetric=symmetric, iterations=3, temperature={"start": 0.7, "end": 0.7}))
    global_nn, local_nio = module.matrices()
    weights = [module.global_weight, *module.local_weight]
    for weight, got in zip(weights, [global_nn, *local_nio], strict=True):
        w = weight.detach().numpy()
        expected = normalise(np.exp(((w + w.T) / 2 if symmetric else w) / 0.7), 3)
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(("tokens", "heads", "slice_"), [(4, 4, 2), (3, 2, 3), (2, 4, 1), (1, 3, 2), (5, 1, 4)])
def test_raw_with_the_permutation_it_is_the_rule_based_mixing(tokens: int, heads: int, slice_: int) -> None:
    dim = heads * slice_
    module, x = build(tokens=tokens, dim=dim, block=slice_, constrained=False), rows(tokens, dim)
    module.global_weight.data = permutation(tokens, heads).double()
    module.local_weight.data = torch.eye(slice_, dtype=torch.float64).repeat(tokens * heads, 1, 1)
    assert torch.equal(module(x).reshape(-1, heads, tokens * slice_), mix(x, heads))


@pytest.mark.parametrize(("tokens", "heads"), [(4, 4), (3, 2), (2, 4)])
def test_the_permutation_is_written_out(tokens: int, heads: int) -> None:
    expected = np.zeros((tokens * heads, tokens * heads))
    for t in range(tokens):
        for h in range(heads):
            expected[h * tokens + t, t * heads + h] = 1
    np.testing.assert_array_equal(permutation(tokens, heads).numpy(), expected)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("scaling", ["alternating", "damped"])
def test_with_permutation_gain_it_starts_as_rankmixer(cls: type, scaling: str) -> None:
    gain, temperature, tokens, dim = 10.0, 0.5, 4, 8
    settings = {"permutation_gain": gain, "init_std": 0, "scaling": scaling, "temperature": {"start": temperature}}
    module, x = build(cls, tokens, dim, **settings), rows(tokens, dim)
    assert module.block == dim // tokens
    global_nn, local_nio = module.matrices()
    odds = math.exp(gain / temperature)
    for got, target, n in ((global_nn, permutation(4, 4), 16), (local_nio, torch.eye(2).expand(16, 2, 2), 2)):
        assert (got - target).abs().max().item() == pytest.approx((n - 1) / (odds + n - 1), rel=1e-6)
    torch.testing.assert_close(module(x), mix(x, tokens), rtol=0, atol=1e-6)


def test_lite_of_lower_rank_starts_near_the_permutation() -> None:
    """The projection leaves noise of about gain √(1 / r − 1 / n), far below the gain."""
    gain, n, rank = 5.0, 64, 32
    target = permutation(8, 8).double()
    logits = build(UniMixingLite, 8, 16, block=2, rank=rank, permutation_gain=gain, init_std=0).weights()[0].detach()
    assert torch.linalg.matrix_rank(logits) == rank
    assert (logits * target).sum() / n == pytest.approx(gain, rel=1e-6)
    noise = (logits - gain * target).std().item()
    assert noise == pytest.approx(gain * math.sqrt(1 / rank - 1 / n), rel=0.15)
    assert (logits.argmax(dim=1) == target.argmax(dim=1)).all()


def test_without_constraints_a_gain_of_one_is_the_rule() -> None:
    module, x = build(tokens=3, dim=4, block=2, permutation_gain=1, init_std=0, constrained=False), rows(3, 4)
    assert torch.equal(module(x).reshape(-1, 2, 6), mix(x, 2))


def test_a_permutation_that_is_no_involution_needs_symmetry_off() -> None:
    target = permutation(4, 2)
    module = build(tokens=4, dim=4, block=2, permutation_gain=20, init_std=0, symmetric=False, temperature={"start": 1})
    assert (module.matrices()[0] - target).abs().max() < 1e-6
    with pytest.raises(ConfigError, match=r"permutation_gain: with block=2, tokens=4 and dim=4 .* not symmetric; expected symmetric=false"):
        build(tokens=4, dim=4, block=2, permutation_gain=20)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("scaling", ["alternating", "damped"])
def test_matrices_are_doubly_stochastic_and_never_enlarge(cls: type, scaling: str) -> None:
    module, x = build(cls, 4, 6, block=3, iterations=200, scaling=scaling), rows(4, 6)
    spread(module)
    for matrix in module.matrices():
        assert matrix.min() > 0
        np.testing.assert_allclose(matrix.detach().sum(-1), 1, atol=1e-9)
        np.testing.assert_allclose(matrix.detach().sum(-2), 1, atol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(matrix.detach().numpy(), 2, axis=(-2, -1)), 1, atol=1e-9)
        torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=0 if scaling == "damped" else 1e-9)
    assert module.stochastic_error() < 1e-9
    y = module(x)
    torch.testing.assert_close(y.sum((1, 2)), x.sum((1, 2)))
    assert (torch.linalg.norm(y.flatten(1), dim=1) <= torch.linalg.norm(x.flatten(1), dim=1)).all()
    torch.testing.assert_close(module(torch.ones_like(x)), torch.ones_like(x))


def test_stochastic_error_is_the_worst_sum() -> None:
    module = spread(build(block=4, temperature={"start": 0.05}, iterations=2))
    worst = max(abs(m.detach().numpy().sum(axis) - 1).max() for m in module.matrices() for axis in (-1, -2))
    assert module.stochastic_error().item() == pytest.approx(worst)
    assert worst > 0.01


# UniMixing-Lite


def test_lite_with_a_basis_per_block_and_full_rank_is_unimixing() -> None:
    full, lite = spread(build(block=4)), build(UniMixingLite, block=4, bases=8, rank=8).eval()
    lite.bases.data = full.local_weight.data.clone()
    lite.coefficients.data = torch.eye(8, dtype=torch.float64)
    u, s, v = torch.linalg.svd(full.global_weight.data)
    lite.left.data, lite.right.data = u * s, v
    for got, expected in zip(lite.matrices(), full.matrices(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lite(rows()), full(rows()), rtol=1e-9, atol=1e-12)


def test_lite_weights_are_the_published_sums() -> None:
    module = spread(build(UniMixingLite, 3, 4, block=2, bases=3, rank=2))
    global_nn, local_nio = module.weights()
    for n in range(6):
        expected = sum(module.coefficients[n, k] * module.bases[k] for k in range(3))
        torch.testing.assert_close(local_nio[n], expected)
        for m in range(6):
            torch.testing.assert_close(global_nn[m, n], module.left[m] @ module.right[:, n])


@pytest.mark.parametrize("symmetric", [False, True])
def test_lite_of_rank_two_comes_near_any_permutation(symmetric: bool) -> None:
    """Blocks on a circle: the inner product of block i with the place of block σ(i) is the largest of its row."""
    n, tokens, dim = 16, 4, 8
    module, target = build(UniMixingLite, tokens, dim, block=2, bases=1, rank=2, symmetric=symmetric, iterations=50), permutation(4, 4)
    if not symmetric:
        target = torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    module.bases.data = 200 * torch.eye(2, dtype=torch.float64)[None]
    module.coefficients.data = torch.ones(n, 1, dtype=torch.float64)
    errors = []
    for scale in (50, 100, 200):
        module.left.data, module.right.data = scale * target.double() @ circle, circle.T.contiguous()
        errors.append((module.eval().matrices()[0] - target).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    if not symmetric:
        assert errors[1:] == [pytest.approx(9.9e-4, rel=0.1), pytest.approx(4.9e-7, rel=0.1)]
    else:
        assert errors[2] < 1e-6
        torch.testing.assert_close(module(rows()), mix(rows(), tokens), rtol=0, atol=1e-5)


def test_lite_of_low_rank_is_not_a_low_rank_matrix() -> None:
    module = spread(build(UniMixingLite, 8, 8, block=2, rank=2))
    weight, matrix = module.weights()[0], module.matrices()[0]
    assert torch.linalg.matrix_rank(weight) == 2
    assert torch.linalg.matrix_rank(matrix) > 2 * 2


@pytest.mark.parametrize("cls", KINDS)
def test_initial_logits_have_the_given_deviation(cls: type) -> None:
    global_nn, local_nio = build(cls, 16, 64, block=16, init_std=0.02).weights()
    for weight in (global_nn, local_nio):
        assert weight.mean().abs() < 0.004
        assert weight.std().item() == pytest.approx(0.02, rel=0.4)


# Sizes


@pytest.mark.parametrize(("tokens", "dim", "block"), SHAPES)
def test_parameters_equal_the_formulas(tokens: int, dim: int, block: int) -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    n = tokens * dim // block
    assert count(build(tokens=tokens, dim=dim, block=block)) == n**2 + n * block**2
    assert count(build(UniMixingLite, tokens, dim, block=block, bases=3, rank=5)) == 3 * block**2 + n * 3 + 2 * n * 5
    assert count(build(UniMixingLite, tokens, dim, block=block)) == 4 * block**2 + n * 4 + 2 * n * min(n, 64)


@pytest.mark.parametrize(("tokens", "dim", "block"), SHAPES)
@pytest.mark.parametrize("cls", KINDS)
def test_flops_are_what_torch_counts_for_one_more_row(cls: type, tokens: int, dim: int, block: int) -> None:
    module, counts = build(cls, tokens, dim, block=block), []
    for batch in (2, 7):
        with FlopCounterMode(display=False) as counter:
            module(rows(tokens, dim, batch))
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 5 * module.flops
    length = tokens * dim
    assert module.flops == 2 * length * block + 2 * length * (length // block)
    if cls is UniMixing:  # in the lite variant the matrices themselves take products, whatever the batch
        assert counts[0] == 2 * module.flops


@pytest.mark.parametrize(("tokens", "dim", "block"), [(4, 8, 4), (16, 64, 32), (8, 8, 8), (7, 64, 16), (1, 13, 1), (1, 1, 1)])
@pytest.mark.parametrize("cls", KINDS)
def test_the_default_block_is_the_divisor_nearest_to_the_root(cls: type, tokens: int, dim: int, block: int) -> None:
    assert build(cls, tokens, dim).block == block


def test_nearest_divisor_by_exhaustion() -> None:
    for length in range(1, 200):
        found = nearest_divisor(length)
        assert length % found == 0
        assert not [d for d in range(1, length + 1) if length % d == 0 and abs(d - length**0.5) < abs(found - length**0.5)]


# Temperature


@pytest.mark.parametrize("cls", KINDS)
def test_the_temperature_falls_linearly_in_training_and_never_in_evaluation(cls: type) -> None:
    module, x, seen = build(cls, temperature={"start": 1.0, "end": 0.2, "anneal_steps": 4}), rows(), []
    for _ in range(6):
        seen.append(module.temperature().item())
        module.eval()
        assert torch.equal(module(x), module(x))
        module.train()(x)
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2], rel=1e-12)
    assert module.temperature.position == 6


def test_a_pass_reads_the_temperature_before_it_advances() -> None:
    module, x = build(temperature={"start": 1.0, "end": 0.1, "anneal_steps": 1}), rows()
    spread(module)
    first, second = module(x), module.train()(x)
    assert torch.equal(first, second)
    assert (module(x) - first).abs().max() > 1e-3


def test_no_annealing_means_the_end_throughout() -> None:
    module = build(temperature={"start": 1.0, "end": 0.3, "anneal_steps": 0})
    for _ in range(2):
        assert module.temperature().item() == pytest.approx(0.3)
        module(rows())


def test_the_position_is_in_the_state_dict_so_that_a_resumed_run_continues() -> None:
    settings = {"temperature": {"anneal_steps": 10}}
    module, other, x = build(**settings), build(seed=1, **settings), rows()
    for _ in range(3):
        module(x)
    other.load_state_dict(module.state_dict())
    for _ in range(4):
        assert other.temperature().item() == module.temperature().item()
        assert torch.equal(other(x), module(x))
    assert other.temperature().item() == pytest.approx(1 - 0.95 * 0.7)
    assert "temperature.position" in module.state_dict()
    assert module.bfloat16().temperature.position.dtype == torch.int64


def test_warm_start_at_a_low_temperature_takes_the_weights_of_the_high_one() -> None:
    hot, cold = build(temperature={"start": 1.0, "end": 1.0}), build(seed=1, temperature={"start": 0.05, "end": 0.05})
    for _ in range(3):
        hot(rows())
    cold.load_state_dict(hot.state_dict())
    assert cold.temperature().item() == 0.05
    assert torch.equal(cold.global_weight, hot.global_weight)
    cold.temperature.restart()
    assert cold.temperature.position == 0


def test_without_constraints_there_is_no_temperature() -> None:
    module = build(constrained=False)
    assert module.state_dict().keys() == {"global_weight", "local_weight"}
    assert torch.equal(module(rows()), mix_blocks(rows(), module.global_weight, module.local_weight))


# Numbers


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_gradients_of_the_weights_agree_with_finite_differences(cls: type, temperature: float) -> None:
    module = build(cls, 3, 4, block=3, iterations=5, init_std=0.3, temperature={"start": temperature}).eval()
    parameters = dict(module.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (rows(3, 4, 2).requires_grad_(), *parameters.values()))


@pytest.mark.parametrize("cls", KINDS)
def test_in_bf16_the_matrices_are_still_made_in_float32(cls: type) -> None:
    module, x = build(cls, temperature={"start": 0.05}).to(torch.bfloat16).eval(), rows().to(torch.bfloat16)
    assert all(matrix.dtype == torch.float32 for matrix in module.matrices())
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert module.stochastic_error() < 1e-5
    torch.testing.assert_close(y.double(), module.double()(x.double()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cls", KINDS)
def test_autocast_leaves_the_matrices_alone(cls: type) -> None:
    module = spread(build(cls)).float()
    expected = module.matrices()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(got, want) for got, want in zip(module.matrices(), expected, strict=True))
        assert module(rows().float()).dtype == torch.bfloat16


@pytest.mark.parametrize("cls", KINDS)
def test_a_compiled_module_anneals_and_equals_the_eager_one(cls: type) -> None:
    settings: dict[str, Any] = {"temperature": {"anneal_steps": 3}, "iterations": 2}
    module, other, x = build(cls, **settings), build(cls, **settings), rows()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(x), module(x))
    assert other.temperature.position == 4


@pytest.mark.parametrize("cls", KINDS)
def test_it_can_be_exported_with_any_batch(cls: type) -> None:
    module = spread(build(cls))
    program = torch.export.export(module, (rows(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(rows(batch=6)), module(rows(batch=6)))


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("constrained", [False, True])
def test_folded_it_gives_the_same_without_sinkhorn(cls: type, constrained: bool) -> None:
    model = nn.Sequential(build(cls, constrained=constrained), nn.Sequential(nn.Identity(), build(cls, seed=1, block=2))).eval()
    expected, flops = model(rows()), model[0].flops
    fold_mixing(model)
    assert [type(module) for module in (model[0], model[1][1])] == [FixedMixing, FixedMixing]
    assert model[0].flops == flops
    assert not list(model.parameters())
    assert torch.equal(model(rows()), expected)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 5}, r"block: expected a divisor of tokens \* dim = 4 \* 8 = 32, got 5"),
        ({"block": 0}, "block.*greater than or equal to 1"),
        ({"scaling": "damped", "symmetric": False}, "scaling: damped needs symmetric=true"),
        ({"temperature": {"end": 0}}, "temperature.end.*greater than 0"),
        ({"temperature": {"steps": 3}}, "unknown key 'steps'"),
        ({"iterations": 0}, "iterations.*greater than or equal to 1"),
    ],
)
def test_bad_settings_are_named(cls: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cls, **settings)


def test_a_gain_needs_blocks_that_are_slices_of_tokens() -> None:
    with pytest.raises(ConfigError, match="permutation_gain: expected a block that divides dim=8, got block=16"):
        build(permutation_gain=1, block=16)
    assert build(tokens=4, dim=8, permutation_gain=1).block == 2
