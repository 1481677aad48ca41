# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.errors import ConfigError, DataError
from recsys.data.spec import SequenceSpec
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.scoring import ContextSimilarity
from recsys.efficiency.selectors import TopK
from recsys.ranking.history import TargetAttention
from recsys.ranking.history.segments import segment_softmax, segment_sum

DIM = 6
SEQUENCE = SequenceSpec(name="history", keys=("seen", "stars", "age"), target="item")
CONFIGS = [
    TargetAttention.Config(unit="mlp", hidden=(7, 5)),
    TargetAttention.Config(unit="mlp", hidden=()),
    TargetAttention.Config(unit="dot", heads=1),
    TargetAttention.Config(unit="dot", heads=3),
]
LENGTHS = [3, 0, 1, 5, 0]


def build(config: TargetAttention.Config) -> TargetAttention:
    torch.manual_seed(0)
    module = TargetAttention(config, SEQUENCE, DIM).double()
    nn.init.normal_(module.empty)
    return module


def pooled(module: TargetAttention, rows: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """[B, d]: the one vector of each history."""
    (name,) = module.fields
    assert name == "history"
    return module(jagged(rows))[:, 0]


def vectors(lengths: list[int], seed: int = 0) -> dict[str, list[torch.Tensor]]:
    """For each key, the vectors [L, d] of each row."""
    generator = torch.Generator().manual_seed(seed)
    counts = dict.fromkeys(SEQUENCE.keys, lengths) | {"item": [1] * len(lengths)}
    return {key: [torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in ns] for key, ns in counts.items()}


def jagged(rows: dict[str, list[torch.Tensor]]) -> dict[str, JaggedTensor]:
    return {
        key: JaggedTensor(values=torch.cat(values), lengths=torch.tensor([len(v) for v in values], dtype=torch.int32))
        for key, values in rows.items()
    }


def brute_force(module: TargetAttention, rows: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """One row and one event at a time."""
    out = []
    for seen, stars, age, item in zip(rows["seen"], rows["stars"], rows["age"], rows["item"], strict=True):
        target = item[0]
        events = [s + module.extras[0](a) + module.extras[1](b) for s, a, b in zip(seen, stars, age, strict=True)]
        if not events:
            out.append(module.empty)
        elif hasattr(module.unit, "weigh"):
            weights = [module.unit.weigh(torch.cat([e, target, e - target, e * target])) for e in events]
            out.append(sum(w * e for w, e in zip(weights, events, strict=True)))
        else:
            heads, d = module.unit.heads, DIM // module.unit.heads
            pooled = []
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                query = module.unit.query(target)[part]
                scores = torch.stack([query @ module.unit.key(e)[part] for e in events]) / math.sqrt(d)
                pooled.append(sum(w * module.unit.value(e)[part] for w, e in zip(scores.softmax(0), events, strict=True)))
            out.append(module.unit.out(torch.cat(pooled)))
    return torch.stack(out)


@pytest.mark.parametrize("config", CONFIGS)
def test_pooling_equals_brute_force(config: TargetAttention.Config) -> None:
    module, rows = build(config), vectors(LENGTHS)
    torch.testing.assert_close(pooled(module, rows), brute_force(module, rows))


def test_dot_attention_equals_torchs_own() -> None:
    module, rows = build(TargetAttention.Config(unit="dot", heads=3)), vectors([4, 4])
    unit = module.unit
    reference = nn.MultiheadAttention(DIM, 3, bias=False, batch_first=True).double()
    reference.in_proj_weight.data = torch.cat([unit.query.weight, unit.key.weight, unit.value.weight]).detach()
    reference.out_proj.weight.data = unit.out.weight.detach()
    events = module.events(jagged(rows)).vectors.reshape(2, 4, DIM)
    expected, _ = reference(torch.stack(rows["item"]), events, events)
    torch.testing.assert_close(pooled(module, rows), expected[:, 0])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0]])
def test_empty_histories_give_the_learned_vector_without_nan(config: TargetAttention.Config, lengths: list[int]) -> None:
    module = build(config)
    out = pooled(module, vectors(lengths))
    assert torch.equal(out, module.empty.expand(len(lengths), DIM))
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert torch.equal(module.empty.grad, torch.full((DIM,), float(len(lengths)), dtype=torch.float64))


