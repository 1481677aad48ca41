# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.schedule import ProbedLayer, PruneSchedule
from recsys.efficiency.scoring import TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS, DIM = [9, 0, 12, 1, 5], 6


def view(lengths: list[int] = LENGTHS, **others: Tensor | None) -> TokenView:
    values = torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TokenView.of(values, offsets_of(torch.tensor(lengths, dtype=torch.long)), **others)


class Layer(nn.Module):
    """Attention (causal by the original positions, with a term for the distance) and a feed-forward network, over jagged rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv, self.ffn = nn.Linear(DIM, 3 * DIM).double(), nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM)).double()

    def attention(self, view: TokenView, alive: Tensor) -> Tensor:
        q, k, v = self.qkv(view.values).chunk(3, -1)
        distance = view.positions[:, None] - view.positions[None]
        seen = (view.rows[:, None] == view.rows[None]) & (distance >= 0) & alive[None]
        logits = (q @ k.T - 0.1 * distance).masked_fill(~seen, -torch.inf)
        return torch.where(seen.any(1, keepdim=True), logits.softmax(-1), 0.0).nan_to_num() @ v

    def run(self, view: TokenView, alive: Tensor) -> tuple[Tensor, LayerProbe]:
        added = self.attention(view, alive)
        middle = view.values + added
        return middle + self.ffn(middle), LayerProbe(-1, attention_in=view.values, attention_out=added)

    def forward(self, view: TokenView) -> tuple[Tensor, LayerProbe]:
        return self.run(view, torch.ones(len(view.values), dtype=torch.bool))


def layers(count: int = 4) -> list[ProbedLayer]:
    return [Layer(seed) for seed in range(count)]


def schedule(keep: dict[int, float], scorer: str = "norm", selector: str = "top_k") -> PruneSchedule:
    return PruneSchedule(PruneSchedule.Config(keep=keep, scorer={"name": scorer}, selector={"name": selector}))


def stopping(made: PruneSchedule, layer: int, rows: list[bool]) -> PruneSchedule:
    """The same with a stop test of our own."""

    class Stop:
        def stop(self, view: TokenView, probe: LayerProbe) -> Tensor:
            assert probe.layer == layer
            return torch.tensor(rows)

    made.config, made.stop = made.config.model_copy(update={"stop_layer": layer}), Stop()
    return made


class Carrying(TokenScorer):
    """Adds up what the layers added; writes down what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def carry(self, view: TokenView, probe: LayerProbe) -> Tensor:
        own = probe.require("attention_out", "carrying").square().sum(-1)
        return own if probe.carried is None else probe.carried + own

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        assert probe is not None and probe.carried is not None
        self.seen.append((probe.layer, view.positions, probe.carried))
        return probe.carried


def unpruned(run: list[Any], made: TokenView) -> Tensor:
    for layer in run:
        made = made.with_values(layer(made)[0])
    return made.values


