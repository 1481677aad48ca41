# SPDX-License-Identifier: Apache-2.0
"""What holds of every registered token scorer, selector, sparse attention and stop test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config, Problem, parse, validate
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention import SparseAttention
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import Selector
from recsys.efficiency.view import TokenView, offsets_of

SCORERS, SELECTORS = components.names("token_scorer"), components.names("selector")
ATTENTIONS, STOP_TESTS = components.names("sparse_attention"), components.names("stop_test")
EVERYTHING = [
    *(("token_scorer", name) for name in SCORERS),
    *(("selector", name) for name in SELECTORS),
    *(("sparse_attention", name) for name in ATTENTIONS),
    *(("stop_test", name) for name in STOP_TESTS),
]

DIM, HEADS, WIDTH, CONTEXT, HIDDEN = 8, 2, 4, 2, 12  # of the tokens that are scored, and of the layer that a probe is of
LENGTHS = [5, 0, 9, 1, 14]
QUERY_HEADS, KEY_HEADS, VALUE_WIDTH, KEYS = 4, 2, 6, 24  # of attention; queries and keys are 8 wide

# What a configuration of small inputs needs besides the defaults. A component whose defaults do is not here.
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("token_scorer", "cacovid"): {"dim": DIM, "heads": 2},
    ("token_scorer", "sum"): {"scorers": [{"name": "norm"}, {"name": "cacovid", "dim": DIM, "heads": 2}], "weights": [0.7, 0.3]},
    ("token_scorer", "transprune"): {"layers": [0, 1]},
    ("selector", "threshold"): {"threshold": 0.6},
    ("selector", "elbow"): {"at_least": 2},
    ("selector", "coverage"): {"tail": 0.4},
    ("selector", "quota"): {"session": 3, "floor": 1},
    ("stop_test", "todre"): {"threshold": 0.5},
}

# With which a sparse attention reads all of `KEYS` keys, without the help of ``min_length``.
KEEP_ALL: dict[str, dict[str, Any]] = {
    "biformer": {"region_size": 4, "top_k": 6},
    "dhsa": {"query_block": 4, "chunk_size": 3, "n_local": 4, "n_global": 2, "budget": 28},
    "dsa": {"keep": KEYS, "chunk": 7},
    "fasa": {"keep": KEYS, "dominant": 2, "recent": 2},
    "hisa": {"keep": KEYS, "block": 4, "blocks": 6, "chunk": 7},
    "token_select": {"keep": KEYS, "initial": 2, "local": 3, "chunk": 5},
    "token_sparse": {"tau": 0.0, "window": 4},
}

# With which it leaves keys out, in several forms.
SPARSE: dict[str, tuple[dict[str, Any], ...]] = {
    "biformer": (
        {"region_size": 4, "top_k": 2},
        {"region_size": 3, "top_k": 2, "per_key_head": True, "soft_routing": True},
        {"region_size": 4, "top_k": 2, "first_region": True, "local_kernel": 3, "local_channels": KEY_HEADS * VALUE_WIDTH},
    ),
    "dhsa": (
        {"query_block": 4, "chunk_size": 3, "n_local": 2, "n_global": 1, "budget": 9},
        {"query_block": 2, "n_local": 1, "n_global": 0, "budget": 5, "per_key_head": True, "predictor": {"width": 16, "separation": 2}},
    ),
    "dsa": ({"keep": 5, "chunk": 7},),
    "fasa": ({"keep": 5, "dominant": 2, "recent": 2}, {"keep": 5, "dominant": 2, "recent": 1, "per": "key_head"}),
    "hisa": ({"keep": 5, "block": 4, "blocks": 2, "chunk": 7}, {"keep": 5, "block": 3, "blocks": 2, "query_block": 4, "chunk": 8}),
    "token_select": ({"keep": 3, "initial": 2, "local": 2, "chunk": 4}, {"keep": 3, "initial": 0, "local": 0, "chunk": 3, "smoothing": 3}),
    "token_sparse": (
        {"window": 3, "kernel": 3, "tau": 0.6, "min_tokens": 1},
        {"window": 3, "kernel": 1, "tau": 0.6, "min_tokens": 1, "per_key_head": True},
    ),
}
FORMS = [(name, form) for name in ATTENTIONS for form in range(max(len(SPARSE.get(name, ())), 1))]

# Forms that add something to attention, and the call that they say they cannot serve.
ADDING = {("biformer", 2): "candidates"}

# What does not claim that a later token leaves an earlier one's result as it is, and why.
NOT_CAUSAL = {"token_sparse": "the last queries choose for the whole row"}

# Which of so many queries a call asks, and whether it says where they stand among the keys.
CALLS: dict[str, tuple[Callable[[int], Tensor], bool]] = {
    "whole": (torch.arange, True),
    "tail": (lambda keys: torch.arange(keys - 5, keys), True),
    "one": (lambda keys: torch.tensor([keys - 1]), True),
    "apart": (lambda keys: torch.tensor([2, 7, 8, keys - 3]), True),
    "unordered": (torch.arange, False),
    "candidates": (lambda keys: torch.arange(3), False),
}
ASKED = [(name, form, call) for name, form in FORMS for call in CALLS if ADDING.get((name, form)) != call]
OWN_QUERIES = ("whole", "unordered")  # a row has as many queries as keys; else every row has all of the call's
EXACT = {"atol": 1e-10, "rtol": 0.0}


def config_of(kind: str, name: str, **others: Any) -> Config:
    cls = components.get(kind, name)
    try:
        return validate(cls.Config, {"name": name, **NEEDED.get((kind, name), {}), **others})
    except Problem as problem:
        pytest.fail(f"{kind} {name!r}: {problem.path}: {problem.message}; if its configuration has required keys, give them in NEEDED")


def build(kind: str, name: str, **others: Any) -> Any:
    torch.manual_seed(0)
    made = components.build(kind, config_of(kind, name, **others))
    return made.eval() if isinstance(made, torch.nn.Module) else made


# Everything


def test_something_is_registered() -> None:
    assert {"recency", "random"} <= set(SCORERS) and {"top_k", "mmr"} <= set(SELECTORS)
    assert {"dsa", "token_select"} <= set(ATTENTIONS) and {"todre"} <= set(STOP_TESTS)


def test_the_tables_name_nothing_that_is_not_registered() -> None:
    assert set(NEEDED) <= set(EVERYTHING)
    assert set(KEEP_ALL) | set(SPARSE) | set(NOT_CAUSAL) <= set(ATTENTIONS)


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_a_recipe_builds_it_by_name(kind: str, name: str) -> None:
    class Recipe(Config):
        part: component_config(kind)  # type: ignore[valid-type]

    config = config_of(kind, name)
    made = build(kind, name)
    assert type(made) is components.get(kind, name)
    assert isinstance(made, {"token_scorer": TokenScorer, "selector": Selector, "sparse_attention": SparseAttention}.get(kind, object))
    assert made.config == config
    for dumped in (config.model_dump(), config.model_dump(mode="json")):
        assert validate(type(config), dumped) == config
        assert parse(Recipe, {"part": dumped}, source="recipe").part == config
    with pytest.raises(ConfigError, match=r"recipe: part\.no_such_key"):
        parse(Recipe, {"part": {**config.model_dump(), "no_such_key": 1}}, source="recipe")
    with pytest.raises(ConfigError, match=rf"part\.name.*{name}"):
        parse(Recipe, {"part": {"name": name + "x"}}, source="recipe")


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_a_configuration_cannot_be_changed(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config_of(kind, name).name = "another"  # type: ignore[attr-defined]


# Tokens


def tokens(lengths: list[int] = LENGTHS, dtype: torch.dtype = torch.float64, grouped: bool = True) -> tuple[TokenView, LayerProbe]:
    """Rows with all that a view can hold (some protected tokens, items of two tokens), and a probe with all that a layer can show."""
    count, rows = sum(lengths), len(lengths)
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    offsets = offsets_of(torch.tensor(lengths, dtype=torch.long))
    view = TokenView.of(drawn(count, DIM), offsets, context=drawn(rows, CONTEXT, DIM), ids=torch.arange(count) % 3)
    last = torch.zeros(count, dtype=torch.bool)
    last[offsets[1:][view.lengths > 0] - 1] = True
    view = replace(view, protected=last, groups=view.positions // 2 if grouped else None)
    layer = {f"{module}_{end}": drawn(count, DIM) for module in ("attention", "ffn") for end in ("in", "out")}
    heads = {"query": drawn(rows, HEADS, CONTEXT, WIDTH), "key": drawn(count, HEADS, WIDTH), "value": drawn(count, HEADS, WIDTH)}
    return view, LayerProbe(layer=1, ffn_hidden=drawn(count, HIDDEN), carried=drawn(count).abs(), **layer, **heads)


def row_of_batch(view: TokenView, probe: LayerProbe, row: int) -> tuple[TokenView, LayerProbe]:
    """A row alone."""
    own = slice(int(view.offsets[row]), int(view.offsets[row + 1]))
    each = {name: getattr(view, name)[own] for name in ("values", "positions", "protected", "ids")}
    alone = TokenView(**each, offsets=view.offsets.new_tensor([0, own.stop - own.start]))
    alone = replace(alone, groups=None if view.groups is None else view.groups[own], context=view.context[row : row + 1])
    seen = {name: value[own] for name, value in vars(probe).items() if isinstance(value, Tensor) and name != "query"}
    return alone, replace(probe, **seen, query=probe.query[row : row + 1])


def scored(scorer: TokenScorer, view: TokenView, probe: LayerProbe) -> Tensor:
    """As in a schedule: the layer is carried first."""
    return scorer.score(view, replace(probe, carried=scorer.carry(view, probe)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_gives_each_token_a_finite_score_of_the_tokens_type(name: str, dtype: torch.dtype) -> None:
    view, probe = tokens(dtype=dtype)
    before = {field: value.clone() for field, value in (vars(view) | vars(probe)).items() if isinstance(value, Tensor)}
    scores = scored(build("token_scorer", name).to(dtype), view, probe)
    assert scores.shape == (len(view.values),)
    assert scores.dtype == dtype
    assert scores.isfinite().all()
    assert all(torch.equal(value, before[field]) for field, value in (vars(view) | vars(probe)).items() if field in before)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_of_a_row_do_not_depend_on_its_batch_mates(name: str, grouped: bool) -> None:
    scorer, (view, probe) = build("token_scorer", name).double(), tokens(grouped=grouped)
    whole = scored(scorer, view, probe)
    for row in range(len(LENGTHS)):
        alone = scored(scorer, *row_of_batch(view, probe, row))
        torch.testing.assert_close(alone, whole[view.offsets[row] : view.offsets[row + 1]], **EXACT)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_has_nothing_to_score(name: str, lengths: list[int]) -> None:
    scores = scored(build("token_scorer", name).double(), *tokens(lengths))
    assert (scores.shape, scores.dtype) == ((0,), torch.float64)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_says_the_same_again_and_after_a_checkpoint(name: str) -> None:
    scorer, (view, probe) = build("token_scorer", name).double(), tokens()
    torch.manual_seed(1)
    other = components.build("token_scorer", scorer.config).double().eval()
    other.load_state_dict(scorer.state_dict())
    first = scored(scorer, view, probe)
    assert torch.equal(scored(scorer, view, probe), first)
    assert torch.equal(scored(other, view, probe), first)


@pytest.mark.parametrize("name", STOP_TESTS)
def test_a_stop_test_judges_each_row_by_itself(name: str) -> None:
    test, (view, probe) = build("stop_test", name), tokens()
    stops = test.stop(view, probe)
    assert (stops.shape, stops.dtype) == ((len(LENGTHS),), torch.bool)
    assert stops.any() and not stops.all()
    assert torch.equal(test.stop(view, probe), stops)
    for row in range(len(LENGTHS)):
        assert torch.equal(test.stop(*row_of_batch(view, probe, row)), stops[row : row + 1])
    for lengths in ([], [0, 0]):
        assert test.stop(*tokens(lengths)).shape == (len(lengths),)


# Selectors


def free_units(view: TokenView) -> Tensor:
    units, _ = view.units()
    return torch.bincount(units.rows[~units.protected], minlength=len(view))


def kept_units(view: TokenView, selection: RowSelection) -> Tensor:
    """int64 ``[B]``, the unprotected units of which anything is kept."""
    units, unit = view.units()
    kept = torch.zeros(len(units.values), dtype=torch.bool).index_fill(0, unit[selection.index], True)
    return torch.bincount(units.rows[kept & ~units.protected], minlength=len(view))


def scores_of(view: TokenView) -> Tensor:
    return torch.rand(len(view.values), generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(view.values.dtype)


def takes_exactly_k(selector: Selector, view: TokenView) -> bool:
    """Whether it needs a number, or else chooses it itself and takes k as the most."""
    try:
        selector.select(view, scores_of(view))
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_keeps_k_whole_groups_in_order_and_all_that_is_protected(name: str, grouped: bool, dtype: torch.dtype) -> None:
    selector, (view, _) = build("selector", name), tokens(grouped=grouped, dtype=dtype)
    free, exact = free_units(view), takes_exactly_k(selector, view)
    for k in (torch.zeros_like(free), free.clamp(max=1), free // 2, free):
        for scores in (scores_of(view), torch.ones_like(scores_of(view))):
            selection = selector.select(view, scores, k)
            kept = kept_units(view, selection)
            assert torch.equal(kept, k) if exact else bool((kept <= k).all())
            assert torch.equal(selection.index, selection.index.unique())
            assert torch.equal(selection.lengths, torch.bincount(view.rows[selection.index], minlength=len(view)))
            assert torch.equal(selection.source, view.offsets)
            _, unit = view.units()
            mask = selection.mask()
            assert torch.equal(mask, torch.zeros(int(unit.max()) + 1, dtype=torch.bool).index_fill(0, unit[mask], True)[unit])
            assert bool(mask[view.protected].all())


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", SELECTORS)
def test_what_a_row_keeps_does_not_depend_on_its_batch_mates(name: str, grouped: bool) -> None:
    selector, (view, probe) = build("selector", name), tokens(grouped=grouped)
    scores, k = scores_of(view), free_units(view) // 2
    for most in (k,) if takes_exactly_k(selector, view) else (k, None):
        mask = selector.select(view, scores, most).mask()
        assert torch.equal(selector.select(view, scores, most).mask(), mask)
        for row in range(len(LENGTHS)):
            alone, _ = row_of_batch(view, probe, row)
            own = slice(int(view.offsets[row]), int(view.offsets[row + 1]))
            assert torch.equal(selector.select(alone, scores[own], None if most is None else most[row : row + 1]).mask(), mask[own])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_has_nothing_to_keep(name: str, lengths: list[int]) -> None:
    view, _ = tokens(lengths)
    selection = build("selector", name).select(view, scores_of(view), torch.zeros(len(lengths), dtype=torch.long))
    assert selection.index.shape == (0,)
    assert selection.lengths.tolist() == lengths


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_names_what_it_cannot_take(name: str) -> None:
    selector, (view, _) = build("selector", name), tokens()
    free, scores = free_units(view), scores_of(view)
    for k, shown in ((free + 1, "row 0.*0 to"), (free - 1 - free, "got -1"), (free[:-1], "one for each of the 5 rows")):
        with pytest.raises(ConfigError, match=rf"k: .*{shown}"):
            selector.select(view, scores, k)
    for wrong in (scores.index_fill(0, torch.tensor([3]), torch.nan), scores.index_fill(0, torch.tensor([3]), torch.inf), scores[1:]):
        with pytest.raises(ConfigError, match="scores: expected a finite number for each of 29 tokens"):
            selector.select(view, wrong, free)


# Sparse attention


def attention(name: str, table: dict[str, Any], form: int | None = None, min_length: int = 0) -> SparseAttention:
    if name not in table:
        where = "KEEP_ALL (a configuration that reads all keys)" if table is KEEP_ALL else "SPARSE (configurations that leave keys out)"
        pytest.fail(f"sparse_attention {name!r}: expected an entry in {where} of this file, found none")
    given = table[name] if form is None else table[name][form]
    made: SparseAttention = build("sparse_attention", name, **given, min_length=min_length).double()
    if hasattr(made, "calibrate"):
        q, k, _ = inputs(keys=2 * KEYS, seed=5)
        made.calibrate([(q, k)])
    return made


def inputs(batch: int = 3, keys: int = KEYS, seed: int = 0, key_heads: int = KEY_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((QUERY_HEADS, 8), (key_heads, 8), (key_heads, VALUE_WIDTH))
    q, k, v = (torch.randn(batch, heads, keys, width, generator=generator, dtype=torch.float64) for heads, width in shapes)
    return q, k, v


def calls(name: str, form: int) -> list[str]:
    return [call for called, number, call in ASKED if (called, number) == (name, form)]


def asked(q: Tensor, call: str) -> tuple[Tensor, Tensor | None]:
    """The queries of a call, and their places."""
    which, placed = CALLS[call][0](q.shape[2]), CALLS[call][1]
    return q[:, :, which], which if placed else None


def real(found: Tensor, call: str, lengths: list[int] | None) -> Tensor:
    """Results with zeros for queries that are padding."""
    if call not in OWN_QUERIES or lengths is None:
        return found
    return found.masked_fill((torch.arange(found.shape[2]) >= torch.tensor(lengths)[:, None])[:, None, :, None], 0.0)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_reading_everything_is_dense_attention(name: str, call: str) -> None:
    for module, key_heads in (
        (attention(name, KEEP_ALL), KEY_HEADS),
        *((attention(name, SPARSE, 0, min_length=KEYS), key_heads) for key_heads in (1, KEY_HEADS, QUERY_HEADS)),
    ):
        q, k, v = inputs(key_heads=key_heads)
        queries, positions = asked(q, call)
        for lengths, scale in ((None, None), (None, 0.3), ([KEYS, 0, 9], None)):
            more: dict[str, Any] = {"lengths": None if lengths is None else torch.tensor(lengths), "scale": scale}
            found, dense = (one(queries, k, v, query_positions=positions, **more) for one in (module, dense_attend))
            assert found.shape == (*queries.shape[:3], VALUE_WIDTH)
            torch.testing.assert_close(real(found, call, lengths), real(dense, call, lengths), **EXACT)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_it_leaves_keys_out(name: str, form: int) -> None:
    q, k, v = inputs()
    module, differs = attention(name, SPARSE, form), False
    for call in calls(name, form):
        queries, positions = asked(q, call)
        differs |= not torch.allclose(
            module(queries, k, v, query_positions=positions), dense_attend(queries, k, v, query_positions=positions)
        )
    assert differs, f"sparse_attention {name!r}: form {form} of SPARSE reads everything, so that it tests nothing"


@pytest.mark.parametrize("call", [call for call, (_, placed) in CALLS.items() if placed])
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in FORMS if name not in NOT_CAUSAL])
def test_later_tokens_change_nothing(name: str, form: int, call: str) -> None:
    module, mine, others = attention(name, SPARSE, form), inputs(), inputs(seed=9)
    queries, positions = asked(mine[0], call)
    assert positions is not None
    positions = positions if call == "whole" else positions - 2  # so that there are keys behind the last query too
    before = module(queries, *mine[1:], query_positions=positions)
    for last in {int(positions[0]), int(positions[len(positions) // 2]), int(positions[-2:][0])}:
        k, v = (torch.where((torch.arange(KEYS) > last)[:, None], 9 * other, own) for own, other in zip(mine[1:], others[1:], strict=True))
        q = torch.where((positions > last)[:, None], 9 * asked(others[0], call)[0], queries)
        after = module(q, k, v, query_positions=positions)
        torch.testing.assert_close(after[:, :, positions <= last], before[:, :, positions <= last], **EXACT)


@pytest.mark.parametrize(("name", "form", "call"), ASKED)
def test_a_row_reads_like_alone_whatever_its_batch_mates_and_padding(name: str, form: int, call: str) -> None:
    module, (q, k, v) = attention(name, SPARSE, form), inputs(batch=4)
    lengths = [KEYS, 0, 11, 17]
    padding = (torch.arange(KEYS) >= torch.tensor(lengths)[:, None])[:, None, :, None]
    q, k, v = q.masked_fill(padding, 30.0) if call in OWN_QUERIES else q, k.masked_fill(padding, 50.0), v.masked_fill(padding, -80.0)
    queries, positions = asked(q, call)
    found = module(queries, k, v, query_positions=positions, lengths=torch.tensor(lengths))
    assert found.isfinite().all()
    assert call in OWN_QUERIES or not found[1].any()
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        alone = module(queries[own], k[own], v[own], query_positions=positions, lengths=torch.tensor([length]))
        torch.testing.assert_close(real(alone, call, [length]), real(found[own], call, [length]), **EXACT)
        if length and (call in OWN_QUERIES or positions is None):
            asked_for = queries[own, :, :length]
            unpadded = module(
                asked_for, k[own, :, :length], v[own, :, :length], query_positions=None if positions is None else positions[:length]
            )
            torch.testing.assert_close(unpadded, found[own, :, : asked_for.shape[2]], **EXACT)


@pytest.mark.parametrize(("name", "form", "call"), [asked for asked in ASKED if asked[:2] not in ADDING])
def test_a_short_row_is_dense_among_long_ones(name: str, form: int, call: str) -> None:
    q, k, v = inputs()
    queries, positions = asked(q, call)
    lengths = [KEYS, 8, 10]
    more = {"query_positions": positions, "lengths": torch.tensor(lengths)}
    found, dense = (one(queries, k, v, **more) for one in (attention(name, SPARSE, form, min_length=8), dense_attend))
    torch.testing.assert_close(real(found, call, lengths)[1], real(dense, call, lengths)[1], **EXACT)


@pytest.mark.parametrize(("name", "form", "call"), ASKED)
def test_gradients_are_finite_and_reach_what_was_read(name: str, form: int, call: str) -> None:
    module, (q, k, v) = attention(name, SPARSE, form), inputs()
    queries, positions = asked(q, call)
    leaves = [x.clone().requires_grad_() for x in (queries, k, v)]
    lengths = torch.tensor([KEYS, 0, 13])
    module(*leaves, query_positions=positions, lengths=lengths).square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        assert leaf.grad[0].any() and leaf.grad[2].any()
    for leaf in leaves[1:]:
        assert not leaf.grad[2, :, 13:].any()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_an_attention_says_the_same_again_and_after_a_checkpoint(name: str, form: int) -> None:
    module, (q, k, v) = attention(name, SPARSE, form), inputs()
    torch.manual_seed(1)
    other = components.build("sparse_attention", module.config).double().eval()
    other.load_state_dict(module.state_dict())
    for call in calls(name, form):
        queries, positions = asked(q, call)
        first = module(queries, k, v, query_positions=positions)
        assert torch.equal(module(queries, k, v, query_positions=positions), first)
        assert torch.equal(other(queries, k, v, query_positions=positions), first)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_layout_in_memory_does_not_matter(name: str, form: int) -> None:
    module, (q, k, v) = attention(name, SPARSE, form), inputs()
    for call in calls(name, form):
        queries, positions = asked(q, call)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (queries, k, v)]
        torch.testing.assert_close(module(*turned, query_positions=positions), module(queries, k, v, query_positions=positions), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_it_runs_in_low_precision(name: str, form: int, dtype: torch.dtype) -> None:
    module, (q, k, v) = attention(name, SPARSE, form).to(dtype), (x.to(dtype) for x in inputs())
    for call in calls(name, form):
        queries, positions = asked(q, call)
        found = module(queries, k, v, query_positions=positions, lengths=torch.tensor([KEYS, 0, 13]))
        assert found.dtype == dtype
        assert found.isfinite().all()


@pytest.mark.parametrize(("name", "form"), ADDING)
def test_what_a_form_cannot_serve_it_refuses(name: str, form: int) -> None:
    q, k, v = inputs()
    queries, positions = asked(q, ADDING[name, form])
    with pytest.raises(ConfigError, match="expected"):
        attention(name, SPARSE, form)(queries, k, v, query_positions=positions)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_batch_or_a_call_may_be_empty(name: str, form: int) -> None:
    module, (q, k, v) = attention(name, SPARSE, form), inputs()
    for queries, keys, values in ((q[:0], k[:0], v[:0]), (q[:, :, :0], k, v)):
        found = module(queries, keys, values, query_positions=torch.arange(queries.shape[2]))
        assert found.shape == (*queries.shape[:3], VALUE_WIDTH)