def test_the_vector_of_an_empty_history_starts_at_zero() -> None:
    assert TargetAttention(CONFIGS[0], SEQUENCE, DIM).empty.abs().max() == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_do_not_see_their_batch_mates(config: TargetAttention.Config) -> None:
    module, rows = build(config), vectors(LENGTHS)
    together = pooled(module, rows)
    for b in range(len(LENGTHS)):
        alone = pooled(module, {key: [values[b]] for key, values in rows.items()})
        torch.testing.assert_close(alone[0], together[b])


@pytest.mark.parametrize("config", CONFIGS)
def test_events_form_a_set(config: TargetAttention.Config) -> None:
    module, rows = build(config), vectors(LENGTHS)
    reversed_rows = {key: [v.flip(0) for v in values] for key, values in rows.items()}
    torch.testing.assert_close(pooled(module, reversed_rows), pooled(module, rows))


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_agree_with_finite_differences(config: TargetAttention.Config) -> None:
    module, lengths = build(config), [2, 0, 1]
    keys = (*SEQUENCE.keys, "item")
    inputs = [torch.cat(values).requires_grad_() for values in vectors(lengths).values()]
    counts = [torch.tensor(lengths)] * 3 + [torch.ones(3, dtype=torch.int64)]

    def call(*values: torch.Tensor) -> torch.Tensor:
        return module({key: JaggedTensor(values=v, lengths=n) for key, v, n in zip(keys, values, counts, strict=True)})

    assert torch.autograd.gradcheck(call, inputs)


def test_huge_scores_do_not_overflow() -> None:
    module, rows = build(TargetAttention.Config(unit="dot")), vectors(LENGTHS)
    rows["item"] = [1e6 * v for v in rows["item"]]
    out = pooled(module, rows)
    assert out.isfinite().all()
    torch.testing.assert_close(out, brute_force(module, rows))


def test_segments() -> None:
    row, values = torch.tensor([0, 0, 2, 2, 2]), torch.randn(5, 2)
    assert segment_sum(values, row, 4)[[1, 3]].abs().max() == 0
    expected = torch.cat([values[:2].softmax(0), values[2:].softmax(0)])
    torch.testing.assert_close(segment_softmax(values, row, 4), expected)


def test_heads_that_do_not_divide_dim_are_named() -> None:
    with pytest.raises(ConfigError, match="dim=6 and heads=4"):
        TargetAttention(TargetAttention.Config(unit="dot", heads=4), SEQUENCE, DIM)


def test_misaligned_keys_are_named() -> None:
    module, rows = build(CONFIGS[0]), vectors(LENGTHS)
    with pytest.raises(DataError, match=r"history: expected as many values of 'age' as of 'seen' \(9\), got 8"):
        module(jagged(rows | {"age": [rows["age"][0][:2], *rows["age"][1:]]}))
    with pytest.raises(DataError, match="history: expected one 'item' for each of 5 rows, got 4"):
        module(jagged(rows | {"item": rows["item"][:4]}))


PRUNING = HistoryPruning.Config(events=2, recent=1, scorer=ContextSimilarity.Config(), selector=TopK.Config())


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pruned_history_is_read_as_if_nothing_else_had_happened(config: TargetAttention.Config) -> None:
    """Kept are the last event and the one most like the candidate; the gradient reaches no other."""
    whole, pruned = build(config), build(config.model_copy(update={"pruning": PRUNING}))
    assert set(whole.state_dict()) == set(pruned.state_dict())
    rows = vectors([4, 0, 1, 5])
    rows["seen"] = [values.requires_grad_() for values in rows["seen"]]
    left: dict[str, list[torch.Tensor]] = {key: [] for key in rows}
    for b, target in enumerate(rows["item"]):
        events = rows["seen"][b] + pruned.extras[0](rows["stars"][b]) + pruned.extras[1](rows["age"][b])
        cosines = nn.functional.cosine_similarity(events[:-1], target, dim=1)
        kept = sorted({*([int(cosines.argmax())] if len(cosines) else []), *([len(events) - 1] if len(events) else [])})
        for key in SEQUENCE.keys:
            left[key].append(rows[key][b][kept])
        left["item"].append(target)
    found = pooled(pruned, rows)
    torch.testing.assert_close(found, pooled(whole, left))
    found.sum().backward()
    touched = [int((values.grad.abs().sum(1) > 0).sum()) for values in rows["seen"] if values.grad is not None and len(values)]
    assert touched == [2, 1, 2]
