# SPDX-License-Identifier: Apache-2.0
"""What holds of every registered ranker. A ranker that is added must be added here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import parse
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import dense_parameters
from recsys.ranking.model import Ranker

SMALL: dict[str, dict[str, Any]] = {
    "autoint": {"dim": 8, "layers": 2, "heads": 2, "head_dim": 4, "deep_hidden": (9,)},
    "dcnv2": {"layers": 2, "hidden": (9, 5)},
    "dhen": {"dim": 8, "blocks": 2, "mixer": {"name": "ensemble"}},
    "din": {"hidden": (9, 5)},
    "dlrm": {"bottom": (9,), "top": (9, 5)},
    "finalmlp": {"first": {"hidden": (9, 6)}, "second": {"hidden": (4,)}},
    "group_transformer": {"dim": 16, "blocks": 2},
    "hiformer": {"dim": 8, "mixer": {"rank": 5}},
    "masknet": {"blocks": 2, "width": 7},
    "rankmixer": {"dim": 12, "blocks": 2},
    "token_ranker": {"dim": 12},
    "tokenmixer_large": {"dim": 16, "blocks": 3},
    "unimixer": {"dim": 12},
    "unimixing_lite": {"dim": 12},
    "wukong": {"dim": 8, "blocks": 2},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, changes) for name, changes in SMALL.items()} | {
    "tokenmixer_large, sparse": ("tokenmixer_large", SMALL["tokenmixer_large"] | {"per_token": {"name": "sparse_moe"}}),
    "rankmixer, relu_moe": ("rankmixer", SMALL["rankmixer"] | {"per_token": {"name": "relu_moe", "experts": 4}}),
    "dlrm, dcn": ("dlrm", SMALL["dlrm"] | {"structure": "dcn", "rank": 4}),
}
EVERY = pytest.mark.parametrize("variant", list(VARIANTS))
LENGTHS = [3, 0, 6, 1, 2]
BY_DATA = {"rankmixer, relu_moe"}  # how many experts work depends on the data, which no formula knows

Build = Callable[..., Ranker]


def built(spec: InputSpec, variant: str, seed: int = 0, **options: Any) -> Ranker:
    """A small ranker."""
    name, changes = VARIANTS[variant]
    cls = components.get("ranker", name)
    torch.manual_seed(seed)
    model: Ranker = cls(parse(cls.Config, {"embedding": {"dim": 8}} | changes | options, source="test"), spec)
    return model


@pytest.fixture
def build(spec: InputSpec) -> Build:
    return partial(built, spec)


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> RankingBatch:
    found: RankingBatch = make_batch(make_rows(LENGTHS))
    return found


def fields_of(model: Ranker, rows: int) -> Tensor:
    return torch.randn(rows, sum(model.widths.values()), generator=torch.Generator().manual_seed(5))


class Interaction(nn.Module):
    """The part of a model that is captured: from the fields' vectors to the logits."""

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.model = model

    def forward(self, fields: Tensor) -> Tensor:
        return self.model.interact(fields)


def test_every_registered_ranker_is_here() -> None:
    assert components.names("ranker") == sorted(SMALL)


@EVERY
def test_logits_have_a_column_for_each_task_and_their_configuration_survives_json(build: Build, batch: RankingBatch, variant: str) -> None:
    model = build(variant)
    assert model(batch).shape == (5, 2)
    cls = type(model)
    assert parse(cls.Config, model.config.model_dump(mode="json"), source="again") == model.config


@EVERY
def test_every_dense_parameter_learns(build: Build, batch: RankingBatch, variant: str) -> None:
    model = build(variant)
    loss, parts = model.loss(batch)
    loss.backward()
    assert loss.isfinite() and not any(part.requires_grad for part in parts.values())
    names = {id(p): name for name, p in model.named_parameters()}
    still = [names[id(p)] for p in dense_parameters(model) if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


@EVERY
def test_the_tables_penalty_joins_the_loss(build: Build, batch: RankingBatch, variant: str) -> None:
    plain, shrunk = build(variant).eval(), build(variant, embedding={"dim": 8, "l2": 0.3}).eval()
    (before, parts), (loss, more) = plain.loss(batch), shrunk.loss(batch)
    torch.testing.assert_close(more["l2"], shrunk.tables.penalty(shrunk.embed(batch)))
    torch.testing.assert_close(loss, before + more["l2"])
    assert more.keys() == parts.keys() | {"l2"} and more["l2"] > 0


@EVERY
def test_rows_do_not_see_their_batch_mates(build: Build, make_rows: Any, make_batch: Any, variant: str) -> None:
    model, rows = build(variant).eval(), make_rows(LENGTHS)
    together = model(make_batch(rows))
    for b, row in enumerate(rows):
        torch.testing.assert_close(model(make_batch([row]))[0], together[b], rtol=1e-4, atol=1e-5)


@EVERY
def test_a_state_dict_carries_everything(build: Build, batch: RankingBatch, variant: str) -> None:
    model, other = build(variant), build(variant, seed=1)
    model.loss(batch)
    before = model.eval()(batch)
    assert not torch.equal(other.eval()(batch), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch), before)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in BY_DATA])
def test_operations_are_those_that_torch_counts(build: Build, variant: str) -> None:
    """Matrices that depend on parameters alone cost the same for any batch, so that the difference of two batches is what counts."""
    model = build(variant).eval()
    counted = []
    for rows in (2, 7):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.interact(fields_of(model, rows))
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 5 * model.costs().flops


@EVERY
def test_costs_add_up(build: Build, variant: str) -> None:
    model = build(variant).eval()
    costs = model.costs()
    assert costs.tables + costs.dense == sum(p.numel() for p in model.parameters())
    sparse = "sparse" in variant or "moe" in variant
    assert (costs.active < costs.dense) == sparse
    assert costs.active > 0 and costs.flops > 0


@EVERY
def test_one_graph_holds_the_whole_interaction(build: Build, variant: str) -> None:
    torch._dynamo.reset()  # every variant is a recompilation of one class, and their number is limited
    model = build(variant).eval()
    interaction, fields = Interaction(model), fields_of(model, 5)
    expected = interaction(fields)
    torch.testing.assert_close(torch.compile(interaction, backend="eager", fullgraph=True)(fields), expected)
    exported = torch.export.export(interaction, (fields,), strict=False)
    torch.testing.assert_close(exported.module()(fields), expected)


@EVERY
def test_bf16_is_near_to_fp32(build: Build, variant: str) -> None:
    model = build(variant).eval()
    fields = fields_of(model, 64)
    expected = model.interact(fields)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.interact(fields)
    assert got.isfinite().all()
    spread = expected.std() + 0.05
    assert ((got.float() - expected).abs().mean() / spread) < 0.1


@pytest.mark.slow
@EVERY
def test_compiled_gradients_are_the_eager_ones(build: Build, batch: RankingBatch, variant: str) -> None:
    eager, compiled = build(variant).eval(), build(variant).eval()
    compiled.compile_dense()
    for model in (eager, compiled):
        model.loss(batch)[0].backward()
    for ours, theirs in zip(dense_parameters(compiled), dense_parameters(eager), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
