# SPDX-License-Identifier: Apache-2.0
"""§3 of the specification, property by property."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.transprune import TransPrune, context_attention, plan, transition_variation
from recsys.efficiency.schedule import ProbedLayer, PruneSchedule
from recsys.efficiency.view import TokenView, free_tokens, offsets_of

LENGTHS, DIM, HEADS, MANY = [6, 0, 9, 1], 8, 2, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(lengths: list[int] = LENGTHS, protected: Tensor | None = None, groups: Tensor | None = None) -> TokenView:
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.long))
    return TokenView.of(drawn(sum(lengths), DIM), offsets, protected=protected, groups=groups)


def probe(made: TokenView, layer: int = 0, seed: int = 1, **others: Any) -> LayerProbe:
    count = len(made.values)
    names = ("attention_in", "attention_out", "ffn_in", "ffn_out")
    own = {name: drawn(count, DIM, seed=10 * seed + n) for n, name in enumerate(names)}
    query, key = drawn(len(made), HEADS, MANY, 4, seed=seed + 90), drawn(count, HEADS, 4, seed=seed + 91)
    return LayerProbe(layer, query=query, key=key, **{**own, **others})


def scorer(**others: Any) -> TransPrune:
    return TransPrune(TransPrune.Config(**{"layers": (0, 1, 2), **others}))


def scored(made: TokenView, given: LayerProbe, own: TransPrune) -> Tensor:
    return own.score(made, replace(given, carried=own.carry(made, given)))


LAST = torch.tensor([False] * 5 + [True] + [False] * 8 + [True, False])


def by_loop(made: TokenView, given: LayerProbe, alpha: float, signed: bool) -> list[float]:
    """One row, one module and one token at a time."""
    found = [0.0] * len(made.values)
    for b in range(len(made)):
        row = range(int(made.offsets[b]), int(made.offsets[b + 1]))
        free = [s for s in row if made.protected is None or not bool(made.protected[s])]
        if not free:
            continue
        variation = dict.fromkeys(free, 0.0)
        for u, o in ((given.attention_in, given.attention_out), (given.ffn_in, given.ffn_out)):
            turn = {}
            for s in free:
                cosine = float(u[s] @ o[s] / (u[s].norm() * o[s].norm()))
                turn[s] = math.exp(1 - (cosine if signed else abs(cosine)))
            for s in free:
                variation[s] += turn[s] / sum(turn.values()) * float(o[s].norm() / u[s].norm())
        looked = dict.fromkeys(row, 0.0)
        for h in range(HEADS):
            for m in range(MANY):
                weights = torch.stack([given.query[b, h, m] @ given.key[s, h] / 2 for s in row]).softmax(0)
                for s, w in zip(row, weights.tolist(), strict=True):
                    looked[s] += w / (HEADS * MANY)
        for s in free:
            ttv, iga = variation[s] / sum(variation.values()), looked[s] / sum(looked[f] for f in free)
            found[s] = alpha * ttv + (1 - alpha) * iga
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("direction", ["absolute", "signed"])
@pytest.mark.parametrize("shield", [False, True])
def test_against_a_loop(alpha: float, direction: str, shield: bool):
    made = view(protected=LAST if shield else None)
    found = scored(made, probe(made), scorer(alpha=alpha, direction=direction))
    assert found.tolist() == pytest.approx(by_loop(made, probe(made), alpha, direction == "signed"), abs=1e-12)


def test_the_variation_alone_does_not_depend_on_the_context():
    made, own = view(), scorer(alpha=1.0)
    given = probe(made)
    without = scored(made, replace(given, query=None, key=None), own)
    assert torch.equal(scored(made, given, own), without)
    assert torch.equal(scored(made, replace(given, query=given.query * 7), own), without)
    mixed = scorer(alpha=0.5)
    assert not torch.allclose(scored(made, replace(given, query=given.query * 7), mixed), scored(made, given, mixed))


def test_the_attention_alone_needs_no_transition():
    made, own = view(), scorer(alpha=0.0)
    given = LayerProbe(0, query=probe(made).query, key=probe(made).key)
    assert own.carry(made, given) is None
    torch.testing.assert_close(own.score(made, given), context_attention(made, given, "me"), atol=1e-12, rtol=0)


def test_a_module_that_changes_nothing_is_uniform():
    made = view()
    found = transition_variation(made.values, made.values, made)
    wanted = [1 / n for n in LENGTHS for _ in range(n)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    signed = transition_variation(made.values, -made.values, made, signed=True)
    assert signed.tolist() == pytest.approx(wanted, abs=1e-12)  # all turned alike


def test_rotations_of_the_hidden_states_change_nothing():
    made = view()
    turn = torch.linalg.qr(drawn(DIM, DIM, seed=5)).Q
    u, o = drawn(16, DIM, seed=6), drawn(16, DIM, seed=7)
    torch.testing.assert_close(transition_variation(u @ turn, o @ turn, made), transition_variation(u, o, made), atol=1e-12, rtol=0)
    assert not torch.allclose(transition_variation(u @ turn, o, made), transition_variation(u, o, made))


def test_a_longer_output_counts_for_more():
    made, u, o = view(), drawn(16, DIM, seed=6), drawn(16, DIM, seed=7)
    longer = o.clone()
    longer[3] *= 2
    before, after = transition_variation(u, o, made), transition_variation(u, longer, made)
    assert float(after[3]) == pytest.approx(2 * float(before[3]))
    rest = torch.arange(16) != 3
    torch.testing.assert_close(after[rest], before[rest])


def test_zeros_give_neither_infinity_nor_nan():
    made = view()
    u, o = drawn(16, DIM, seed=6), drawn(16, DIM, seed=7)
    u[0], u[7], o[2] = 0, 0, 0
    found = transition_variation(u, o, made)
    assert bool(found.isfinite().all()) and found[[0, 7, 2]].tolist() == [0.0, 0.0, 0.0]
    zero = torch.zeros(16, DIM, dtype=torch.float64)
    given = probe(made, attention_in=zero, attention_out=zero, ffn_in=zero, ffn_out=zero)
    assert scored(made, given, scorer(alpha=1.0)).tolist() == [0.0] * 16


def test_the_variation_is_added_up_over_its_layers_only():
    made, own = view(), scorer(layers=(1, 3), alpha=1.0)
    carried = None
    parts = []
    for layer in range(5):
        given = probe(made, layer=layer, seed=layer + 1, carried=carried)
        carried = own.carry(made, given)
        parts.append(
            transition_variation(given.attention_in, given.attention_out, made) + transition_variation(given.ffn_in, given.ffn_out, made)
        )
        wanted = [part for number, part in enumerate(parts) if number in (1, 3)]
        assert (carried is None) == (not wanted)
        if carried is not None:
            torch.testing.assert_close(carried, torch.stack(wanted).sum(0))


def test_a_row_does_not_depend_on_its_batch_mates():
    """The release's softmax runs over the batch."""
    made = view(protected=LAST)
    given, own = probe(made), scorer()
    whole = scored(made, given, own)
    for b in range(len(LENGTHS)):
        place = slice(int(made.offsets[b]), int(made.offsets[b + 1]))
        alone = TokenView.of(made.values[place], torch.tensor([0, place.stop - place.start]), protected=LAST[place])
        cut = {n: getattr(given, n)[place] for n in ("attention_in", "attention_out", "ffn_in", "ffn_out", "key")}
        torch.testing.assert_close(scored(alone, LayerProbe(0, query=given.query[b : b + 1], **cut), own), whole[place], atol=1e-12, rtol=0)


