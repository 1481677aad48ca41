# SPDX-License-Identifier: Apache-2.0
"""ReLU-routed experts beside loops over rows; two routers, of which one is inferred with; the controller of the sparsity."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.ranking.per_token import FFN, ReluMoE
from recsys.ranking.per_token.relu_moe import INITIAL_STRENGTH, STEP

T, D, E = 3, 8, 4


def build(seed: int = 0, tokens: int = T, dim: int = D, dtype: torch.dtype = torch.float64, **settings: Any) -> ReluMoE:
    torch.manual_seed(seed)
    module = ReluMoE(parse(ReluMoE.Config, {"experts": E, "expansion": 2.0, "agreement": 0.0} | settings, source="test"), tokens, dim).to(
        dtype
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
    return module


def rows(count: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, T, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def infer_gates(module: ReluMoE, x_btd: torch.Tensor) -> torch.Tensor:
    """``[B, T, E]``."""
    return torch.einsum("btd,tde->bte", x_btd, module.infer_router).add(module.infer_router_bias[:, 0]).clamp(min=0)


def train_gates(module: ReluMoE, x_btd: torch.Tensor) -> torch.Tensor:
    return torch.einsum("btd,tde->bte", x_btd, module.train_router).add(module.train_router_bias[:, 0]).clamp(min=0)


def by_hand(module: ReluMoE, x_btd: torch.Tensor, gates_bte: torch.Tensor) -> torch.Tensor:
    """``Σ_j G_tj e_tj(x_t)``, every expert a network of its own."""
    h, y = module.hidden, torch.zeros_like(x_btd)
    for b in range(len(x_btd)):
        for t in range(T):
            for e in range(module.config.experts):
                own = slice(e * h, (e + 1) * h)
                up_bias = 0 if module.up_bias is None else module.up_bias[t, 0, own]
                down_bias = 0 if module.down_bias is None else module.down_bias[t, e]
                out = functional.gelu(x_btd[b, t] @ module.up[t, :, own] + up_bias) @ module.down[t, own] + down_bias
                y[b, t] += gates_bte[b, t, e] * out
    return y


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_inference_is_the_sum_over_the_experts_of_the_inference_router(bias: bool) -> None:
    module, x = build(bias=bias).eval(), rows()
    gates = infer_gates(module, x)
    assert 0.2 < (gates > 0).double().mean() < 0.8
    torch.testing.assert_close(module(x), by_hand(module, x, gates))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_training_is_the_mean_of_the_sums_of_both_routers(bias: bool) -> None:
    module, x = build(bias=bias), rows()
    expected = by_hand(module, x, train_gates(module, x)) + by_hand(module, x, infer_gates(module, x))
    torch.testing.assert_close(module(x), expected / 2)


@pytest.mark.parametrize("training", [True, False])
def test_one_expert_with_gate_one_is_the_per_token_ffn(training: bool) -> None:
    module = build(experts=1).train(training)
    ffn = FFN(FFN.Config(expansion=2.0), T, D).double()
    with torch.no_grad():
        for name in ("up", "down", "up_bias", "down_bias"):
            getattr(ffn, name).copy_(getattr(module, name))
        for router, bias in ((module.train_router, module.train_router_bias), (module.infer_router, module.infer_router_bias)):
            router.zero_()
            bias.fill_(1.0)
    torch.testing.assert_close(module(rows()), ffn(rows()))


def test_equal_routers_infer_what_was_trained() -> None:
    module = build()
    with torch.no_grad():
        module.train_router.copy_(module.infer_router)
        module.train_router_bias.copy_(module.infer_router_bias)
    torch.testing.assert_close(module(rows()), module.eval()(rows()))


def test_gates_are_never_negative() -> None:
    module = build()
    gates = module.gates(rows(100).transpose(0, 1), module.infer_router, module.infer_router_bias)
    assert gates.min() == 0
    assert gates.max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_gradients_agree_with_finite_differences_and_reach_the_router(training: bool) -> None:
    module, x = build().train(training), rows(3).requires_grad_()
    parameters = {name: p for name, p in module.named_parameters() if training or "train_router" not in name}

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)
    gradients = torch.autograd.grad(call(x, *parameters.values()).square().sum(), tuple(parameters.values()))
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)
    if not training:
        assert module.train_router.grad is None


def test_the_task_alone_trains_both_routers() -> None:
    module = build()
    module(rows()).square().sum().backward()
    for router in (module.train_router, module.infer_router):
        assert router.grad.abs().amax(dim=(1, 2)).min() > 1e-4


@torch.no_grad()
def close(router: torch.Tensor, bias_t1e: torch.Tensor, expert: int) -> None:
    router[:, :, expert] = 0
    bias_t1e[:, :, expert] = -1.0


def test_an_expert_whose_gate_is_zero_learns_in_training_alone() -> None:
    for training in (False, True):
        module = build().train(training)
        close(module.infer_router, module.infer_router_bias, 2)
        with torch.no_grad():
            module.train_router_bias.fill_(5.0)  # h_train leaves every expert on
        module(rows()).square().sum().backward()
        largest = module.up.grad.abs().unflatten(2, (E, -1)).amax(dim=(0, 1, 3))
        assert (largest > 0).tolist() == [True, True, training, True]
        assert (module.down_bias.grad.abs().amax(dim=(0, 2)) > 0).tolist() == [True, True, training, True]


def test_a_sample_teaches_only_the_experts_that_it_uses() -> None:
    module, x = build().eval(), rows(1)
    module(x).square().sum().backward()
    used = infer_gates(module, x)[0] > 0
    assert used.any()
    assert not used.all()
    assert torch.equal(module.down.grad.unflatten(1, (E, -1)).abs().amax(dim=(2, 3)) > 0, used)


def test_rows_do_not_see_their_batch_mates() -> None:
    module, x = build().eval(), rows(30)
    together = module(x)
    for b in (0, 13, 29):
        torch.testing.assert_close(module(x[b : b + 1])[0], together[b])


def test_no_active_expert_gives_zero() -> None:
    module = build(bias=False).eval()
    for expert in range(E):
        close(module.infer_router, module.infer_router_bias, expert)
    assert module(rows()).abs().max() == 0


# Penalty and controller


def penalty_of(module: ReluMoE, x: torch.Tensor) -> torch.Tensor:
    penalties: list[torch.Tensor] = []
    module(x, penalties)
    (penalty,) = penalties
    return penalty


@pytest.mark.parametrize("balanced", [False, True])
def test_the_penalty_is_the_weighted_sum_of_the_inference_gates(balanced: bool) -> None:
    module, x = build(balanced=balanced, active=0.25), rows()
    module.strength.fill_(3.0)
    expected = 0.0
    for gates_te in infer_gates(module, x):
        for t in range(T):
            for e in range(E):
                load = (infer_gates(module, x)[:, t, e] > 0).double().mean().item() / 0.25 if balanced else 1.0
                expected += 3.0 * gates_te[t, e].item() * load / len(x)
    assert penalty_of(module, x).item() == pytest.approx(expected)


def test_the_penalty_pulls_at_the_inference_router_alone() -> None:
    module = build()
    module.strength.fill_(1.0)
    penalty_of(module, rows()).backward()
    assert module.infer_router.grad.abs().max() > 0
    others = {name: p.grad for name, p in module.named_parameters() if "infer_router" not in name}
    assert "train_router" in others
    assert all(gradient is None for gradient in others.values())


def test_lambda_takes_one_step_in_each_forward_pass_that_is_penalised() -> None:
    dense, sparse = build(active=0.01), build(active=0.99)
    for module, start, factor in ((dense, 1.0, STEP), (sparse, 1.0, 1 / STEP), (sparse, INITIAL_STRENGTH, 1.0)):
        module.strength.fill_(start)
        penalty_of(module, rows())
        assert module.strength.item() == pytest.approx(start * factor)
    for module in (dense.eval(), dense.train()):
        before = module.strength.clone()
        module(rows(), [] if not module.training else None)
        assert torch.equal(module.strength, before)


def test_the_controller_settles_within_one_step_of_the_wanted_share() -> None:
    """Synthetic gates: shrunk by λ they are uniform on [-4 λ, 1 - 4 λ], so a share of 0.25 is active at λ = 0.1875."""
    module = build(tokens=1, dim=E, active=0.25)
    with torch.no_grad():
        module.infer_router.copy_(torch.eye(E))
        module.infer_router_bias.zero_()
    generator, reached = torch.Generator().manual_seed(0), []
    for _ in range(160):
        uniform = torch.rand(4000, 1, E, dtype=torch.float64, generator=generator)
        penalty_of(module, uniform - 4 * module.strength)
        reached.append(module.strength.item())
    assert reached[0] < 1e-7
    assert all(0.1875 / STEP**1.1 < strength < 0.1875 * STEP**1.1 for strength in reached[120:])


def test_lambda_survives_the_state_dict_and_changes_of_dtype() -> None:
    module = build(dtype=torch.float32)
    for _ in range(5):
        penalty_of(module, rows(dtype=torch.float32))
    before = module.strength.clone()
    assert before.dtype == torch.float32
    other = build(seed=1, dtype=torch.float32)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.strength, before)
    for changed in (module.bfloat16(), module.double(), module.half()):
        assert changed.strength.dtype == torch.float32
        assert torch.equal(changed.strength, before)
        assert changed.up.dtype != torch.float32
    assert "strength" in dict(module.named_buffers())


def test_the_agreement_is_the_distance_of_what_is_inferred_from_what_was_trained() -> None:
    module, x = build(agreement=0.7), rows()
    penalties: list[torch.Tensor] = []
    y, plain = module(x, penalties), module(x)
    torch.testing.assert_close(y, plain)
    with torch.no_grad():
        distance = by_hand(module, x, infer_gates(module, x)) - by_hand(module, x, train_gates(module, x))
    assert penalties[1].item() == pytest.approx(0.7 * distance.square().mean().item(), rel=1e-5)
    penalties[1].backward()
    assert module.infer_router.grad.abs().max() > 0
    assert module.up.grad.abs().max() > 0
    assert module.train_router.grad is None or module.train_router.grad.abs().max() == 0


@pytest.mark.parametrize("agreement", [1.0, 0.0])
def test_training_reaches_the_wanted_share_and_with_agreement_infers_as_it_trained(agreement: float) -> None:
    module = build(dtype=torch.float32, active=0.25, experts=8, expansion=8.0, agreement=agreement)
    x = torch.randn(256, T, D)
    target = torch.tanh(x @ torch.randn(D, D) / 3)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        penalties: list[torch.Tensor] = []
        task = functional.mse_loss(module(x, penalties), target)
        (task + torch.stack(penalties).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        share = (infer_gates(module, x) > 0).float().mean()
        trained, inferred = (functional.mse_loss(module.train(mode)(x), target) / target.square().mean() for mode in (True, False))
    assert trained < 0.2
    if agreement:
        assert 0.15 < share < 0.35
        assert inferred < 0.25
    else:
        assert inferred > 0.6  # the mean of the two is good, and the half that is inferred with is not


# Costs, capture, types


def counted(module: ReluMoE, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


def test_operations_and_parameters() -> None:
    module, x = build(experts=8, active=0.25), rows(5)
    total = sum(p.numel() for p in module.parameters())
    experts = T * (2 * D * 2 * D + 2 * D + 8 * D)
    assert total == experts + 2 * T * (D * 8 + 8)
    assert module.idle == 0
    assert counted(module, x) == 5 * module.flops

    module.eval()
    with torch.no_grad():
        module.infer_router.zero_()
        module.infer_router_bias.fill_(-1.0)[:, :, [1, 6]] = 1.0  # the wanted share, exactly
    assert counted(module, x) == 5 * module.flops
    assert module.idle == experts * 6 // 8 + T * (D * 8 + 8)
    with torch.no_grad():
        module.infer_router_bias.fill_(-1.0)
    products = 2 * T * D * 8 * 2  # the router, and the output biases
    assert counted(module, x) == 5 * products


def test_training_compiled_without_graph_breaks_it_equals_eager() -> None:
    eager, module, x = build(), build(), rows(6)

    def loss(module: ReluMoE, x: torch.Tensor) -> torch.Tensor:
        penalties: list[torch.Tensor] = []
        return module(x, penalties).square().sum() + penalties[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(module, x), loss(eager, x))
    assert torch.equal(module.strength, eager.strength)
    assert module.strength > 1.5 * INITIAL_STRENGTH


def test_inference_compiled_without_graph_breaks_it_equals_eager() -> None:
    module, x = build().eval(), rows(6).requires_grad_()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    (got,), (expected,) = (torch.autograd.grad(call(x).square().sum(), x) for call in (compiled, module))
    torch.testing.assert_close(got, expected)


def test_inference_can_be_exported_for_any_number_of_rows() -> None:
    module = build().eval()
    program = torch.export.export(module, (rows(6),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    for number in (2, 31):
        torch.testing.assert_close(program.module()(rows(number)), module(rows(number)))


@pytest.mark.parametrize("training", [True, False])
def test_it_works_in_bfloat16(training: bool) -> None:
    module, wide = build(dtype=torch.bfloat16).train(training), build().train(training)
    wide.load_state_dict(module.state_dict())
    x = rows(dtype=torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wide(x.double()), rtol=3e-2, atol=3e-2)


def test_experts_must_divide_the_hidden_width() -> None:
    with pytest.raises(ConfigError, match=r"experts: expected a divisor of the hidden width 16 .* got 5"):
        build(experts=5)
