# SPDX-License-Identifier: Apache-2.0
"""Wukong, HiFormer, Group Transformer, AutoInt and DHEN, from impressions to logits."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import dense_parameters
from recsys.ranking.heads import Towers
from recsys.ranking.mixers import Ensemble, FactorizationMachine, HeteroAttention, HiFormer
from recsys.ranking.model import Ranker
from recsys.ranking.models import DHEN, AutoInt, GroupTransformer, HiFormerRanker, Wukong
from recsys.ranking.models.autoint import InteractingLayer
from recsys.ranking.part import split_fields
from recsys.ranking.per_token import FFN
from recsys.ranking.readout import FlattenReadout

Build = Callable[..., Any]
LENGTHS = [3, 0, 6, 1, 2]
FIELDS, TASKS, EMBEDDING = 6, 2, 8  # of the fixture `spec`: user, genres, item, history, and the dense age and popularity

MEMBERS = [{"name": "dot"}, {"name": "self_attention", "heads": 2}, {"name": "cross", "rank": 3}, {"name": "linear"}]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("wukong", {}),
    ("wukong", {"blocks": 1, "mixer": {"rank": 3, "fm_tokens": 5, "hidden": []}, "head": {"name": "towers"}}),
    ("hiformer", {"mixer": {"rank": 5}}),
    ("hiformer", {"mixer": {"rank": None, "heads": 2}, "per_token": None}),
    ("group_transformer", {"blocks": 2}),
    ("group_transformer", {"blocks": 2, "mixer": {"heads": 1}, "readout": "flatten", "auxiliary": "deep_supervision"}),
    ("autoint", {}),
    ("autoint", {"deep_hidden": [], "layers": 1, "scaled": True}),
    ("autoint", {"deep_hidden": [9], "layers": 2, "heads": 3, "head_dim": 5, "dropout": 0.1}),
    ("dhen", {"mixer": {"interactions": MEMBERS}}),
    ("dhen", {"mixer": {"interactions": MEMBERS[1:], "combine": "concat"}, "blocks": 2}),
]
CLASSES = {"wukong": Wukong, "hiformer": HiFormerRanker, "group_transformer": GroupTransformer, "autoint": AutoInt, "dhen": DHEN}


@pytest.fixture
def build(spec: InputSpec, groups: dict[str, tuple[str, ...]]) -> Build:
    def make(name: str, **changes: Any) -> Any:
        cls = components.get("ranker", name)
        settings: dict[str, Any] = {"dim": EMBEDDING, "embedding": {"dim": EMBEDDING, "init_std": 0.5}}
        if name == "group_transformer":
            settings["tokenizer"] = {"name": "groups", "groups": groups}
        torch.manual_seed(0)
        return cls(parse(cls.Config, settings | changes, source="test"), spec)

    return make


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> RankingBatch:
    return make_batch(make_rows(LENGTHS))


def fields_of(model: Ranker, batch: RankingBatch) -> Tensor:
    return model.fields(model.embed(batch), batch).detach()


def outside(model: Ranker) -> int:
    """The parameters of the history encoder and of the affine maps of the two dense columns to tokens."""
    return sum(p.numel() for p in model.histories.parameters()) + 2 * 2 * EMBEDDING


@pytest.mark.parametrize("name", CLASSES)
def test_models_are_registered_and_their_configuration_is_plain_data(build: Build, name: str, batch: RankingBatch) -> None:
    model = build(name)
    assert type(model) is CLASSES[name]
    assert parse(type(model).Config, model.config.model_dump(mode="json"), source="again") == model.config
    assert model(batch).shape == (5, TASKS)


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_every_dense_parameter_learns(build: Build, batch: RankingBatch, name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes)
    loss, _ = model.loss(batch)
    loss.backward()
    names = {id(p): parameter for parameter, p in model.named_parameters()}
    assert loss.isfinite()
    assert [names[id(p)] for p in dense_parameters(model) if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_flops_equal_what_torch_counts(build: Build, batch: RankingBatch, name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes).eval()
    fields, costs = fields_of(model, batch), model.costs()
    with FlopCounterMode(display=False) as counter:
        model.interact(fields)
    assert counter.get_total_flops() == len(LENGTHS) * costs.flops
    assert costs.active == costs.dense == sum(p.numel() for p in dense_parameters(model))


@pytest.mark.parametrize("name", CLASSES)
def test_rows_do_not_see_their_batch_mates(build: Build, make_rows: Any, make_batch: Any, name: str) -> None:
    model, rows = build(name).eval(), make_rows(LENGTHS)
    together = model(make_batch(rows))
    assert len(together[:, 0].unique()) == len(rows)
    for b, row in enumerate(rows):
        torch.testing.assert_close(model(make_batch([row]))[0], together[b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_every_input_matters(build: Build, make_rows: Any, make_batch: Any, name: str) -> None:
    model, rows = build(name).eval(), make_rows([3])
    before = model(make_batch(rows))
    changes = {"user": [1], "genres": [1, 2, 3], "item": [1], "seen": [1, 2, 3], "seen_stars": [1, 2, 3], "dense": [1.0, 2.0]}
    for key, value in changes.items():
        assert not torch.equal(model(make_batch([rows[0] | {key: value}])), before), key


@pytest.mark.parametrize("name", ["wukong", "autoint"])  # the parts of the others compile in the contract's tests
def test_interactions_compile_to_one_graph(build: Build, batch: RankingBatch, name: str) -> None:
    model = build(name, **({"layers": 2} if name == "autoint" else {"blocks": 1})).eval()
    fields = fields_of(model, batch)
    compiled = torch.compile(model.interact, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(fields), model.interact(fields))


@pytest.mark.parametrize(("name", "blocks"), [("wukong", 2), ("hiformer", 2), ("dhen", 1)])
def test_planted_preferences_are_learned(build: Build, make_rows: Any, make_batch: Any, name: str, blocks: int) -> None:
    rows = make_rows([n % 5 for n in range(128)], seed=3)
    for row in rows:
        row["labels"] = [float(row["user"][0] % 2 == row["item"][0] % 2), float(row["dense"][0] * row["dense"][1] > 0)]
    batch, model = make_batch(rows), build(name, blocks=blocks)
    optimizer, losses = torch.optim.Adam(dense_parameters(model), lr=1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_wukong_blocks_are_those_of_the_paper(build: Build, batch: RankingBatch) -> None:
    model = build("wukong", blocks=2)
    x = model.tokenizer(fields_of(model, batch))
    for block, state in zip(model.stack.blocks, model.states(fields_of(model, batch)), strict=True):
        assert isinstance(block.mixer, FactorizationMachine)
        assert block.per_token is None
        x = functional.layer_norm(block.mixer(x) + x, (EMBEDDING,), block.norm1.weight, block.norm1.bias)
        torch.testing.assert_close(state, x)
    torch.testing.assert_close(model.interact(fields_of(model, batch)), model.readout.head(x.flatten(1)))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_every_layer_of_wukong_doubles_the_order(build: Build, blocks: int) -> None:
    """Without norms and activations the last tokens are polynomials of degree 2^L of a factor on the first tokens."""
    stack = build("wukong", blocks=blocks, mixer={"rank": 3, "hidden": []}).stack.double()
    for block in stack.blocks:
        block.norm1, block.mixer.norm = nn.Identity(), nn.Identity()
    tokens, degree = torch.randn(1, FIELDS, EMBEDDING, dtype=torch.float64), 2**blocks
    factors = np.linspace(-1, 1, degree + 6)
    with torch.no_grad():
        values = torch.stack([stack(t * tokens)[-1].flatten() for t in factors]).numpy()
    for order, exact in ((degree - 1, False), (degree, True)):
        fitted = np.polynomial.chebyshev.chebval(factors, np.polynomial.chebyshev.chebfit(factors, values, order)).T
        assert (np.abs(fitted - values).max() < 1e-10 * np.abs(values).max()) == exact


@pytest.mark.parametrize("rank", [None, 5])
def test_hiformer_parameters_equal_the_formula(build: Build, rank: int | None) -> None:
    model = build("hiformer", blocks=2, mixer={"rank": rank}, per_token={"name": "ffn", "expansion": 3})
    width = FIELDS * EMBEDDING
    attention = 3 * (width**2 if rank is None else 2 * rank * width) + FIELDS * EMBEDDING**2
    ffn, norms = FIELDS * (2 * 3 * EMBEDDING**2 + 4 * EMBEDDING), 4 * EMBEDDING
    assert all(isinstance(block.mixer, HiFormer) and isinstance(block.per_token, FFN) for block in model.stack.blocks)
    assert model.costs().dense == outside(model) + 2 * (attention + ffn + norms) + TASKS * (EMBEDDING + 1)


def test_group_transformer_is_a_pre_norm_transformer_with_weights_per_token(build: Build, batch: RankingBatch) -> None:
    model = build("group_transformer", blocks=2)
    x = model.tokenizer(fields_of(model, batch))
    assert x.shape[1] == 4  # three groups and the global token
    for block, state in zip(model.stack.blocks, model.states(fields_of(model, batch)), strict=True):
        assert isinstance(block.mixer, HeteroAttention)
        x = x + block.mixer(functional.rms_norm(x, (EMBEDDING,), block.norm1.weight, 1e-6))
        x = x + block.per_token(functional.rms_norm(x, (EMBEDDING,), block.norm2.weight, 1e-6))
        torch.testing.assert_close(state, x)
    weights = 4 * (4 * EMBEDDING**2 + 8 * EMBEDDING**2 + 5 * EMBEDDING) + 2 * EMBEDDING
    assert sum(p.numel() for p in model.stack.parameters()) == 2 * weights


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_dhen_layers_are_norm_of_ensemble_and_shortcut(build: Build, batch: RankingBatch, combine: str) -> None:
    model = build("dhen", blocks=2, mixer={"interactions": MEMBERS, "combine": combine})
    x = model.tokenizer(fields_of(model, batch))
    for block, state in zip(model.stack.blocks, model.states(fields_of(model, batch)), strict=True):
        assert isinstance(block.mixer, Ensemble)
        results = [member(x) for member in block.mixer.interactions]
        if combine == "sum":
            joined = sum(results)
        else:
            joined = torch.cat([share(result) for share, result in zip(block.mixer.shares, results, strict=True)], dim=1)
        x = functional.layer_norm(joined + x, (EMBEDDING,), block.norm1.weight, block.norm1.bias)
        torch.testing.assert_close(state, x)


def test_dhen_takes_any_mixer_that_keeps_the_shape(build: Build, batch: RankingBatch) -> None:
    mixed = [{"name": "hiformer", "rank": 2}, {"name": "factorization_machine"}, {"name": "identity"}]
    assert build("dhen", mixer={"interactions": mixed})(batch).shape == (5, TASKS)
    with pytest.raises(ConfigError, match=r"interactions.*unknown mixer 'dott'; did you mean 'dot'"):
        build("dhen", mixer={"interactions": [{"name": "dott"}]})


@pytest.mark.parametrize("scaled", [False, True])
def test_an_interacting_layer_equals_loops(scaled: bool) -> None:
    torch.manual_seed(0)
    layer, x = InteractingLayer(4, 3, heads=2, head_dim=5, scaled=scaled).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    query, key, value, residual = (p.weight.detach().numpy().T for p in (layer.query, layer.key, layer.value, layer.residual))
    for row, got in zip(x.numpy(), layer(x).detach().numpy(), strict=True):
        q, k, v = row @ query, row @ key, row @ value
        for m in range(4):
            mixed = np.zeros(10)
            for own in (slice(0, 5), slice(5, 10)):
                weights = np.exp(k[:, own] @ q[m, own] / (np.sqrt(5) if scaled else 1))
                mixed[own] = weights @ v[:, own] / weights.sum()
            np.testing.assert_allclose(got[m], np.maximum(mixed + row[m] @ residual, 0), rtol=1e-10, atol=1e-12)


def test_autoint_does_not_see_the_order_of_fields_before_it_flattens(build: Build) -> None:
    layers, order = build("autoint").layers.double(), torch.tensor([3, 0, 5, 4, 1, 2])
    x = torch.randn(2, FIELDS, EMBEDDING, dtype=torch.float64)
    torch.testing.assert_close(layers(x[:, order]), layers(x)[:, order])


def test_autoint_plus_adds_the_logit_of_an_mlp_on_the_fields(build: Build, batch: RankingBatch) -> None:
    plain, plus = build("autoint", deep_hidden=[]).eval(), build("autoint", deep_hidden=[7, 3]).eval()
    assert plain.deep is None
    assert not plus.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    fields = fields_of(plus, batch)
    vectors = split_fields(fields, plus.widths).values()
    flat = torch.stack([projection(v) for v, projection in zip(vectors, plus.tokenizer.projections, strict=True)], 1).flatten(1)
    first, second, last = (layer for layer in plus.deep if isinstance(layer, nn.Linear))
    torch.testing.assert_close(plus.interact(fields), plain.interact(fields) + last(second(first(flat).relu()).relu()))


@pytest.mark.parametrize(("layers", "heads", "head_dim", "deep"), [(3, 2, 32, (400, 400)), (1, 3, 5, ()), (2, 1, 4, (6,))])
def test_autoint_parameters_and_flops_equal_the_formulas(
    build: Build, layers: int, heads: int, head_dim: int, deep: tuple[int, ...]
) -> None:
    model, width = build("autoint", layers=layers, heads=heads, head_dim=head_dim, deep_hidden=deep), heads * head_dim
    matrices = 4 * EMBEDDING * width + (layers - 1) * 4 * width**2
    head = FIELDS * width * TASKS
    mlp = list(pairwise((FIELDS * EMBEDDING, *deep, TASKS))) if deep else []
    deep_weights = sum(a * b for a, b in mlp)
    assert model.costs().dense == outside(model) + matrices + head + TASKS + deep_weights + sum(b for _, b in mlp)
    dense_columns = 2 * EMBEDDING
    attention = layers * 4 * FIELDS**2 * width
    assert model.flops == 2 * (FIELDS * matrices + head + deep_weights + dense_columns) + attention


@pytest.mark.parametrize("norm", [False, True])
def test_the_flat_readout_reads_every_token_by_itself(norm: bool) -> None:
    torch.manual_seed(0)
    readout, x = FlattenReadout(5, 4, TASKS, Towers.Config(), norm=norm), torch.randn(6, 5, 4)
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() if norm else x
    torch.testing.assert_close(readout(x), readout.head(normed.reshape(6, 20)))
    assert not torch.allclose(readout(x.flip(1)), readout(x))
    assert readout.flops == 2 * TASKS * 20


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wukong", {"mixer": {"fm_tokens": 6}}, r"fm_tokens from 1 to tokens - 1 \(5\).*got 6"),
        ("wukong", {"mixer": {"name": "token_mix"}}, "mixer.name"),
        ("hiformer", {"mixer": {"heads": 3}}, "dim=8 and heads=3"),
        ("autoint", {"deep_hiden": []}, "unknown key 'deep_hiden'; did you mean 'deep_hidden'"),
        ("dhen", {"readout": "max"}, "readout.*'max'"),
    ],
)
def test_bad_settings_are_named(build: Build, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **changes)
