# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.errors import ConfigError
from recsys.data.spec import SequenceSpec
from recsys.ranking.history import HSTU, Events, TargetAttention
from recsys.ranking.mixers import Identity
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import GroupTokenizer

DIM = 6
SEQUENCE = SequenceSpec(name="history", keys=("seen", "stars"), target="item")
LENGTHS = [3, 0, 1, 7, 0, 5]
DOT = TargetAttention.Config(unit="dot", heads=2)
CONFIGS = [
    {"vectors": 1, "heads": 1, "max_length": 8},
    {"vectors": 3, "heads": 2, "max_length": 20},
    {"vectors": 2, "heads": 3, "max_length": 5, "candidate": False},  # shorter than the longest histories
    {"vectors": 2, "heads": 3, "max_length": 5, "attention": TargetAttention.Config(hidden=(4,))},
    {"vectors": 0, "heads": 2, "max_length": 8, "candidate": False, "attention": DOT},
    {"vectors": 1, "heads": 1, "max_length": 4, "layers": 1, "attention": DOT},
]


def build(config: dict[str, Any]) -> HSTU:
    torch.manual_seed(0)
    module = HSTU(HSTU.Config(**config), SEQUENCE, DIM).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def events(lengths: list[int], seed: int = 0) -> Events:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), DIM, generator=generator, dtype=torch.float64)
    target = torch.randn(len(lengths), DIM, generator=generator, dtype=torch.float64)
    counts = torch.tensor(lengths, dtype=torch.int64)
    return Events(vectors, torch.repeat_interleave(counts), counts, target)


