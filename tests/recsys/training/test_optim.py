# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from small_model import SPEC, Small, data, to_batch
from torch import nn

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.embedding import tables
from recsys.embedding.tables import EmbeddingTables
from recsys.training.optim import DenseOptimizer, HasFusedState, Optimizers, Schedule, dense_parameters, fused_modules


def test_warmup_rises_to_one_and_cosine_falls_to_final() -> None:
    schedule = Schedule(name="cosine", warmup_steps=4, final=0.1)
    factors = [schedule.factor(step, 104) for step in range(104)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[54] == pytest.approx(0.55)
    assert factors[4:] == sorted(set(factors[4:]), reverse=True)
    assert schedule.factor(104, 104) == pytest.approx(0.1) and schedule.factor(500, 104) == pytest.approx(0.1)


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for step in range(30):
        assert Schedule(name="cosine").factor(step, 30) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_constant_after_warmup_and_a_warmup_longer_than_the_run() -> None:
    assert [Schedule(warmup_steps=2).factor(step, 5) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert Schedule(name="cosine", warmup_steps=10).factor(9, 5) == 1.0
    assert Schedule(name="cosine", warmup_steps=10).factor(10, 5) == 1.0


@pytest.mark.parametrize("name", ["adamw", "adam", "adagrad", "rmsprop"])
def test_dense_steps_are_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    theirs = copy.deepcopy(ours)
    optimizers = Optimizers(DenseOptimizer(name=name, learning_rate=0.02, weight_decay=0.3), ours)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}[name]
    matrices = [p for n, p in theirs.named_parameters() if n in ("0.weight", "2.weight")]
    vectors = [p for n, p in theirs.named_parameters() if n not in ("0.weight", "2.weight")]
    reference = cls([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}], lr=0.02)
    for _ in range(3):
        x = torch.randn(5, 3)
        optimizers.begin_step(1.0)
        reference.zero_grad()
        for model in (ours, theirs):
            model(x).square().mean().backward()
        optimizers.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):  # some processors add and multiply at once in one of the two
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_fused_parameters_are_never_dense() -> None:
    model = Small()
    fused = fused_modules(model)
    assert list(fused) == ["tables"] and isinstance(model.tables, HasFusedState)
    dense = dense_parameters(model, fused.values())
    assert set(dense) == {"mlp.0.weight", "mlp.0.bias", "mlp.3.weight", "mlp.3.bias"}
    assert {id(p) for p in dense.values()} == {id(p) for p in tables.dense_parameters(model)}
    model.mlp[0].bias.requires_grad_(False)
    assert "mlp.0.bias" not in dense_parameters(model, fused.values())
    assert list(fused_modules(model.tables)) == [""]
    assert Optimizers(DenseOptimizer(), model.tables).dense_parameters == {}


def test_the_schedule_reaches_fused_and_dense_learning_rates() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    model.tables = EmbeddingTables(SPEC, EmbeddingTables.Config(dim=4, optimizer="sgd", learning_rate=0.2))
    dense = model.mlp[0].weight
    optimizers = Optimizers(DenseOptimizer(name="adagrad", learning_rate=0.3), model)
    batch = to_batch(data(8))
    table = next(model.tables.parameters())
    moved = {}
    start = copy.deepcopy(model.state_dict())
    for factor in (1.0, 0.25, 0.0):
        model.load_state_dict(start)
        optimizers.begin_step(factor)
        assert model.tables.learning_rate == pytest.approx(0.2 * factor)
        before, dense_before = table.detach().clone(), dense.detach().clone()
        model.loss(batch)[0].backward()
        optimizers.step()
        moved[factor] = table.detach() - before, dense.detach() - dense_before
    assert moved[1.0][0].abs().max() > 0 and moved[0.0][0].abs().max() == 0 and moved[0.0][1].abs().max() == 0
    torch.testing.assert_close(moved[0.25][0], 0.25 * moved[1.0][0], rtol=1e-3, atol=1e-7)
    assert 0 < moved[0.25][1].abs().max() < moved[1.0][1].abs().max()


def test_clipping_is_that_of_torch_and_only_dense() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizers = Optimizers(DenseOptimizer(), model)
    optimizers.begin_step(1.0)
    (100 * model.loss(to_batch(data(8)))[0]).backward()
    reference = [p.grad.clone() for p in optimizers.dense_parameters.values()]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in reference]
    for parameter, gradient in zip(parameters, reference, strict=True):
        parameter.grad = gradient
    norm = optimizers.gradient_norm()
    assert norm == float(nn.utils.clip_grad_norm_(parameters, 0.5)) > 0.5
    optimizers.clip(0.5, norm)
    for ours, theirs in zip(optimizers.dense_parameters.values(), parameters, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert optimizers.gradient_norm() == pytest.approx(0.5, rel=1e-4)


def test_a_copy_with_the_state_goes_on_as_the_original() -> None:
    torch.manual_seed(0)
    first, batch = Small().eval(), to_batch(data(20))

    def train(model: nn.Module, optimizers: Optimizers) -> None:
        for _ in range(3):
            optimizers.begin_step(0.5)
            model.loss(batch)[0].backward()
            optimizers.step()

    optimizers = Optimizers(DenseOptimizer(), first)
    train(first, optimizers)
    second = Small().eval()
    second.load_state_dict(first.state_dict())
    others = Optimizers(DenseOptimizer(), second)
    others.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    train(first, optimizers)
    train(second, others)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adagrad", "betas": [0.9, 0.99]}, "betas: adagrad has none"),
        ({"betas": [0.9, 1.0]}, r"betas: expected two values from 0 to below 1, got \(0\.9, 1\.0\)"),
        ({"name": "lion"}, "name: .*'adamw'.* got 'lion'"),
        ({"learning_rate": 0}, "learning_rate: .* got 0"),
    ],
)
def test_config_errors(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DenseOptimizer, values, source="test")
