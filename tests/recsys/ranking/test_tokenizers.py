# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from recsys.core.errors import ConfigError
from recsys.ranking.tokenizers import Fields, GroupTokenizer
from tests.recsys.ranking.field_vectors import flat

WIDTHS = {"user": 3, "age": 1, "item": 3, "history": 3}
GROUPS = {"past": ("history",), "who": ("age", "user"), "what": ("item",)}


def fields(rows: int = 5) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, width) for name, width in WIDTHS.items()}


def build(groups: dict[str, tuple[str, ...]] = GROUPS, hidden: int | None = None) -> GroupTokenizer:
    return GroupTokenizer(GroupTokenizer.Config(groups=groups, hidden=hidden), Fields(WIDTHS), dim=4)


def affine(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def test_tokens_are_affine_maps_of_their_groups_behind_a_global_token_of_the_raw_fields() -> None:
    tokenizer, x = build(), fields()
    past, who, what = x["history"], torch.cat([x["age"], x["user"]], 1), x["item"]
    inputs = [torch.cat([past, who, what], 1), past, who, what]
    expected = torch.stack([affine(v, p[0]) for v, p in zip(inputs, tokenizer.projections, strict=True)], 1)
    assert tokenizer.tokens == 4
    torch.testing.assert_close(tokenizer(flat(x)), expected)


def test_a_hidden_layer_has_silu() -> None:
    tokenizer, x = build(hidden=6), fields()
    first, _, last = tokenizer.projections[3]
    hidden = affine(x["item"], first)
    torch.testing.assert_close(tokenizer(flat(x))[:, 3], affine(hidden * torch.sigmoid(hidden), last))


def test_the_global_token_reads_raw_fields_not_projected_tokens() -> None:
    tokenizer, x = build(), fields()
    before = tokenizer(flat(x))
    with torch.no_grad():
        for projection in tokenizer.projections[1:]:
            projection[0].weight.add_(1.0)
    after = tokenizer(flat(x))
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.isclose(before[:, 1:], after[:, 1:]).all(dim=2).any()


def test_a_token_depends_on_its_own_fields_and_the_global_token_on_all() -> None:
    tokenizer, x = build(), fields()
    for name in WIDTHS:
        changed = (tokenizer(flat(x | {name: x[name] + 1})) != tokenizer(flat(x))).any(dim=2).all(dim=0)
        assert changed.tolist() == [True, name == "history", name in ("age", "user"), name == "item"]


def test_parameters_equal_the_formula() -> None:
    tokenizer = build()
    inputs = sum(WIDTHS.values())
    assert sum(p.numel() for p in tokenizer.parameters() if p.dim() == 2) == inputs * 4 + inputs * 4


def test_tokens_lie_outermost_in_memory() -> None:
    assert build()(flat(fields())).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"who": ("user", "age"), "what": ("item",)}, r"field 'history' is in no group"),
        ({"who": ("user",), "what": ("item",)}, r"field 'age' is in no group.*\(age, history\)"),
        (GROUPS | {"again": ("age",)}, r"field 'age' is in 'who' and again in 'again'"),
        ({"who": ("user", "user")}, r"field 'user' is in 'who' and again in 'who'"),
        (GROUPS | {"more": ("itm",)}, r"'more': unknown field 'itm'; did you mean 'item'\?"),
        (GROUPS | {"none": ()}, r"'none' holds no field"),
        ({}, r"field 'user' is in no group"),
    ],
)
def test_groups_that_are_not_a_partition_are_an_error(groups: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(groups)


def test_the_groups_of_the_inputs_are_taken_where_the_tokenizer_names_none() -> None:
    torch.manual_seed(0)
    named = build()
    torch.manual_seed(0)
    tokenizer, x = GroupTokenizer(GroupTokenizer.Config(), Fields(WIDTHS, GROUPS), dim=4), flat(fields())
    assert tokenizer.groups == tuple(GROUPS.values()) and torch.equal(tokenizer(x), named(x))
    own = {"all": tuple(WIDTHS)}
    assert GroupTokenizer(GroupTokenizer.Config(groups=own), Fields(WIDTHS, GROUPS), dim=4).groups == (tuple(WIDTHS),)


def test_groups_that_nobody_names_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"the inputs have none; name them in encoder\.groups, for every model, or in the tokenizer"):
        GroupTokenizer(GroupTokenizer.Config(), Fields(WIDTHS), dim=4)
