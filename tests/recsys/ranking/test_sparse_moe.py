# SPDX-License-Identifier: Apache-2.0
"""SP-MoE beside a loop over rows, and what its paper promises of parameters, operations and the road from a dense model."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.ranking.models import TokenMixerLarge
from recsys.ranking.part import Part
from recsys.ranking.per_token import FFN, SparseMoE, SwiGLU
from recsys.ranking.per_token.conversion import sparsify, sparsify_ranker
from recsys.ranking.per_token.routing import choose
from recsys.ranking.per_token.sparse_moe import balance_loss

T, D = 3, 8
SETTINGS = [
    {"experts": 4, "active": 3},
    {"experts": 8, "active": 4, "gate_scale": 1.7},
    {"experts": 4, "active": 2, "gate_norm": "all"},
    {"experts": 4, "active": 4, "gate_norm": "all"},
]


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> SparseMoE:
    torch.manual_seed(seed)
    config = parse(SparseMoE.Config, {"down_init": 1.0, "router_init": 0.5} | settings, source="test")
    return SparseMoE(config, T, D).to(dtype)


def rows(count: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, T, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def expert(gate_up_df: torch.Tensor, down_hd: torch.Tensor, x_d: torch.Tensor) -> torch.Tensor:
    gate, up = (x_d @ gate_up_df).chunk(2)
    return (gate * torch.sigmoid(gate) * up) @ down_hd


def by_hand(module: SparseMoE, x_btd: torch.Tensor) -> torch.Tensor:
    """One row after another, one token after another."""
    config, y = module.config, torch.empty_like(x_btd)
    scale = config.experts / config.active if config.gate_scale is None else config.gate_scale
    for b in range(len(x_btd)):
        for t in range(T):
            x = x_btd[b, t]
            logits = (x @ module.router[t]).tolist()
            best = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: config.active - 1]
            over = best if config.gate_norm == "selected" else range(len(logits))
            total = torch.tensor([logits[e] for e in over], dtype=x.dtype).exp().sum()
            routed = sum(
                torch.tensor(logits[e], dtype=x.dtype).exp() / total * expert(module.gate_up[t, e], module.down[t, e], x) for e in best
            )
            y[b, t] = expert(module.shared_gate_up[t], module.shared_down[t], x) + scale * routed
    return y


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_equals_a_loop_over_rows(settings: dict[str, Any]) -> None:
    module, x = build(**settings), rows()
    torch.testing.assert_close(module(x), by_hand(module, x).detach())


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_agree_with_finite_differences_and_reach_the_router(settings: dict[str, Any]) -> None:
    module, x = build(**settings), rows(3).requires_grad_()
    parameters = dict(module.named_parameters())

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)
    call(x, *parameters.values()).square().sum().backward()
    assert module.router.grad.abs().amax(dim=(1, 2)).min() > 1e-4


def test_a_router_that_could_not_learn_is_an_error() -> None:
    with pytest.raises(ConfigError, match="gate_norm: 'selected' with active: 2 leaves one routed expert"):
        build(experts=4, active=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 4, "active": 5}, r"active: expected at most experts \(4\), got 5"),
        ({"experts": 5, "active": 3}, "experts: expected a divisor of the hidden width 16 .* got 5"),
        ({"experts": 2}, "experts.*greater than or equal to 3"),
        ({"active": 1}, "active.*greater than or equal to 2"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_only_chosen_experts_learn_from_a_row() -> None:
    module, x = build(experts=8, active=4), rows(1)
    chosen = choose(x.transpose(0, 1) @ module.router, 3)[:, 0]
    module(x).square().sum().backward()
    expected = torch.zeros(T, 7, dtype=torch.bool).scatter(1, chosen, True)
    for weight in (module.gate_up, module.down):
        assert torch.equal(weight.grad.abs().amax(dim=(2, 3)) > 0, expected)
    assert module.shared_gate_up.grad.abs().amax(dim=(1, 2)).min() > 0


def test_rows_do_not_see_their_batch_mates() -> None:
    module, x = build(experts=8, active=4), rows(50)
    together = module(x)
    for b in (0, 17, 49):
        torch.testing.assert_close(module(x[b : b + 1])[0], together[b])


def test_equal_logits_go_to_the_lower_index() -> None:
    logits = torch.tensor([[[0.0, 2.0, 0.0, 2.0, 2.0, 1.0]]])
    assert choose(logits, 4).tolist() == [[[1, 3, 4, 5]]]
    assert choose(torch.zeros(2, 40, 33), 5).unique(dim=1).tolist() == [[[0, 1, 2, 3, 4]]] * 2


@pytest.mark.parametrize("settings", SETTINGS)
def test_parameters_and_operations_are_those_of_the_dense_one_times_its_share(settings: dict[str, Any]) -> None:
    module, dense = build(**settings), SwiGLU(SwiGLU.Config(), T, D)
    experts, active = module.config.experts, module.config.active
    router = T * D * (experts - 1)
    assert count(module) == count(dense) + router
    assert (count(dense) - module.idle) * experts == count(dense) * active
    assert (module.flops - 2 * router) * experts == dense.flops * active


def counted(module: Part, x: torch.Tensor, *, train: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        if train:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("settings", SETTINGS)
def test_operations_are_what_torch_counts(settings: dict[str, Any]) -> None:
    module, x = build(**settings), rows(5).requires_grad_()
    assert counted(module, x, train=False) == 5 * module.flops
    assert counted(module, x, train=True) == 3 * 5 * module.flops
    with torch.no_grad():
        assert counted(module, x, train=False) == 5 * module.flops


# From dense to sparse


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("gate_norm", ["selected", "all"])
def test_all_slices_together_are_the_dense_one(experts: int, gate_norm: str) -> None:
    torch.manual_seed(0)
    dense = SwiGLU(SwiGLU.Config(expansion=3, down_init=1.0), T, D).double()
    config = SparseMoE.Config(
        expansion=3,
        experts=experts,
        active=experts,
        gate_scale=experts - 1,
        router_init=0,
        gate_norm=gate_norm,  # type: ignore[arg-type]
    )
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    sparse = sparsify(dense, config)
    torch.testing.assert_close(sparse(rows()), dense(rows()))
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_conversion_copies_and_keeps_dtype_and_mode() -> None:
    dense = SwiGLU(SwiGLU.Config(), T, D).double().eval()
    sparse = sparsify(dense, SparseMoE.Config(experts=4))
    assert not sparse.training
    assert {p.dtype for p in sparse.parameters()} == {torch.float64}
    kept = dense.down.detach().clone()
    with torch.no_grad():
        sparse.down.zero_()
        sparse.shared_down.zero_()
    assert torch.equal(dense.down, kept)


def test_a_fresh_module_is_sliced_from_a_fresh_dense_one() -> None:
    sparse = build(dtype=torch.float32, down_init=0.01)
    torch.manual_seed(0)
    dense_bound = (6 / (D + 2 * D)) ** 0.5
    for weight, bound in ((sparse.gate_up, dense_bound), (sparse.down, 0.01 * dense_bound), (sparse.shared_down, 0.01 * dense_bound)):
        assert 0.8 * bound < weight.abs().max() <= bound


def test_what_cannot_be_sliced_is_an_error() -> None:
    with pytest.raises(ConfigError, match="without biases"):
        sparsify(SwiGLU(SwiGLU.Config(bias=True), T, D), SparseMoE.Config(experts=4))
    with pytest.raises(ConfigError, match=r"\(tokens, dim, hidden\) = \(3, 8, 16\), got \(3, 8, 24\)"):
        sparsify(SwiGLU(SwiGLU.Config(expansion=3), T, D), SparseMoE.Config(experts=4))


def ranker(spec: Any, groups: Any, **settings: Any) -> TokenMixerLarge:
    tokenizer, embedding = {"name": "groups", "groups": groups}, {"dim": 8}
    plain = {"tokenizer": tokenizer, "dim": 16, "blocks": 3, "embedding": embedding} | settings
    return TokenMixerLarge(parse(TokenMixerLarge.Config, plain, source="test"), spec)


def test_a_trained_ranker_becomes_sparse(spec: Any, groups: Any, make_rows: Any, make_batch: Any) -> None:
    batch, dense = make_batch(make_rows([3, 0, 6, 1, 2])), ranker(spec, groups)
    dense.loss(batch)[0].backward()  # the tables' optimizer has a state now
    experts = 4
    exact = SparseMoE.Config(experts=experts, active=experts, gate_scale=experts - 1, router_init=0)
    sparse = sparsify_ranker(dense, exact)
    torch.testing.assert_close(sparse(batch), dense(batch))
    assert not any(isinstance(module, SwiGLU) for module in sparse.modules())
    assert sum(isinstance(module, SparseMoE) for module in sparse.modules()) == 6
    for key, value in dense.tables.fused_state().items():
        assert torch.equal(sparse.tables.fused_state()[key], value)

    before = dense(batch).detach()
    sparse.loss(batch)[0].backward()
    assert torch.equal(dense(batch), before)  # the copy's tables are its own
    assert TokenMixerLarge(sparse.config, spec).load_state_dict(sparse.state_dict())


def test_active_parameters_and_operations_of_a_ranker(spec: Any, groups: Any, make_rows: Any, make_batch: Any) -> None:
    model, batch = ranker(spec, groups, per_token={"name": "sparse_moe"}), make_batch(make_rows([3, 1]))
    dense, routers = ranker(spec, groups).costs(), 6 * 4 * 16 * 7
    costs = model.costs()
    slices = 3 * 2 * 4 * 16 * 16 * 6
    assert costs.dense - dense.dense == routers
    assert costs.dense - costs.active == slices // 2
    fields = model.fields(model.embed(batch), batch)
    with FlopCounterMode(display=False) as counter:
        model.interact(fields)
    assert counter.get_total_flops() == 2 * costs.flops


def test_only_swiglus_become_sparse(spec: Any, groups: Any) -> None:
    with pytest.raises(ConfigError, match="per_token: expected swiglu"):
        sparsify_ranker(ranker(spec, groups, per_token=FFN.Config()), SparseMoE.Config(experts=4))


# Balance


def test_the_balance_loss_is_one_for_each_token_where_all_is_even() -> None:
    logits, chosen = torch.zeros(T, 4, 4), torch.arange(4).view(1, 4, 1).expand(T, 4, 1)
    torch.testing.assert_close(balance_loss(logits, chosen), torch.tensor(float(T)))


def test_the_balance_loss_by_hand() -> None:
    logits = torch.randn(T, 6, 5, dtype=torch.float64)
    chosen = choose(logits, 2)
    expected = 0.0
    for t in range(T):
        share = [(chosen[t] == e).sum().item() / 12 for e in range(5)]
        expected += 5 * sum(f * p for f, p in zip(share, functional.softmax(logits[t], -1).mean(0).tolist(), strict=True))
    assert balance_loss(logits, chosen).item() == pytest.approx(expected)


def test_the_balance_loss_joins_the_penalties_only_where_it_is_wanted() -> None:
    penalties: list[torch.Tensor] = []
    build(experts=4)(rows(), penalties)
    assert penalties == []
    module = build(experts=4, active=3, balance=0.1)
    module(rows(), penalties)
    (penalty,) = penalties
    x_tbd = rows().transpose(0, 1)
    torch.testing.assert_close(penalty, 0.1 * balance_loss(x_tbd @ module.router, choose(x_tbd @ module.router, 2)))
    penalty.backward()
    assert module.router.grad.abs().max() > 0
    assert module.gate_up.grad is None


# Capture, types


def test_compiled_without_graph_breaks_it_equals_eager() -> None:
    module, x = build(experts=8, active=4, balance=0.1), rows(6).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        penalties: list[torch.Tensor] = []
        return module(x, penalties).square().sum() + torch.stack(penalties).sum()

    variables = (x, *module.parameters())
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))
    for got, expected in zip(torch.autograd.grad(compiled(x), variables), torch.autograd.grad(loss(x), variables), strict=True):
        torch.testing.assert_close(got, expected)


def test_it_can_be_exported_for_any_number_of_rows() -> None:
    module = build(experts=8, active=4).eval()
    program = torch.export.export(module, (rows(6),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    for number in (2, 6, 31):
        torch.testing.assert_close(program.module()(rows(number)), module(rows(number)))


def test_it_works_in_bfloat16_with_a_router_in_float32() -> None:
    module, x = build(experts=4, active=3, dtype=torch.bfloat16), rows(dtype=torch.bfloat16)
    wide = build(experts=4, active=3)
    wide.load_state_dict(module.state_dict())
    y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wide(x.double()), rtol=3e-2, atol=3e-2)  # other choices would differ by far more
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


def test_autocast_leaves_the_router_alone() -> None:
    module, x = build(experts=4, active=3, dtype=torch.float32), rows(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in module.parameters())
