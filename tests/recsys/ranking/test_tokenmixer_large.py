# SPDX-License-Identifier: Apache-2.0
"""The whole model, from impressions to logits, and what every ranker promises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError, DataError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec
from recsys.embedding.tables import Embedded, dense_parameters
from recsys.ranking.flops import mix_revert_parameters
from recsys.ranking.losses import masked_bce
from recsys.ranking.models import TokenMixerLarge
from recsys.ranking.part import split_fields
from recsys.ranking.stacks import Residual
from recsys.ranking.tokenizers import GroupTokenizer

Build = Callable[..., TokenMixerLarge]
LENGTHS = [3, 0, 6, 1, 2]


@pytest.fixture
def build(spec: InputSpec, groups: dict[str, tuple[str, ...]]) -> Build:
    def make(seed: int = 0, **changes: Any) -> TokenMixerLarge:
        tokenizer = {"name": "groups", "groups": groups}
        settings: dict[str, Any] = {"tokenizer": tokenizer, "dim": 16, "blocks": 3, "embedding": {"dim": 8}} | changes
        torch.manual_seed(seed)
        return TokenMixerLarge(parse(TokenMixerLarge.Config, settings, source="test"), spec)

    return make


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> RankingBatch:
    return make_batch(make_rows(LENGTHS))


def gradients(model: torch.nn.Module) -> dict[str, bool]:
    """Whether each dense parameter has a gradient that is not zero."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p.grad is not None and bool(p.grad.abs().max() > 0) for p in dense_parameters(model)}


def test_it_is_registered_and_built_from_plain_data(spec: InputSpec, groups: Any, batch: RankingBatch) -> None:
    cls = components.get("ranker", "tokenmixer_large")
    assert cls is TokenMixerLarge
    plain = {"name": "tokenmixer_large", "tokenizer": {"groups": {k: list(v) for k, v in groups.items()}}, "dim": 8}
    config = parse(cls.Config, plain, source="test")
    assert parse(cls.Config, config.model_dump(mode="json"), source="again") == config
    assert list(config.tokenizer.groups) == list(groups)
    assert cls(config, spec)(batch).shape == (5, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stack": {"name": "mix_revert", "residual": "stream"}, "mixer": {"heads": 2}},
        {"mixer": {"heads": 8}, "blocks": 1},
        {"stack": {"inter_residual": None}, "auxiliary": None},
        {"auxiliary": "residual", "head": {"name": "towers", "hidden": (7, 3)}, "dropout": 0.1},
        {"history": {"name": "target_attention", "unit": "dot", "heads": 2}, "per_token": {"name": "swiglu", "expansion": 8 / 3}},
    ],
)
def test_every_dense_parameter_learns(build: Build, batch: RankingBatch, changes: dict[str, Any]) -> None:
    model = build(**changes)
    logits = model(batch)
    assert logits.shape == (5, 2)
    assert logits.isfinite().all()
    loss, parts = model.loss(batch)
    loss.backward()
    assert loss.dim() == 0
    assert not any(part.requires_grad for part in parts.values())
    assert [name for name, learns in gradients(model).items() if not learns] == []


def test_rows_do_not_see_their_batch_mates(build: Build, make_rows: Any, make_batch: Any) -> None:
    model, rows = build().eval(), make_rows(LENGTHS)
    together = model(make_batch(rows))
    for b, row in enumerate(rows):
        torch.testing.assert_close(model(make_batch([row]))[0], together[b])
    order = [4, 2, 0, 1, 3]
    torch.testing.assert_close(model(make_batch([rows[b] for b in order])), together[order])


def test_every_input_matters(build: Build, make_rows: Any, make_batch: Any) -> None:
    model, rows = build().eval(), make_rows([3])
    before = model(make_batch(rows))
    changes = {"user": [1], "genres": [1, 2, 3], "item": [1], "seen": [1, 2, 3], "seen_stars": [1, 2, 3], "dense": [1.0, 2.0]}
    for key, value in changes.items():
        assert rows[0][key] != value
        assert not torch.equal(model(make_batch([rows[0] | {key: value}])), before), key


def test_fields_are_those_of_the_spec(build: Build, spec: InputSpec, batch: RankingBatch) -> None:
    model = build()
    embedded = model.embed(batch)
    fields = split_fields(model.fields(embedded, batch), model.widths)
    assert fields.keys() == set(spec.fields) == model.widths.keys()
    assert {name: value.shape[1] for name, value in fields.items()} == model.widths
    assert torch.equal(torch.cat([fields["age"], fields["popularity"]], 1), batch.dense)
    assert torch.equal(fields["item"], embedded.sequences["item"].values())
    assert torch.equal(fields["genres"], embedded.pooled["genres"])
    assert torch.equal(fields["history"], model.histories[0](embedded.sequences)[:, 0])