def test_protected_tokens_take_no_part():
    made = view(protected=LAST)
    given, own = probe(made), scorer(alpha=1.0)
    changed = {n: getattr(given, n).clone() for n in ("attention_in", "attention_out", "ffn_in", "ffn_out")}
    for tensor in changed.values():
        tensor[LAST] = 1e6 * drawn(int(LAST.sum()), DIM, seed=8)
    assert torch.equal(scored(made, given, own), scored(made, replace(given, **changed), own))
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, made.rows, scored(made, given, scorer()))
    assert sums.tolist() == pytest.approx([1.0, 0.0, 1.0, 1.0])


def test_a_group_with_a_protected_token_is_not_prunable():
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0])
    assert free_tokens(view(protected=LAST, groups=groups)).tolist() == [True] * 4 + [False] * 2 + [True] * 6 + [False] * 3 + [True]
    assert bool(free_tokens(view()).all())


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_score(lengths: list[int]):
    made = view(lengths)
    assert scored(made, probe(made), scorer()).shape == (0,)


def test_gradients_of_the_variation_and_of_the_attention():
    made = view([3, 0, 2])
    u, o = drawn(5, DIM, seed=6).requires_grad_(), drawn(5, DIM, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, o: transition_variation(u, o, made), (u, o))
    q, k = drawn(3, HEADS, 2, 4, seed=8).requires_grad_(), drawn(5, HEADS, 4, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: context_attention(made, LayerProbe(0, query=q, key=k), "me"), (q, k))


def test_what_is_missing_is_named():
    made = view()
    with pytest.raises(ConfigError, match=r"transprune.*probe"):
        scorer().score(made)
    with pytest.raises(ConfigError, match="layers: expected one up to layer 0"):
        scorer(layers=(3,)).score(made, probe(made))
    with pytest.raises(ConfigError, match=r"ffn_out.*layer 0"):
        scorer().carry(made, probe(made, ffn_out=None))
    with pytest.raises(ConfigError, match=r"query.*layer 0"):
        scorer(alpha=0.0).score(made, LayerProbe(0, key=probe(made).key))
    with pytest.raises(ConfigError, match=r"key \[S, H, e\]"):
        context_attention(made, LayerProbe(0, query=probe(made).query, key=probe(made).key[1:]), "me")
    with pytest.raises(ConfigError, match="layers"):
        scorer(layers=(-1, 2))
    assert components.get("token_scorer", "transprune") is TransPrune