@pytest.mark.parametrize("selector", ["top_k", "mmr"])
@pytest.mark.parametrize("keep", [{}, {0: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}])
@pytest.mark.parametrize("groups", [False, True])
def test_keeping_all_is_no_schedule_bit_for_bit(selector: str, keep: dict[int, float], groups: bool):
    made, run = view(groups=torch.arange(27) // 2 if groups else None), layers()
    values, chosen = schedule(keep, selector=selector)(run, made)
    assert torch.equal(values, unpruned(run, made))
    assert torch.equal(chosen.index, torch.arange(27)) and torch.equal(chosen.offsets, made.offsets)


def kept_after(made: TokenView, keep: dict[int, float], count: int = 4) -> list[RowSelection]:
    """What is left after each layer, by schedules that end there."""
    found = []
    for last in range(count):
        part = {layer: share for layer, share in keep.items() if layer <= last}
        found.append(schedule(part)(layers(last + 1), made)[1])
    return found


@pytest.mark.parametrize("keep", [{0: 0.7}, {1: 0.5, 2: 0.25}, {0: 0.9, 1: 0.6, 3: 0.1}])
def test_survivors_are_as_if_the_others_were_masked_from_that_layer_on(keep: dict[int, float]):
    made = view()
    values, chosen = schedule(keep)(layers(), made)
    alive, whole = torch.ones(27, dtype=torch.bool), made
    for layer, left in zip(layers(), kept_after(made, keep), strict=True):
        whole = whole.with_values(layer.run(whole, alive)[0])
        alive = left.mask()
    assert torch.equal(alive, chosen.mask()) and len(chosen.index) < 27
    torch.testing.assert_close(values, whole.values[chosen.index], atol=1e-10, rtol=0)


def test_exact_numbers_of_the_original_tokens():
    made = view()
    for layer, left in enumerate(kept_after(made, {1: 0.5, 2: 0.25})):
        share = {0: 1.0, 1: 0.5}.get(layer, 0.25)
        wanted = [0 if n == 0 else 1 + min(max(round((n - 1) * share), 1), n - 1) for n in LENGTHS]
        assert left.lengths.tolist() == wanted
        assert bool((left.index[1:] > left.index[:-1]).all())


def test_shares_are_those_of_the_best_scores():
    made = view()
    _, chosen = schedule({0: 0.5})(layers(1), made)
    norms = layers(1)[0](made)[0].norm(dim=1).detach()
    for b, n in enumerate(LENGTHS):
        begin = int(made.offsets[b])
        free = sorted(range(begin, begin + n - 1), key=lambda s: (-float(norms[s]), -s))
        wanted = sorted([*free[: min(max(round((n - 1) * 0.5), 1), n - 1)], begin + n - 1]) if n else []
        assert chosen.index[(chosen.index >= begin) & (chosen.index < begin + n)].tolist() == wanted


def test_protected_tokens_go_through_and_the_last_need_not():
    shield = torch.zeros(27, dtype=torch.bool)
    shield[[0, 10, 11]] = True
    made = view(protected=shield)
    _, chosen = schedule({0: 0.2})(layers(2), made)
    assert bool(chosen.mask()[shield].all())
    assert chosen.lengths.tolist() == [1 + 2, 0, 2 + 2, 1, 1]  # protected ones, and a fifth of 8, 10, 1 and 5 others


def test_the_last_token_goes_on_where_nothing_is_protected():
    _, chosen = schedule({0: 0.1, 2: 0.1}, scorer="norm")(layers(3), view())
    assert bool(chosen.mask()[torch.tensor([8, 20, 21, 26])].all())


def test_groups_go_on_whole():
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0, 0, 1, 1, 1])
    made = view(groups=groups)
    _, chosen = schedule({1: 0.5})(layers(), made)
    _, unit = made.units()
    mask = chosen.mask()
    for u in range(int(unit.max()) + 1):
        assert len(set(mask[unit == u].tolist())) == 1
    assert 0 < len(chosen.index) < 27


def test_what_is_carried_is_cut_down_with_the_tokens():
    made, scorer = view(), Carrying()
    pruning = schedule({1: 0.6, 2: 0.3})
    pruning.scorer = scorer
    _, chosen = pruning(layers(), made)
    assert [layer for layer, _, _ in scorer.seen] == [1, 2]
    current, alive = made, torch.ones(27, dtype=torch.bool)
    total = torch.zeros(27, dtype=torch.float64)
    for number, layer in enumerate(layers()[:3]):
        values, probe = layer.run(current, alive)
        total = total + probe.attention_out.square().sum(-1)
        current = current.with_values(values)
        if number == 1:
            torch.testing.assert_close(scorer.seen[0][2], total)
            short = schedule({1: 0.6})
            short.scorer = Carrying()
            alive = short(layers(2), made)[1].mask()
    torch.testing.assert_close(scorer.seen[1][2], total[alive], atol=1e-10, rtol=0)
    assert torch.equal(scorer.seen[1][1], made.positions[alive])
    assert bool(alive[chosen.index].all())