def test_predict_gives_probabilities_without_gradients(build: Build, batch: RankingBatch) -> None:
    model = build().eval()
    predicted = model.predict(batch)
    assert not predicted.requires_grad
    torch.testing.assert_close(predicted, torch.sigmoid(model(batch)).detach())
    with torch.inference_mode():
        assert torch.equal(model.predict(batch), predicted)


def test_loss_without_auxiliary_is_the_bce_of_observed_labels(build: Build, batch: RankingBatch) -> None:
    model = build(auxiliary=None)
    batch.labels[1, 0] = float("nan")
    loss, parts = model.loss(batch)
    logits, observed = model(batch), ~batch.labels.isnan()
    per_task = [functional.binary_cross_entropy_with_logits(logits[observed[:, k], k], batch.labels[observed[:, k], k]) for k in range(2)]
    torch.testing.assert_close(loss, sum(per_task) / 2)
    assert parts.keys() == {"bce"}
    torch.testing.assert_close(parts["bce"], loss.detach())


@pytest.mark.parametrize("mode", ["deep_supervision", "residual"])
def test_auxiliary_loss_is_the_sum_over_lower_blocks(build: Build, batch: RankingBatch, mode: str) -> None:
    model = build(auxiliary=mode, auxiliary_weight=0.3)
    assert len(model.auxiliary) == 2
    loss, parts = model.loss(batch)
    states = model.states(model.fields(model.embed(batch), batch))
    top = model.readout(states[-1])
    base = top.detach() if mode == "residual" else 0
    expected = sum(masked_bce(base + tower(state), batch.labels) for tower, state in zip(model.auxiliary, states, strict=False))
    torch.testing.assert_close(parts["auxiliary"], expected.detach())
    torch.testing.assert_close(loss, masked_bce(top, batch.labels) + 0.3 * expected)


def test_the_residual_auxiliary_loss_does_not_pull_at_the_top(build: Build, batch: RankingBatch) -> None:
    grads = []
    for weight in (0.0, 5.0):
        model = build(auxiliary="residual", auxiliary_weight=weight)
        model.loss(batch)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in (*model.readout.parameters(), *model.stack.blocks[-1].parameters())]))
    assert torch.equal(*grads)


def test_auxiliary_towers_change_neither_the_initial_model_nor_its_logits(build: Build, batch: RankingBatch) -> None:
    without, with_towers = build(auxiliary=None).eval(), build().eval()
    assert torch.equal(without(batch), with_towers(batch))
    foreign = with_towers.state_dict().keys() - without.state_dict().keys()
    assert foreign
    assert all(name.startswith("auxiliary.") for name in foreign)
    with_towers(batch).sum().backward()
    assert all(p.grad is None for p in with_towers.auxiliary.parameters())
    assert not list(without.auxiliary.parameters())


def test_one_block_has_no_lower_block_to_supervise(build: Build, batch: RankingBatch) -> None:
    assert build(blocks=1).loss(batch)[1].keys() == {"bce"}


def test_training_on_planted_preferences_lowers_the_loss_and_resumes(build: Build, make_rows: Any, make_batch: Any) -> None:
    rows = make_rows([n % 5 for n in range(160)], seed=3)
    for row in rows:
        row["labels"] = [float(row["item"][0] in row["seen"] or row["user"][0] < 5), float(row["dense"][0] > 0)]
    batch, model = make_batch(rows), build(dim=16, blocks=2)
    optimizer = torch.optim.Adam(dense_parameters(model), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    other = build(seed=1, dim=16, blocks=2)
    assert not torch.equal(other.predict(batch), model.predict(batch))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(batch), model.predict(batch))
    assert torch.equal(other.loss(batch)[0], model.loss(batch)[0])


def test_gradients_reach_every_event_of_a_history(build: Build, batch: RankingBatch) -> None:
    model = build(history={"name": "target_attention", "unit": "dot"}).eval()
    embedded = model.embed(batch)
    seen = embedded.sequences["seen"]
    events = seen.values().detach().clone().requires_grad_()

    def score(values: torch.Tensor) -> torch.Tensor:
        sequences = embedded.sequences | {"seen": JaggedTensor(values=values, lengths=seen.lengths())}
        return model.score(Embedded(pooled=embedded.pooled, sequences=sequences), batch)

    torch.testing.assert_close(score(events), model(batch))
    row_of_event = torch.repeat_interleave(torch.tensor(LENGTHS))
    for b in range(len(LENGTHS)):
        (gradient,) = torch.autograd.grad(score(events)[b, 0], events)
        assert torch.equal(gradient.abs().sum(1) > 0, row_of_event == b)
    direction = torch.randn_like(events)
    (gradient,) = torch.autograd.grad(score(events).sum(), events)
    slope = (score(events + 1e-2 * direction) - score(events - 1e-2 * direction)).sum() / 2e-2
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=0.05, abs=1e-3)