# ---- inside a model


class Layer(nn.Module):
    """One head over jagged rows; the context is each row's last token, whose next-layer query nobody needs here."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv, self.ffn = nn.Linear(DIM, 3 * DIM).double(), nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, DIM)).double()

    def run(self, made: TokenView, alive: Tensor) -> tuple[Tensor, LayerProbe]:
        q, k, v = self.qkv(made.values).chunk(3, -1)
        seen = (made.rows[:, None] == made.rows[None]) & (made.positions[:, None] >= made.positions[None]) & alive[None]
        weights = torch.where(seen.any(1, keepdim=True), (q @ k.T).masked_fill(~seen, -torch.inf).softmax(-1), 0.0).nan_to_num()
        attended = weights @ v
        middle = made.values + attended
        added = self.ffn(middle)
        last = (made.offsets[1:] - 1).clamp(min=0)
        query = q[last][:, None, None] if len(q) else q.new_zeros(len(made), 1, 1, DIM)
        given = LayerProbe(-1, made.values, attended, middle, added, query=query, key=k[:, None])
        return middle + added, given

    def forward(self, made: TokenView) -> tuple[Tensor, LayerProbe]:
        return self.run(made, torch.ones(len(made.values), dtype=torch.bool))


def layers(count: int) -> list[ProbedLayer]:
    return [Layer(seed) for seed in range(count)]


def schedule(keep: dict[int, float], accumulated: tuple[int, ...]) -> PruneSchedule:
    return PruneSchedule(
        PruneSchedule.Config(keep=keep, scorer=TransPrune.Config(layers=accumulated), selector={"name": "top_k"}),
    )


def test_keeping_all_at_all_stages_is_the_unpruned_model_bit_for_bit():
    made = view()
    values, chosen = schedule({1: 1.0, 2: 1.0}, (1, 2))(layers(4), made)
    for layer in layers(4):
        made = made.with_values(layer(made)[0])
    assert torch.equal(values, made.values) and len(chosen.index) == 16


def test_survivors_are_as_if_the_others_were_masked_from_that_layer_on():
    made, own = view([12, 0, 20, 1]), plan(8)
    values, chosen = schedule(own.keep, own.layers)(layers(8), made)
    alive, whole = torch.ones(33, dtype=torch.bool), made
    for number in range(8):
        whole = whole.with_values(layers(8)[number].run(whole, alive)[0])
        if number in own.keep:
            part = {layer: share for layer, share in own.keep.items() if layer <= number}
            alive = schedule(part, own.layers)(layers(number + 1), made)[1].mask()
    assert torch.equal(alive, chosen.mask())
    assert chosen.lengths.tolist() == [1 + 1, 0, 1 + 2, 1]
    torch.testing.assert_close(values, whole.values[chosen.index], atol=1e-10, rtol=0)


def test_a_transition_cannot_hide_in_a_sum_unnoticed():
    """A sum carries nothing: the scorer says so."""
    parts = {"name": "sum", "scorers": [TransPrune.Config(layers=(0,)), {"name": "recency"}], "weights": [1.0, 1.0]}
    summed = PruneSchedule(PruneSchedule.Config(keep={0: 0.5}, scorer=parts, selector={"name": "top_k"}))
    with pytest.raises(ConfigError, match="part of a sum"):
        summed(layers(2), view())


# ---- the plan


def test_the_papers_plan_for_32_layers():
    own = plan(32)
    assert own.keep == {6: 0.875, 8: 0.625, 11: 0.125} and own.layers == (6, 7, 8, 9, 10, 11)
    assert own.token_layers() == pytest.approx((7 + 2 * 0.875 + 3 * 0.625 + 20 * 0.125) / 32) == pytest.approx(0.410, abs=1e-3)


@pytest.mark.parametrize("depth", range(2, 70))
def test_plans_of_other_depths(depth: int):
    own = plan(depth)
    shares = [share for _, share in sorted(own.keep.items())]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0.125
    assert 0 <= min(own.keep) == min(own.layers) <= max(own.keep) == max(own.layers) < depth - 1
    assert own.token_layers() < 0.6
    PruneSchedule.Config(keep=own.keep, scorer=TransPrune.Config(layers=own.layers), selector={"name": "top_k"})


def test_a_depth_without_room_is_named():
    with pytest.raises(ConfigError, match=r"depth.*got 1"):
        plan(1)
