# SPDX-License-Identifier: Apache-2.0
"""UniMixer and UniMixing-Lite as whole models, from impressions to logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import dense_parameters
from recsys.ranking.mixers import UniMixing, UniMixingLite, fold_mixing, mix
from recsys.ranking.mixers.uni_mixing import BlockMixing
from recsys.ranking.stacks import Siamese
from recsys.ranking.token_ranker import TokenRanker

Build = Callable[..., Any]
LENGTHS = [3, 0, 6, 1, 2]
NAMES = {"unimixer": UniMixing, "unimixing_lite": UniMixingLite}
TOKENS, DIM = 6, 12  # the fields of the fixture, one token each


@pytest.fixture
def build(spec: InputSpec) -> Build:
    def make(name: str = "unimixer", seed: int = 0, **changes: Any) -> TokenRanker:
        cls = components.get("ranker", name)
        settings: dict[str, Any] = {"dim": DIM, "embedding": {"dim": 8}} | changes
        torch.manual_seed(seed)
        model: TokenRanker = cls(parse(cls.Config, settings, source="test"), spec)
        return model

    return make


@pytest.fixture
def batch(make_rows: Any, make_batch: Any) -> RankingBatch:
    return make_batch(make_rows(LENGTHS))


def mixers(model: TokenRanker) -> list[BlockMixing]:
    return [module for module in model.modules() if isinstance(module, BlockMixing)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_registered_and_built_from_plain_data(spec: InputSpec, batch: RankingBatch, name: str) -> None:
    cls = components.get("ranker", name)
    config = parse(cls.Config, {"name": name, "dim": DIM}, source="test")
    assert parse(cls.Config, config.model_dump(mode="json"), source="again") == config
    model = cls(config, spec)
    assert model(batch).shape == (5, 2)
    assert isinstance(model.stack, Siamese)
    assert {type(mixer) for mixer in mixers(model)} == {NAMES[name]}
    assert (model.tokenizer.tokens, len(mixers(model))) == (TOKENS, 2)


CHANGES: list[dict[str, Any]] = [
    {},
    {"mixer": {"block": 8, "temperature": {"start": 0.05}}, "blocks": 3},
    {"mixer": {"constrained": False, "init_std": 0.3}, "auxiliary": "residual"},
    {"mixer": {"scaling": "damped"}, "tokenizer": {"name": "auto_split", "tokens": 4}},
    {"per_token": {"name": "ffn"}, "mixer": {"symmetric": False}},
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", CHANGES)
def test_every_dense_parameter_learns(build: Build, batch: RankingBatch, name: str, changes: dict[str, Any]) -> None:
    model = build(name, **changes)
    loss, _ = model.loss(batch)
    loss.backward()
    names = {id(p): key for key, p in model.named_parameters()}
    assert [names[id(p)] for p in dense_parameters(model) if p.grad is None or p.grad.abs().max() == 0] == []
    assert all(p.grad.isfinite().all() for p in dense_parameters(model))


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_see_their_batch_mates(build: Build, make_rows: Any, make_batch: Any, name: str) -> None:
    model, rows = build(name).eval(), make_rows(LENGTHS)
    together = model(make_batch(rows))
    for b, row in enumerate(rows):
        torch.testing.assert_close(model(make_batch([row]))[0], together[b])


def test_parameters_of_a_stack_equal_the_formulas(build: Build) -> None:
    length, block, bases, rank, expansion = TOKENS * DIM, 6, 3, 2, 2
    n = length // block
    common = 3 * expansion * TOKENS * DIM**2 + DIM  # SwiGLU and the block's norm
    norms = (2 * 2 + 1) * DIM  # of the streams
    for name, mixer, count in (
        ("unimixer", {"block": block}, n**2 + n * block**2),
        ("unimixing_lite", {"block": block, "bases": bases, "rank": rank}, bases * block**2 + n * bases + 2 * n * rank),
    ):
        stack = build(name, mixer=mixer).stack
        assert sum(p.numel() for p in stack.parameters()) == 2 * (count + common) + norms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{}, {"mixer": {"block": 8}, "tokenizer": {"name": "auto_split", "tokens": 4}}])
def test_flops_are_what_torch_counts_for_one_more_row(
    build: Build, make_rows: Any, make_batch: Any, name: str, changes: dict[str, Any]
) -> None:
    model, counts = build(name, **changes).eval(), []
    for lengths in (LENGTHS[:2], LENGTHS):
        few = make_batch(make_rows(lengths))
        fields = model.fields(model.embed(few), few)
        with FlopCounterMode(display=False) as counter:
            model.interact(fields)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 3 * model.costs().flops
    fold_mixing(model)
    with FlopCounterMode(display=False) as counter:
        model.interact(fields)
    assert counter.get_total_flops() == 5 * model.costs().flops


def test_with_permutation_gain_the_model_starts_with_the_rule_based_mixing(build: Build) -> None:
    model = build(mixer={"permutation_gain": 30.0})
    x = torch.randn(3, TOKENS, DIM)
    for mixer in mixers(model):
        torch.testing.assert_close(mixer(x), mix(x, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_anneals_and_resumes(build: Build, make_rows: Any, make_batch: Any, name: str) -> None:
    rows = make_rows([n % 5 for n in range(160)], seed=3)
    for row in rows:
        row["labels"] = [float(row["item"][0] in row["seen"] or row["user"][0] < 5), float(row["dense"][0] > 0)]
    batch, settings = make_batch(rows), {"mixer": {"temperature": {"anneal_steps": 40}}}
    model = build(name, **settings)
    optimizer, losses = torch.optim.Adam(dense_parameters(model), lr=1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert [mixer.temperature().item() for mixer in mixers(model)] == pytest.approx([1 - 0.95 * 30 / 40] * 2)

    other = build(name, seed=1, **settings)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(batch), model.predict(batch))
    assert torch.equal(other.loss(batch)[0], model.loss(batch)[0])
    model.eval()
    at_rest = [mixer.temperature.position.item() for mixer in mixers(model)]
    model.predict(batch)
    assert [mixer.temperature.position.item() for mixer in mixers(model)] == at_rest


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_in_two_stages_is_two_configurations(build: Build, batch: RankingBatch, name: str) -> None:
    def stage(temperature: float) -> TokenRanker:
        model: TokenRanker = build(name, mixer={"temperature": {"start": temperature, "end": temperature}})
        return model

    hot, cold = stage(1.0), stage(0.05)
    for _ in range(3):
        hot.loss(batch)[0].backward()
    cold.load_state_dict(hot.state_dict())
    for a, b in zip(mixers(hot), mixers(cold), strict=True):
        assert (a.temperature().item(), b.temperature().item()) == (1.0, 0.05)
        assert all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights(), strict=True))
        assert b.matrices()[0].std() > 5 * a.matrices()[0].std()  # the same logits, sharper


@pytest.mark.parametrize("name", NAMES)
def test_folded_for_serving_it_predicts_the_same(build: Build, batch: RankingBatch, name: str) -> None:
    model = build(name).eval()
    expected = model.predict(batch)
    fold_mixing(model)
    assert mixers(model) == []
    assert torch.equal(model.predict(batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_graph_breaks_it_equals_eager(build: Build, batch: RankingBatch, name: str) -> None:
    model = build(name, mixer={"iterations": 2}, blocks=1).eval()
    fields = model.fields(model.embed(batch), batch)
    compiled = torch.compile(model.interact, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(fields), model.interact(fields))


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings_are_named(build: Build, name: str) -> None:
    with pytest.raises(ConfigError, match=r"block: expected a divisor of tokens \* dim = 6 \* 12 = 72, got 7"):
        build(name, mixer={"block": 7})
    with pytest.raises(ConfigError, match="mixer"):
        build(name, mixer={"name": "token_mix"})
