# SPDX-License-Identifier: Apache-2.0
"""RankMixer as its equations have it, dense and with experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import dense_parameters
from recsys.ranking.models import RankMixer

Build = Callable[..., RankMixer]
T, D, N = 4, 16, 4
VARIANTS: list[dict[str, Any]] = [
    {},
    {"per_token": {"name": "relu_moe", "experts": 4, "active": 0.5}},
    {"per_token": {"name": "sparse_moe", "experts": 4, "active": 3, "balance": 0.01}},
    {"tokenizer": {"name": "auto_split", "tokens": 2}},
]


@pytest.fixture
def build(spec: InputSpec, groups: dict[str, tuple[str, ...]]) -> Build:
    def make(**changes: Any) -> RankMixer:
        settings: dict[str, Any] = {"tokenizer": {"name": "groups", "groups": groups}, "dim": D, "embedding": {"dim": 8}} | changes
        torch.manual_seed(0)
        return RankMixer(parse(RankMixer.Config, settings, source="test"), spec)

    return make


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> RankingBatch:
    return make_batch(make_rows([3, 0, 6, 1, 2]))


def test_it_is_registered_and_built_from_plain_data(spec: InputSpec, batch: RankingBatch) -> None:
    cls = components.get("ranker", "rankmixer")
    assert cls is RankMixer
    config = parse(cls.Config, {"name": "rankmixer", "tokenizer": {"name": "auto_split", "tokens": 4}, "dim": 8}, source="test")
    assert parse(cls.Config, config.model_dump(mode="json"), source="again") == config
    assert cls(config, spec)(batch).shape == (5, 2)


def test_a_block_is_what_the_equations_say(build: Build) -> None:
    block, x = build(blocks=1).stack.double(), torch.randn(5, T, D, dtype=torch.float64)
    (module,) = block.blocks
    for norm in (module.norm1, module.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (D,), layer.weight, layer.bias, layer.eps)

    d, ffn = D // T, module.per_token
    expected = torch.empty_like(x)
    for b in range(5):
        mixed = torch.stack([torch.cat([x[b, t, h * d : (h + 1) * d] for t in range(T)]) for h in range(T)])
        s = norm(module.norm1, mixed + x[b])
        for t in range(T):
            v = functional.gelu(s[t] @ ffn.up[t] + ffn.up_bias[t, 0]) @ ffn.down[t] + ffn.down_bias[t, 0]
            expected[b, t] = norm(module.norm2, v + s[t])
    torch.testing.assert_close(block(x)[-1], expected)


def test_with_one_token_mixing_doubles_it(build: Build, groups: Any) -> None:
    everything = tuple(field for fields in groups.values() for field in fields)
    model = build(tokenizer={"name": "groups", "groups": {"all": everything}, "global_token": False}, blocks=1)
    (block,) = model.stack.blocks
    x = torch.randn(5, 1, D)
    s = block.norm1(2 * x)
    torch.testing.assert_close(model.stack(x)[-1], block.norm2(block.per_token(s) + s))


@pytest.mark.parametrize("blocks", [1, 3])
def test_parameters_are_those_of_the_formula(build: Build, blocks: int) -> None:
    model = build(blocks=blocks)
    assert sum(p.numel() for p in model.stack.parameters()) == blocks * (T * (2 * N * D**2 + N * D + D) + 4 * D)
    assert model.flops - model.tokenizer.flops - model.readout.flops == blocks * 4 * N * T * D**2


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_dense_parameter_learns(build: Build, batch: RankingBatch, changes: dict[str, Any]) -> None:
    model = build(**changes)
    loss, parts = model.loss(batch)
    loss.backward()
    names = {id(p): name for name, p in model.named_parameters()}
    idle = [names[id(p)] for p in dense_parameters(model) if p.grad is None or not p.grad.abs().max() > 0]
    assert idle == []
    assert ("penalty" in parts) == ("moe" in changes.get("per_token", {}).get("name", ""))


@pytest.mark.parametrize("changes", VARIANTS)
def test_rows_do_not_see_their_batch_mates(build: Build, make_rows: Any, make_batch: Any, changes: dict[str, Any]) -> None:
    model, rows = build(**changes).eval(), make_rows([3, 0, 6, 1, 2])
    together = model(make_batch(rows))
    for b, row in enumerate(rows):
        torch.testing.assert_close(model(make_batch([row]))[0], together[b])


@pytest.mark.parametrize("changes", VARIANTS)
def test_operations_are_what_torch_counts(build: Build, batch: RankingBatch, changes: dict[str, Any]) -> None:
    model = build(**changes)
    fields = model.fields(model.embed(batch), batch)
    with FlopCounterMode(display=False) as counter:
        model.interact(fields)
    assert counter.get_total_flops() == 5 * model.costs().flops


def test_experts_lower_what_inference_costs(build: Build) -> None:
    model, dense = build(**VARIANTS[1]), build()
    assert model.costs().active == model.costs().dense
    assert model.eval().costs().active < 0.7 * model.costs().dense
    assert model.costs().flops < 0.7 * dense.costs().flops


def test_inference_compiled_without_graph_breaks_it_equals_eager(build: Build, batch: RankingBatch) -> None:
    model = build(**VARIANTS[1]).eval()
    fields = model.fields(model.embed(batch), batch)
    compiled = torch.compile(model.interact, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(fields), model.interact(fields))


def test_experts_train_on_planted_preferences(build: Build, make_rows: Any, make_batch: Any) -> None:
    rows = make_rows([n % 5 for n in range(160)], seed=3)
    for row in rows:
        row["labels"] = [float(row["user"][0] < 5), float(row["dense"][0] > 0)]
    batch, model = make_batch(rows), build(per_token={"name": "relu_moe", "experts": 4, "active": 0.5})
    optimizer = torch.optim.Adam(dense_parameters(model), lr=1e-2)
    first = model.loss(batch)[1]["bce"]
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    assert model.loss(batch)[1]["bce"] < 0.3 * first
    assert model.eval().loss(batch)[1]["bce"] < 0.4 * first  # the inference router alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": {"heads": 8}}, r"heads must equal tokens \(4\)"),
        ({"dim": 18}, "dim=18 and heads=4"),
        ({"per_token": {"name": "relu_mo"}}, "per_token.*did you mean 'relu_moe'"),
        ({"stack": {"norm": "batch"}}, "stack.norm"),
    ],
)
def test_bad_settings_are_named(build: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)