def test_embeddings_looked_up_carry_a_gradient(build: Build, batch: RankingBatch) -> None:
    model = build().eval()
    embedded, before = model.embed(batch), model(batch)
    (gradient,) = torch.autograd.grad(model.score(embedded, batch).sum(), embedded.sequences["seen"].values())
    assert gradient.shape == (sum(LENGTHS), 8)
    assert (gradient.abs().sum(1) > 0).all()
    assert torch.equal(model(batch), before)  # the fused optimizer did not run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": {"heads": 3}}, "dim=16 and heads=3"),
        ({"dim": 10}, "dim=10 and heads=4"),
        ({"tokenizer": {"groups": {"who": ("user", "age", "item", "genres", "popularity")}}}, "field 'history' is in no group"),
        ({"tokenizer": {"groups": {"who": ("userr",)}}}, "unknown field 'userr'; did you mean 'user'"),
        ({"stack": {"inter_residual": 0}}, "inter_residual.*greater than or equal to 1"),
        ({"auxiliary": "on"}, "auxiliary.*'on'"),
        ({"block": 3}, "unknown key 'block'; did you mean 'blocks'"),
        ({"history": {"name": "target_attention", "unit": "dot", "heads": 3}}, "dim=8 and heads=3"),
    ],
)
def test_bad_settings_are_named(build: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_inputs_that_share_a_name_are_an_error(build: Build, spec: InputSpec) -> None:
    twice = spec.model_copy(update={"dense": ("age", "user")})
    with pytest.raises(ConfigError, match="the name 'user' is used twice"):
        TokenMixerLarge(build().config, twice)


def test_a_batch_that_is_not_as_declared_is_an_error(build: Build, batch: RankingBatch) -> None:
    model, labels, dense = build(), batch.labels, batch.dense
    batch.labels = None
    model(batch)
    with pytest.raises(DataError, match="labels: the loss needs a batch with labels"):
        model.loss(batch)
    batch.labels = labels
    batch.dense = dense.double()
    with pytest.raises(DataError, match=r"dense: expected float32 \[B, 2\], got torch.float64 \[5, 2\]"):
        model(batch)
    batch.dense = dense[:, :1]
    with pytest.raises(DataError, match=r"got torch.float32 \[5, 1\]"):
        model(batch)


def test_two_histories_may_share_a_candidate(spec: InputSpec, groups: Any, batch: RankingBatch) -> None:
    both = (*spec.sequences, SequenceSpec(name="recent", keys=("seen",), target="item"))
    two = spec.model_copy(update={"sequences": both})
    config = TokenMixerLarge.Config(tokenizer=GroupTokenizer.Config(groups=groups | {"now": ("recent",)}), dim=20, blocks=1)
    model = TokenMixerLarge(config, two)
    assert model(batch).shape == (5, 2)
    embedded = model.embed(batch)
    fields = split_fields(model.fields(embedded, batch), model.widths)
    assert torch.equal(fields["item"], embedded.sequences["item"].values())
    assert torch.equal(fields["recent"], model.histories[1](embedded.sequences)[:, 0])
    assert torch.equal(fields["age"], batch.dense[:, :1])


def test_a_ranker_needs_neither_histories_nor_dense_columns(spec: InputSpec) -> None:
    bare = InputSpec(tables=spec.tables[:1], tasks=spec.tasks)
    batch = RankingBatch(
        sparse=KeyedJaggedTensor(keys=["user"], values=torch.tensor([3, 4]), lengths=torch.tensor([1, 1])),
        sequences=KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64)),
        dense=torch.empty(2, 0),
    )
    config = TokenMixerLarge.Config(tokenizer=GroupTokenizer.Config(groups={"who": ("user",)}), dim=8, blocks=1)
    assert TokenMixerLarge(config, bare)(batch).shape == (2, 2)


@pytest.mark.parametrize("residual", ["input", "stream"])
def test_settings_reach_the_stack(build: Build, batch: RankingBatch, residual: Residual) -> None:
    model = build(mixer={"heads": 2}, per_token={"name": "swiglu", "expansion": 1.5}, stack={"residual": residual}, blocks=5)
    assert sum(p.numel() for p in model.stack.parameters()) == 5 * mix_revert_parameters(4, 16, 2, 1.5, residual)
    assert all(block.residual == residual for block in model.stack.blocks)


@pytest.mark.parametrize(("gap", "amplitude"), [(2, 4), (3, 2), (None, 1)])
def test_inter_layer_residuals_join_the_stack(build: Build, batch: RankingBatch, gap: int | None, amplitude: int) -> None:
    model = build(blocks=5, stack={"inter_residual": gap})
    tokens = model.tokenizer(model.fields(model.embed(batch), batch))
    for block in model.stack.blocks:
        torch.nn.init.zeros_(block.token.down)
    assert torch.equal(model.states(model.fields(model.embed(batch), batch))[-1], amplitude * tokens)