def test_a_stop_leaves_the_protected_tokens_of_the_rows_that_stop():
    made = view()
    _, chosen = stopping(schedule({}), 1, [True, True, False, True, True])(layers(), made)
    assert chosen.lengths.tolist() == [1, 0, 12, 1, 1]
    values, _ = stopping(schedule({}), 3, [False] * 5)(layers(), made)
    assert torch.equal(values, unpruned(layers(), made))


def test_a_stop_together_with_a_share():
    made = view()
    _, both = stopping(schedule({1: 0.5}), 1, [True, False, False, False, False])(layers(), made)
    assert both.lengths.tolist() == [1, 0, 1 + 6, 1, 1 + 2]
    _, later = stopping(schedule({1: 0.5}), 2, [True, False, False, False, False])(layers(), made)
    assert torch.equal(both.index, later.index)


def test_a_stop_keeps_the_protected_group_whole():
    made = view([6], groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    _, chosen = stopping(schedule({}), 0, [True])(layers(1), made)
    assert chosen.index.tolist() == [4, 5]


def test_a_share_after_a_stop_takes_what_is_left():
    made = view()
    _, chosen = stopping(schedule({2: 0.5}), 1, [True] * 5)(layers(), made)
    assert chosen.lengths.tolist() == [1, 0, 1, 1, 1]


def test_a_row_does_not_depend_on_its_batch_mates():
    made = view()
    keep = {0: 0.8, 2: 0.3}
    values, chosen = schedule(keep)(layers(), made)
    for b, n in enumerate(LENGTHS):
        begin = int(made.offsets[b])
        alone = TokenView.of(made.values[begin : begin + n], torch.tensor([0, n]))
        own_values, own = schedule(keep)(layers(), alone)
        mine = slice(int(chosen.offsets[b]), int(chosen.offsets[b + 1]))
        assert (own.index + begin).tolist() == chosen.index[mine].tolist()
        torch.testing.assert_close(own_values, values[mine], atol=1e-10, rtol=0)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_prune(lengths: list[int]):
    values, chosen = schedule({0: 0.5})(layers(2), view(lengths))
    assert values.shape == (0, DIM) and chosen.lengths.tolist() == [0] * len(lengths)


def test_gradients_reach_what_went_through_and_what_was_read():
    made = view([5])
    values = made.values.clone().requires_grad_()
    out, chosen = schedule({1: 0.5})(layers(2), replace(made, values=values))
    out.sum().backward()
    assert len(chosen.index) == 3 and bool((values.grad.abs().sum(1) > 0)[: int(chosen.index.max())].all())


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"keep": {0: 0.0}}, "keep"),
        ({"keep": {0: 1.5}}, "keep"),
        ({"keep": {-1: 0.5}}, "keep"),
        ({"keep": {0: 0.2, 1: 0.5}}, "do not rise"),
        ({"stop_layer": 1}, "stop_layer"),
        ({"scorer": {"name": "nrom"}}, "did you mean 'norm'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(bad: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        PruneSchedule.Config(**{"scorer": {"name": "norm"}, "selector": {"name": "top_k"}, **bad})


@pytest.mark.parametrize("count", [0, 2])
def test_layers_that_are_not_there_are_named(count: int):
    with pytest.raises(ConfigError, match="2"):
        schedule({2: 0.5})(layers(count), view())


def test_no_layer_and_no_schedule():
    made = view()
    values, chosen = schedule({})([], made)
    assert torch.equal(values, made.values) and len(chosen.index) == 27


def test_the_schedule_reads_what_the_scorer_needs():
    with pytest.raises(ConfigError, match="context"):
        schedule({0: 0.5}, scorer="context")(layers(1), view())