def row(whole: Events, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return whole.vectors[whole.row == b], whole.target[b]


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * layer.weight + layer.bias


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def layer_by_loop(layer: nn.Module, x: list[torch.Tensor], heads: int, max_length: int) -> list[torch.Tensor]:
    """One event, one head and one earlier event at a time."""
    if not x:
        return []
    width = DIM // heads
    u, v, q, k = zip(*(silu(layer.project.weight @ norm(e, layer.norm_in) + layer.project.bias).split(DIM) for e in x), strict=True)
    out = []
    for i in range(len(x)):
        pooled = torch.zeros(DIM, dtype=torch.float64)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for j in range(i + 1):
                score = q[i][part] @ k[j][part] / math.sqrt(width) + layer.distance[i - j]
                pooled[part] = pooled[part] + silu(score) / max_length * v[j][part]
        out.append(x[i] + layer.out.weight @ (norm(pooled, layer.norm_out) * u[i]))
    return out


def row_by_loop(module: HSTU, history: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    config = module.config
    kept = list(history[len(history) - min(len(history), config.max_length - config.candidate) :])
    x = [*kept, target] if config.candidate else kept
    for layer in module.layers:
        x = layer_by_loop(layer, x, config.heads, config.max_length)
    read = [x[-i] if i <= len(x) else module.empty for i in range(config.vectors, 0, -1)]
    if module.attention is not None:
        encoded = x[: len(kept)]
        one = Events(
            torch.stack(encoded) if encoded else history[:0],
            torch.zeros(len(kept), dtype=torch.int64),
            torch.tensor([len(kept)]),
            target[None],
        )
        read.append(module.attention.encode(one)[0, 0])
    return torch.stack(read)


@pytest.mark.parametrize("config", CONFIGS)
def test_it_equals_a_loop_over_rows_heads_and_events(config: dict[str, Any]) -> None:
    module, whole = build(config), events(LENGTHS)
    expected = torch.stack([row_by_loop(module, *row(whole, b)) for b in range(len(LENGTHS))])
    torch.testing.assert_close(module.encode(whole), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_do_not_see_their_batch_mates(config: dict[str, Any]) -> None:
    module, whole = build(config), events(LENGTHS)
    together = module.encode(whole)
    for b, length in enumerate(LENGTHS):
        history, target = row(whole, b)
        alone = Events(history, torch.zeros(length, dtype=torch.int64), torch.tensor([length]), target[None])
        torch.testing.assert_close(module.encode(alone)[0], together[b])


@pytest.mark.parametrize("candidate", [False, True])
def test_an_event_sees_itself_and_the_past_and_the_candidate_sees_all(candidate: bool) -> None:
    length, places = 4, 4 + candidate
    module, whole = build({"vectors": places, "heads": 2, "candidate": candidate, "layers": 2}), events([length])
    inputs = torch.cat([whole.vectors, whole.target])[:places]

    def encode(x: torch.Tensor) -> torch.Tensor:
        return module.encode(Events(x[:length], whole.row, whole.lengths, x[length:] if candidate else whole.target))[0]

    sees = torch.autograd.functional.jacobian(encode, inputs).abs().amax(dim=(1, 3)) > 0
    assert torch.equal(sees, torch.ones(places, places).tril().bool())


def test_the_order_of_events_matters_through_distances_alone() -> None:
    module, whole = build({"vectors": 1, "layers": 1}), events([5])
    flipped = Events(whole.vectors.flip(0), whole.row, whole.lengths, whole.target)
    assert not torch.allclose(module.encode(flipped), module.encode(whole))
    nn.init.zeros_(module.layers[0].distance)
    torch.testing.assert_close(module.encode(flipped), module.encode(whole))


def test_events_before_the_window_do_not_count() -> None:
    module, whole = build({"vectors": 2, "max_length": 4, "attention": DOT}), events([7, 2])
    changed = whole.vectors.clone()
    changed[:4] += 1  # the window holds the candidate and the last 3 of 7
    assert torch.equal(module.encode(Events(changed, whole.row, whole.lengths, whole.target)), module.encode(whole))
    changed[4] += 1
    assert not torch.allclose(module.encode(Events(changed, whole.row, whole.lengths, whole.target))[0], module.encode(whole)[0])


@pytest.mark.parametrize("lengths", [[0, 0], [0]])
def test_empty_histories_give_the_learned_vector(lengths: list[int]) -> None:
    whole = events(lengths)
    without = build({"vectors": 3, "candidate": False})
    assert torch.equal(without.encode(whole), without.empty.expand(len(lengths), 3, DIM))
    module = build({"vectors": 3, "attention": DOT})
    out = module.encode(whole)
    assert torch.equal(out[:, :2], module.empty.expand(len(lengths), 2, DIM))
    assert torch.equal(out[:, 3], module.attention.empty.expand(len(lengths), DIM))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_a_batch_without_rows_has_no_vectors() -> None:
    assert build({"vectors": 2}).encode(events([])).shape == (0, 2, DIM)


def test_the_learned_vector_starts_at_zero() -> None:
    assert HSTU(HSTU.Config(vectors=2), SEQUENCE, DIM).empty.abs().max() == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_agree_with_finite_differences_and_reach_every_parameter(config: dict[str, Any]) -> None:
    module, whole = build(config), events([2, 0, 6])

    def encode(vectors: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return module.encode(Events(vectors, whole.row, whole.lengths, target))

    inputs = (whole.vectors.requires_grad_(), whole.target.requires_grad_())
    assert torch.autograd.gradcheck(encode, inputs)
    encode(*inputs).square().sum().backward()
    without_use = {f"extras.{i}.weight" for i in range(len(module.extras))}  # `encode` begins behind them
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in module.named_parameters() if name not in without_use)


def test_a_captured_graph_equals_eager_for_other_lengths() -> None:
    module = build(CONFIGS[3] | {"layers": 1})

    def encode(vectors: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        of_event = torch.repeat_interleave(lengths, output_size=vectors.shape[0])
        return module.encode(Events(vectors, of_event, lengths, target))

    compiled = torch.compile(encode, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 0, 1], [0, 4, 0]):
        whole = events(lengths)
        torch.testing.assert_close(compiled(whole.vectors, whole.lengths, whole.target), module.encode(whole))


def test_it_exports_and_runs_in_half_precision() -> None:
    module, whole = build(CONFIGS[3]), events([3, 0, 7])

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, vectors: torch.Tensor, row: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.inner.encode(Events(vectors, row, lengths, target))

    inputs = (whole.vectors, whole.row, whole.lengths, whole.target)
    torch.testing.assert_close(torch.export.export(Wrapped(), inputs).module()(*inputs), module.encode(whole))
    exact = module.encode(whole)
    half = module.bfloat16().encode(Events(whole.vectors.bfloat16(), whole.row, whole.lengths, whole.target.bfloat16()))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0.1)


def test_the_fields_are_as_many_as_the_vectors_and_take_the_extras_in() -> None:
    module, whole = build({"vectors": 2, "attention": DOT}), events([2, 1])
    assert module.fields == ("history.0", "history.1", "history.2")
    assert build({"vectors": 1}).fields == ("history",)
    stars = torch.randn(3, DIM, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.int64)
    jagged = {
        "seen": JaggedTensor(values=whole.vectors, lengths=whole.lengths),
        "stars": JaggedTensor(values=stars, lengths=whole.lengths),
        "item": JaggedTensor(values=whole.target, lengths=ones),
    }
    with_extras = Events(whole.vectors + stars @ module.extras[0].weight.T, whole.row, whole.lengths, whole.target)
    torch.testing.assert_close(module(jagged), module.encode(with_extras))


def test_dropout_acts_in_training_alone() -> None:
    module, whole = build({"dropout": 0.5}), events([4, 3])
    assert torch.equal(module.encode(whole), module.encode(whole))
    module.train()
    assert not torch.equal(module.encode(whole), module.encode(whole))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"history: .*dim=6 and heads=4"):
        HSTU(HSTU.Config(heads=4), SEQUENCE, DIM)
    with pytest.raises(ConfigError, match="vectors=0 and no attention"):
        HSTU(HSTU.Config(vectors=0), SEQUENCE, DIM)


def test_in_a_ranker_each_vector_is_a_field_and_a_token(spec: Any, make_rows: Any, make_batch: Any) -> None:
    history = HSTU.Config(vectors=2, max_length=4, attention=DOT)
    model = TokenRanker(TokenRanker.Config(dim=8, history=history, mixer=Identity.Config()), spec)
    assert [name for name in model.widths if name.startswith("history")] == ["history.0", "history.1", "history.2"]
    assert model.tokenizer.tokens == len(model.widths) == 8
    grouped = TokenRanker(TokenRanker.Config(dim=8, history=history, mixer=Identity.Config(), tokenizer=GroupTokenizer.Config()), spec)
    assert grouped.tokenizer.groups[2] == ("history.0", "history.1", "history.2")  # they stand where the inputs have the history
    rows = make_rows([3, 0, 6])
    batch = make_batch(rows)
    model.loss(batch)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.histories.parameters())
    model.eval()
    torch.testing.assert_close(model(make_batch(rows[2:])), model(make_batch(rows))[2:])
