# SPDX-License-Identifier: Apache-2.0
import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.ranking.tokenizers import AutoSplitTokenizer, Fields, PermutedTokenizer, Tokenizer
from recsys.ranking.tokenizers.permuted import shuffled
from tests.recsys.ranking.field_vectors import flat

WIDTHS = {"user": 3, "age": 1, "item": 3, "history": 3, "price": 1}  # F = 11
DIM = 4
CONFIGS = [
    AutoSplitTokenizer.Config(tokens=1),
    AutoSplitTokenizer.Config(tokens=3),
    AutoSplitTokenizer.Config(tokens=11),
    PermutedTokenizer.Config(tokens=3),
    PermutedTokenizer.Config(tokens=5, global_token=False),
    PermutedTokenizer.Config(tokens=6, hidden=5),
]


def build(config: Any, widths: dict[str, int] = WIDTHS) -> Tokenizer:
    torch.manual_seed(0)
    return components.build("tokenizer", config, Fields(widths), DIM)


def fields(rows: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, width, dtype=dtype) for name, width in WIDTHS.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_what_holds_of_every_tokenizer(config: Any) -> None:
    tokenizer, x = build(config), fields()
    tokens = tokenizer(flat(x))
    assert tokens.shape == (5, tokenizer.tokens, DIM) and tokenizer.tokens == config.tokens
    assert tokens.transpose(0, 1).is_contiguous()
    torch.testing.assert_close(tokenizer(flat(x)[2:4]), tokens[2:4])
    torch.testing.assert_close(torch.compile(tokenizer, backend="aot_eager", fullgraph=True)(flat(x)), tokens)
    half = copy.deepcopy(tokenizer).bfloat16()(flat(x).bfloat16())
    torch.testing.assert_close(half.float(), tokens, rtol=0.05, atol=0.05)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tokenizer.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_flops_are_those_that_torch_counts(config: Any) -> None:
    tokenizer = build(config)
    with FlopCounterMode(display=False) as counter:
        tokenizer(flat(fields(7)))
    assert counter.get_total_flops() == 7 * tokenizer.flops


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 11])
def test_auto_split_equals_a_loop_over_the_numbers_of_all_fields(tokens: int) -> None:
    tokenizer, x = build(AutoSplitTokenizer.Config(tokens=tokens)).double(), fields(dtype=torch.float64)
    width = math.ceil(11 / tokens)
    for b in range(5):
        numbers = [float(v) for name in WIDTHS for v in x[name][b]] + [0.0] * (tokens * width - 11)
        for t in range(tokens):
            expected = tokenizer.bias[t, 0].clone()
            for i in range(width):
                expected = expected + numbers[t * width + i] * tokenizer.weight[t, i]
            torch.testing.assert_close(tokenizer(flat(x))[b, t], expected)


def test_idle_weights_are_those_that_change_nothing() -> None:
    tokenizer, x = build(AutoSplitTokenizer.Config(tokens=3)), fields()  # 3 chunks of 4 for 11 numbers
    tokenizer(flat(x)).square().sum().backward()
    assert tokenizer.idle == int((tokenizer.weight.grad == 0).sum()) == DIM
    assert build(AutoSplitTokenizer.Config(tokens=11)).idle == 0


def test_auto_split_starts_as_linear_layers_of_its_width_do() -> None:
    torch.manual_seed(0)
    tokenizer = AutoSplitTokenizer(AutoSplitTokenizer.Config(tokens=8), Fields({"x": 8 * 64}), 128)
    reference = nn.Linear(64, 128)
    assert tokenizer.weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.05)
    assert tokenizer.weight.abs().max() <= 1 / 8
    assert tokenizer.bias.abs().max() <= 1 / 8


@pytest.mark.parametrize(("tokens", "fitting"), [(5, 4), (7, 6), (10, 6), (12, 11), (40, 11)])
def test_a_chunk_of_filling_alone_is_an_error_that_names_another_count(tokens: int, fitting: int) -> None:
    with pytest.raises(ConfigError, match=rf"tokens: {tokens} chunks of .*such as {fitting}$"):
        build(AutoSplitTokenizer.Config(tokens=tokens))
    build(AutoSplitTokenizer.Config(tokens=fitting))


def test_permuted_tokens_are_affine_maps_of_contiguous_groups_of_the_shuffled_fields() -> None:
    tokenizer, x = build(PermutedTokenizer.Config(tokens=3, global_token=False)), fields()
    order = shuffled(WIDTHS, 0)
    groups = [order[:2], order[2:4], order[4:]]
    for t, group in enumerate(groups):
        (layer,) = tokenizer.inner.projections[t]
        torch.testing.assert_close(tokenizer(flat(x))[:, t], torch.cat([x[f] for f in group], 1) @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 6])
def test_every_field_is_in_one_group_and_the_global_token_reads_all(tokens: int) -> None:
    tokenizer, x = build(PermutedTokenizer.Config(tokens=tokens, seed=3)), fields()
    read_by = torch.zeros(tokens)
    for name in WIDTHS:
        changed = (tokenizer(flat(x | {name: x[name] + 1})) != tokenizer(flat(x))).any(dim=2).all(dim=0)
        assert changed[0] and changed[1:].sum() == 1
        read_by += changed
    assert read_by[1:].min() >= 1 and read_by[1:].max() - read_by[1:].min() <= 1


def test_the_permutation_depends_on_the_seed_and_on_nothing_else() -> None:
    names = [f"f{i}" for i in range(20)]
    assert shuffled(names, 1) == shuffled(reversed(names), 1)
    assert sorted(shuffled(names, 1)) == sorted(names)
    assert len({tuple(shuffled(names, seed)) for seed in range(10)} | {tuple(names)}) == 11
    with_new = shuffled([*names, "new"], 1)
    with_new.remove("new")
    assert with_new == shuffled(names, 1)
    x = fields()
    other = dict(reversed(WIDTHS.items()))
    turned = flat({name: x[name] for name in other})
    torch.testing.assert_close(build(PermutedTokenizer.Config(tokens=3), other)(turned), build(PermutedTokenizer.Config(tokens=3))(flat(x)))


def test_every_order_of_three_fields_is_drawn_about_equally_often() -> None:
    counts: dict[tuple[str, ...], int] = {}
    for seed in range(3000):
        order = tuple(shuffled(("a", "b", "c"), seed))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and min(counts.values()) > 400


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PermutedTokenizer.Config(tokens=1), "tokens: expected 2 to 6 for 5 fields and a global token, got 1"),
        (PermutedTokenizer.Config(tokens=7), "tokens: expected 2 to 6 for 5 fields and a global token, got 7"),
        (PermutedTokenizer.Config(tokens=6, global_token=False), "tokens: expected 1 to 5 for 5 fields, got 6"),
    ],
)
def test_permuted_counts_that_cannot_be_are_named(config: PermutedTokenizer.Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config)
