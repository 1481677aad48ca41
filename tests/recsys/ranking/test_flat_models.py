# SPDX-License-Identifier: Apache-2.0
"""The models over the flat vector of fields, from impressions to logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import dense_parameters
from recsys.ranking.flat_ranker import FlatRanker
from recsys.ranking.flops import (
    Size,
    activation_unit_parameters,
    dcnv2_size,
    din_size,
    dlrm_dcn_size,
    dlrm_size,
    finalmlp_size,
    gate_size,
    masknet_size,
)
from recsys.ranking.models import DIN, FinalMLP
from recsys.ranking.part import split_fields
from tests.recsys.ranking.field_vectors import flat

Build = Callable[..., FlatRanker]
LENGTHS = [3, 0, 6, 1, 2]
VECTORS, DENSE, DIM, TASKS = 4, 2, 8, 2  # user, genres, item, history; age, popularity
FLAT = VECTORS * DIM + DENSE
SMALL: dict[str, Any] = {"embedding": {"dim": DIM}, "history": {"name": "target_attention", "hidden": (6,)}}

# Each variant of each model, and its size in closed form, history left out.
VARIANTS: list[tuple[str, dict[str, Any], Size]] = [
    ("dcnv2", {"layers": 2, "hidden": (7, 5)}, dcnv2_size(FLAT, TASKS, 2, None, (7, 5))),
    ("dcnv2", {"layers": 1, "rank": 3, "hidden": (7,)}, dcnv2_size(FLAT, TASKS, 1, 3, (7,))),
    ("dcnv2", {"structure": "stacked", "hidden": (7, 5)}, dcnv2_size(FLAT, TASKS, 3, None, (7, 5), "stacked")),
    ("dcnv2", {"hidden": ()}, dcnv2_size(FLAT, TASKS, 3, None, ())),
    ("dcnv2", {"hidden": (7, 5), "batch_norm": True}, dcnv2_size(FLAT, TASKS, 3, None, (7, 5), batch_norm=True)),
    ("dlrm", {"bottom": (9,), "top": (7, 5)}, dlrm_size(VECTORS, DENSE, DIM, TASKS, (9,), (7, 5))),
    (
        "dlrm",
        {"structure": "dcn", "bottom": (9,), "top": (7, 5), "layers": 2, "rank": 4},
        dlrm_dcn_size(VECTORS, DENSE, DIM, TASKS, (9,), (7, 5), 2, 4),
    ),
    (
        "dlrm",
        {"structure": "dcn", "bottom": (), "top": (5,), "rank": None},
        dlrm_dcn_size(VECTORS, DENSE, DIM, TASKS, (), (5,), 3, None),
    ),
    ("masknet", {"blocks": 3, "width": 7}, masknet_size(VECTORS, DENSE, DIM, TASKS, 3, 7, 2.0, ())),
    (
        "masknet",
        {"structure": "parallel", "blocks": 2, "width": 7, "reduction": 0.3, "hidden": (9, 5)},
        masknet_size(VECTORS, DENSE, DIM, TASKS, 2, 7, 0.3, (9, 5), "parallel"),
    ),
    (
        "finalmlp",
        {"first": {"hidden": (9, 6)}, "second": {"hidden": (4,)}, "heads": 2},
        finalmlp_size(FLAT, TASKS, (9, 6), (4,), 2, 2 * gate_size(FLAT, 0, ())),
    ),
    (
        "finalmlp",
        {"first": {"hidden": (6,), "context": ("age", "user"), "gate_hidden": (5,)}, "second": {"hidden": (4,), "context": None}},
        finalmlp_size(FLAT, TASKS, (6,), (4,), 1, gate_size(FLAT, DIM + 1, (5,)) + gate_size(FLAT, None, ())),
    ),
    ("din", {"hidden": (7, 5)}, din_size(FLAT, TASKS, (7, 5))),
    ("din", {"hidden": (7,), "batch_norm": True}, din_size(FLAT, TASKS, (7,), batch_norm=True)),
]
EACH = pytest.mark.parametrize(("name", "changes"), [v[:2] for v in VARIANTS], ids=[f"{v[0]}{i}" for i, v in enumerate(VARIANTS)])
CAPTURED = (1, 5, 9, 11, 13)  # one of each model
NAMES = sorted({name for name, _, _ in VARIANTS})


@pytest.fixture
def build(spec: InputSpec) -> Build:
    def make(name: str, seed: int = 0, **changes: Any) -> FlatRanker:
        torch.manual_seed(seed)
        cls = components.get("ranker", name)
        return cls(parse(cls.Config, SMALL | changes, source="test"), spec)

    return make


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> RankingBatch:
    return make_batch(make_rows(LENGTHS))


def fields_of(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    widths = {"user": DIM, "genres": DIM, "item": DIM, "history": DIM, "age": 1, "popularity": 1}
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(rows, width, generator=generator).to(dtype) for name, width in widths.items()}


# --- what holds of every model


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_survives_plain_data_and_every_default_builds(spec: InputSpec, batch: RankingBatch, name: str) -> None:
    cls = components.get("ranker", name)
    assert issubclass(cls, FlatRanker)
    config = parse(cls.Config, {"name": name}, source="test")
    assert parse(cls.Config, config.model_dump(mode="json"), source="again") == config == cls.Config()
    assert cls(config, spec)(batch).shape == (5, TASKS)


@EACH
def test_every_dense_parameter_learns(build: Build, batch: RankingBatch, name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes)
    loss, _ = model.loss(batch)
    loss.backward()
    names = {id(p): key for key, p in model.named_parameters()}
    assert loss.isfinite()
    assert [names[id(p)] for p in dense_parameters(model) if p.grad is None or not p.grad.abs().max() > 0] == []


@EACH
def test_rows_do_not_see_their_batch_mates(build: Build, make_rows: Any, make_batch: Any, name: str, changes: dict[str, Any]) -> None:
    model, rows = build(name, **changes), make_rows(LENGTHS)
    model(make_batch(rows))  # gives a batch norm its statistics
    model.eval()
    together = model(make_batch(rows))
    for b, row in enumerate(rows):
        torch.testing.assert_close(model(make_batch([row]))[0], together[b])


@EACH
def test_every_input_matters(build: Build, name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes).eval()
    fields = fields_of(8)
    before = model.interact(flat(fields))
    for field, value in fields.items():
        assert not torch.allclose(model.interact(flat(fields | {field: value + 1})), before), field


@pytest.mark.parametrize(("name", "changes", "size"), VARIANTS, ids=[f"{v[0]}{i}" for i, v in enumerate(VARIANTS)])
def test_costs_equal_the_closed_forms_and_torchs_count(build: Build, name: str, changes: dict[str, Any], size: Size) -> None:
    model = build(name, **changes).eval()
    costs = model.costs()
    assert costs.dense == costs.active == size.parameters + activation_unit_parameters(DIM, (6,), extras=1)
    for rows in (1, 3):
        with FlopCounterMode(display=False) as counter:
            model.interact(flat(fields_of(rows)))
        assert counter.get_total_flops() == rows * costs.flops == rows * size.flops


@EACH
def test_it_runs_in_bfloat16_near_float32(build: Build, name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes).eval()
    expected = model.interact(flat(fields_of(8)))
    model.body.bfloat16()
    model.head.bfloat16()
    logits = model.interact(flat(fields_of(8, torch.bfloat16)))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


class Interact(nn.Module):
    """The dense half of a ranker, without its tables."""

    def __init__(self, model: FlatRanker) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model.body, model.head])
        self.interact = model.interact

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        return self.interact(fields)


@pytest.mark.parametrize(("name", "changes"), [VARIANTS[i][:2] for i in CAPTURED], ids=[f"{VARIANTS[i][0]}{i}" for i in CAPTURED])
def test_it_is_captured_whole_by_compile_and_export(build: Build, name: str, changes: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, fields = build(name, **changes).eval(), flat(fields_of(4))
    compiled = torch.compile(model.interact, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(fields), model.interact(fields))
    dynamic = {0: torch.export.Dim("rows", min=2)}
    exported = torch.export.export(Interact(model), (fields,), dynamic_shapes=(dynamic,)).module()
    torch.testing.assert_close(exported(flat(fields_of(7))), model.interact(flat(fields_of(7))))


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_column_may_be_missing(build: Build, spec: InputSpec, name: str) -> None:
    cls = components.get("ranker", name)
    model = cls(parse(cls.Config, SMALL, source="test"), spec.model_copy(update={"dense": ()}))
    fields = {field: value for field, value in fields_of(3).items() if value.shape[1] == DIM}
    assert model.interact(flat(fields)).shape == (3, TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_tables_may_have_different_widths(build: Build, batch: RankingBatch, name: str) -> None:
    model = build(name, embedding={"dim": DIM, "dims": {"genre": 4, "item": 12}})
    fields = model.fields(model.embed(batch), batch)
    assert list(model.widths.values()) == [DIM, 4, 12, 12, 1, 1] and fields.shape[1] == sum(model.widths.values())
    with FlopCounterMode(display=False) as counter:
        logits = model.interact(fields)
    assert logits.shape == (len(LENGTHS), TASKS)
    assert counter.get_total_flops() == len(LENGTHS) * model.flops


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dcnv2", {"rank": 0}, "rank.*greater than or equal to 1"),
        ("dcnv2", {"structure": "paralel"}, "structure.*'paralel'"),
        ("dcnv2", {"hidden": (4, 0)}, "hidden.*1.*greater than 0"),
        ("dlrm", {"structure": "cat"}, "structure.*'cat'"),
        ("masknet", {"reduction": 0}, "reduction.*greater than 0"),
        ("masknet", {"block": 2}, "unknown key 'block'; did you mean 'blocks'"),
        ("finalmlp", {"heads": 3}, "heads: expected a divisor of the widths of both streams, 400 and 400, got 3"),
        ("finalmlp", {"second": {"context": ("usr",)}}, "second.context: unknown field 'usr'; did you mean 'user'"),
        ("finalmlp", {"head": {"name": "towers"}}, "head"),
        ("din", {"dropout": 1.0}, "dropout.*less than 1"),
    ],
)
def test_bad_settings_are_named(build: Build, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **changes)


# --- DCN V2, MaskNet, FinalMLP, DIN


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("bias", [0, 1])
def test_dcnv2_with_cross_matrices_of_zeros_feeds_multiples_of_the_input(build: Build, structure: str, bias: int) -> None:
    model, fields = build("dcnv2", structure=structure, hidden=(7,)), fields_of(4)
    for layer in model.body.cross.layers:
        nn.init.zeros_(layer.up.weight)
        nn.init.constant_(layer.up.bias, bias)
    x = torch.cat([fields[name] for name in model.widths], 1)
    crossed, linear = x * (1 + 3 * bias), model.body.deep.layers[0]  # each of three layers adds the input once more
    deep = ((x if structure == "parallel" else crossed) @ linear.weight.T + linear.bias).relu()
    torch.testing.assert_close(model.body(x), torch.cat([crossed, deep], 1) if structure == "parallel" else deep)


def test_masknet_blocks_are_chained_or_stand_side_by_side(build: Build) -> None:
    fields = fields_of(4)
    for structure in ("serial", "parallel"):
        body = build("masknet", structure=structure, blocks=2, width=7, hidden=()).body
        tokens = body.tokenizer(flat(fields))
        v, h = tokens.flatten(1), body.norm(tokens).flatten(1)
        first, second = body.blocks
        expected = second(v, first(v, h)) if structure == "serial" else torch.cat([first(v, h), second(v, h)], 1)
        torch.testing.assert_close(body(flat(fields)), expected)


def test_masknet_still_sees_how_large_a_dense_column_is(build: Build) -> None:
    body = build("masknet").body
    age = list(body.tokenizer.widths).index("age")
    normed = body.norm(body.tokenizer(flat(fields_of(2) | {"age": torch.tensor([[1.0], [2.0]])})))[:, age]
    assert not torch.allclose(normed[0], normed[1])


def test_finalmlp_gates_read_their_context_alone(build: Build) -> None:
    model, fields = build("finalmlp", first={"context": ("age", "user")}, second={"context": ()}), fields_of(4)
    assert isinstance(model, FinalMLP)

    def gates(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([values[name] for name in model.widths], 1)
        return model.body.first.gated(x) / x, model.body.second.gated(x) / x

    first, second = gates(fields)
    context = torch.cat([fields["age"], fields["user"]], 1)
    torch.testing.assert_close(first, 2 * torch.sigmoid(model.body.first.gate(context)))
    torch.testing.assert_close(second, torch.ones_like(second))
    for field, value in fields.items():
        same = torch.allclose(gates(fields | {field: value + 1})[0], first, atol=1e-5)
        assert same == (field not in ("age", "user")), field


def test_finalmlp_without_gates_and_bilinear_term_is_a_linear_map_of_two_mlps(build: Build) -> None:
    model, fields = build("finalmlp", first={"context": None}, second={"context": None, "hidden": (8,)}, heads=4), fields_of(4)
    nn.init.zeros_(model.head.weight)
    x = torch.cat([fields[name] for name in model.widths], 1)
    both = torch.cat([model.body.first.deep(x), model.body.second.deep(x)], 1)
    torch.testing.assert_close(model.interact(flat(fields)), model.head.linear(both))


def test_din_reads_a_history_as_a_set_and_its_sum(build: Build, make_rows: Any, make_batch: Any) -> None:
    model, rows = build("din").eval(), make_rows(LENGTHS)
    assert isinstance(model, DIN)
    before = model(make_batch(rows))
    backwards = [row | {key: row[key][::-1] for key in ("seen", "seen_stars")} for row in rows]
    torch.testing.assert_close(model(make_batch(backwards)), before)
    longest = make_rows([50], seed=9)  # jagged rows hold no padding: a long neighbour changes nothing
    torch.testing.assert_close(model(make_batch(rows + longest))[:5], before)
    histories = []
    for made in (make_batch(rows), make_batch([doubled(row) for row in rows])):
        histories.append(split_fields(model.fields(model.embed(made), made), model.widths)["history"])
    once, twice = histories
    torch.testing.assert_close(twice, 2 * once)


def doubled(row: dict[str, Any]) -> dict[str, Any]:
    return row | {key: row[key] * 2 for key in ("seen", "seen_stars")}


def test_din_equals_its_parts(build: Build, batch: RankingBatch) -> None:
    model = build("din", hidden=(7,)).eval()
    embedded = model.embed(batch)
    pooled = model.histories[0](embedded.sequences)[:, 0]
    parts = [embedded.pooled["user"], embedded.pooled["genres"], embedded.sequences["item"].values(), pooled, batch.dense]
    linear, slope = model.body.layers.layers[0], model.body.layers.layers[1].weight
    z = torch.cat(parts, 1) @ linear.weight.T + linear.bias
    expected = torch.cat([tower[0](torch.where(z > 0, z, slope * z)) for tower in model.head.towers], 1)
    torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_planted_preference(build: Build, make_rows: Any, make_batch: Any, name: str) -> None:
    rows = make_rows([n % 3 for n in range(96)], seed=3)
    for row in rows:
        row["labels"] = [float(row["user"][0] < 10), float(row["dense"][0] * row["dense"][1] > 0)]
    batch = make_batch(rows)
    small: dict[str, dict[str, Any]] = {
        "dcnv2": {"hidden": (32,)},
        "dlrm": {"bottom": (32,), "top": (32,)},
        "masknet": {"width": 32},
        "finalmlp": {"first": {"hidden": (32,)}, "second": {"hidden": (32,)}},
        "din": {"hidden": (32,)},
    }
    model = build(name, **small[name])
    optimizer = torch.optim.Adam(dense_parameters(model), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
