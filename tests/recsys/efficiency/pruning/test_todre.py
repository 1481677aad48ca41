# SPDX-License-Identifier: Apache-2.0
"""§1 of the specification, property by property."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.todre import DiverseRetention, InformationMigration, coverage_radius, late_layer
from recsys.efficiency.pruning.transprune import TransPrune
from recsys.efficiency.schedule import PruneSchedule
from recsys.efficiency.scoring import Norm, Random
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = [10, 0, 14, 1]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(lengths: list[int] = LENGTHS, dim: int = 4, seed: int = 0, protected: Tensor | None = None) -> TokenView:
    return TokenView.of(drawn(sum(lengths), dim, seed=seed), offsets_of(torch.tensor(lengths, dtype=torch.long)), protected=protected)


def retention(similarity: str = "nearest", recent: int = 0, **others: object) -> DiverseRetention:
    selector = {"importance": 0.0, "similarity": similarity}
    return DiverseRetention(DiverseRetention.Config(**{"recent": recent, "selector": selector, **others}))


def by_loop(x: Tensor, pivot: int, k: int, total: bool) -> list[int]:
    """Farthest first by the chord, or the lowest sum of cosines."""
    unit = x / x.norm(dim=1, keepdim=True)
    kept = [pivot]
    while len(kept) < k:
        rest = [i for i in range(len(x)) if i not in kept]
        if total:
            kept.append(min(rest, key=lambda i: (sum(float(unit[i] @ unit[c]) for c in kept), -i)))
        else:
            kept.append(max(rest, key=lambda i: (min(float((unit[i] - unit[c]).norm()) for c in kept), i)))
    return sorted(kept)


@pytest.mark.parametrize("similarity", ["nearest", "total"])
@pytest.mark.parametrize("scorer", [{"name": "random"}, {"name": "norm"}])
def test_against_a_loop(similarity: str, scorer: dict[str, str]):
    for seed in range(5):
        made = view(seed=seed)
        chosen = retention(similarity, events=4, scorer=scorer)(made)
        scores = (Norm(Norm.Config()) if scorer["name"] == "norm" else Random(Random.Config())).score(made)
        for b, n in enumerate(LENGTHS):
            begin = int(made.offsets[b])
            own = chosen.index[(chosen.index >= begin) & (chosen.index < begin + n)] - begin
            row = slice(begin, begin + n)
            assert own.tolist() == (by_loop(made.values[row], int(scores[row].argmax()), min(4, n), similarity == "total") if n else [])


def test_k_center_from_a_random_pivot_is_the_default():
    config = DiverseRetention.Config(events=3)
    assert config.selector.importance == 0.0 and config.selector.similarity == "nearest" and config.scorer.name == "random"


def test_recent_events_take_the_pivots_place():
    made = view([8])
    chosen = DiverseRetention(DiverseRetention.Config(events=4))(made)
    assert chosen.index.tolist() == by_loop(made.values, 7, 4, total=False)


def test_the_radius_is_at_most_twice_the_best():
    """300 draws of 12 points, of which 3 are kept; the best of all 220 choices."""
    triples = torch.tensor(list(itertools.combinations(range(12), 3)))
    made = view([12] * 300)
    chosen = retention(events=3)(made)
    radius = coverage_radius(made, chosen)
    unit = torch.nn.functional.normalize(made.values, dim=1).view(300, 12, 4)
    chord = torch.cdist(unit, unit)
    best = chord[:, :, triples].amin(3).amax(1).amin(1)
    worst = float((radius / best).max())
    assert bool((radius >= best - 1e-9).all()) and 1.0 < worst <= 2.0


def test_coverage_radius_against_a_loop():
    made = view()
    chosen = RowSelection.of_mask(torch.arange(25) % 3 == 0, made.offsets)
    found = coverage_radius(made, chosen)
    unit = made.values / made.values.norm(dim=1, keepdim=True)
    for b, n in enumerate(LENGTHS):
        row = range(int(made.offsets[b]), int(made.offsets[b]) + n)
        kept = [s for s in row if s % 3 == 0]
        wanted = max((min(float((unit[s] - unit[c]).norm()) for c in kept) for s in row), default=0.0)
        assert float(found[b]) == pytest.approx(wanted, abs=1e-7)
    assert coverage_radius(made, RowSelection.all(made)).tolist() == pytest.approx([0.0] * 4, abs=1e-7)
    nothing = RowSelection.of_mask(torch.zeros(25, dtype=torch.bool), made.offsets)
    assert coverage_radius(made, nothing).tolist() == [math.inf, 0.0, math.inf, math.inf]
    one = RowSelection.of_mask(torch.arange(25) == 0, made.offsets)
    assert math.isfinite(float(coverage_radius(made, one)[0])) and coverage_radius(made, one).tolist()[1:] == [0.0, math.inf, math.inf]


def test_keeping_all_is_the_identity():
    for similarity in ("nearest", "total"):
        assert torch.equal(retention(similarity, share=1.0)(view()).index, torch.arange(25))


def test_exact_numbers_in_the_original_order():
    for similarity in ("nearest", "total"):
        chosen = retention(similarity, share=0.25)(view())
        assert chosen.lengths.tolist() == [2, 0, 4, 1] and bool((chosen.index[1:] > chosen.index[:-1]).all())


def test_another_order_of_the_tokens_keeps_the_same():
    made = view([14])
    order = torch.randperm(14, generator=torch.Generator().manual_seed(3))
    turned = TokenView.of(made.values[order], made.offsets)
    for similarity in ("nearest", "total"):
        own = retention(similarity, events=5, scorer={"name": "norm"})
        assert sorted(order[own(turned).index].tolist()) == own(made).index.tolist()


def test_duplicates_are_kept_last():
    kinds = drawn(5, 6, seed=4)
    made = TokenView.of(kinds[torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4])], torch.tensor([0, 12]))
    kept = retention(events=5)(made).index
    assert len({tuple(made.values[i].tolist()) for i in kept}) == 5
    assert len(retention(events=7)(made).index) == 7


def test_a_row_does_not_depend_on_its_batch_mates():
    made = view()
    whole = retention(events=4)(made)
    for b, n in enumerate(LENGTHS):
        begin = int(made.offsets[b])
        alone = retention(events=4)(TokenView.of(made.values[begin : begin + n], torch.tensor([0, n])))
        assert (alone.index + begin).tolist() == whole.index[int(whole.offsets[b]) : int(whole.offsets[b + 1])].tolist()


def test_k_center_covers_what_max_sum_and_chance_miss():
    """16 clusters of very different sizes, 400 points, 32 kept: the specification's measure, over several draws."""
    radius: dict[str, list[float]] = {"nearest": [], "total": [], "random": []}
    covered: dict[str, list[int]] = {"nearest": [], "total": [], "random": []}
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        centers = torch.nn.functional.normalize(torch.randn(16, 16, generator=generator, dtype=torch.float64), dim=1)
        share = 1 / torch.arange(1, 17).double() ** 1.5
        cluster = torch.cat((torch.arange(16), torch.multinomial(share, 384, replacement=True, generator=generator)))
        points = centers[cluster] + 0.05 * torch.randn(400, 16, generator=generator, dtype=torch.float64)
        made = TokenView.of(points, torch.tensor([0, 400]))
        chosen = {name: retention(name, events=32)(made) for name in ("nearest", "total")}
        chosen["random"] = RowSelection.of_mask(torch.randperm(400, generator=generator) < 32, made.offsets)
        for name, own in chosen.items():
            radius[name].append(float(coverage_radius(made, own)))
            covered[name].append(len(set(cluster[own.index].tolist())))
    mean = {name: sum(values) / len(values) for name, values in radius.items()}
    assert covered["nearest"] == [16] * 6 and mean["nearest"] / mean["random"] <= 0.5
    assert sum(covered["total"]) < sum(covered["nearest"]) and mean["nearest"] < mean["total"]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_keep(lengths: list[int]):
    made = view(lengths)
    chosen = retention(events=3)(made)
    assert chosen.lengths.tolist() == [0] * len(lengths) and coverage_radius(made, chosen).tolist() == [0.0] * len(lengths)


def test_the_pivot_by_attention_inside_a_model():
    """Scorer transprune with alpha 0 and k-center: the first kept is what the context looks at most."""
    made = view([10], protected=torch.zeros(10, dtype=torch.bool))
    query, key = drawn(1, 2, 1, 4, seed=7), drawn(10, 2, 4, seed=8)
    attention = (torch.einsum("hme,she->hms", query[0], key) / 2).softmax(-1).mean((0, 1))
    scorer = TransPrune.Config(layers=(0,), alpha=0.0)
    made_schedule = PruneSchedule(PruneSchedule.Config(keep={0: 0.4}, scorer=scorer, selector={"name": "mmr", "importance": 0.0}))
    _, chosen = made_schedule([lambda v: (v.values, LayerProbe(0, query=query, key=key))], made)
    assert chosen.index.tolist() == by_loop(made.values, int(attention.argmax()), 4, total=False)


# ---- the second stage

SHIELD = torch.tensor([False] * 8 + [True] * 2 + [False] * 13 + [True] + [True])


def probe(made: TokenView, seed: int = 3) -> LayerProbe:
    return LayerProbe(0, query=drawn(len(made), 2, 3, 5, seed=seed), key=drawn(len(made.values), 2, 5, seed=seed + 1))


def stop(threshold: float) -> InformationMigration:
    return InformationMigration(InformationMigration.Config(threshold=threshold))


def test_the_share_of_attention_against_a_loop():
    made = view(protected=SHIELD)
    given = probe(made)
    found = stop(0.1).share(made, given)
    for b, n in enumerate(LENGTHS):
        row = range(int(made.offsets[b]), int(made.offsets[b]) + n)
        on_history = whole = 0.0
        for h in range(2):
            for m in range(3):
                logits = [float(given.query[b, h, m] @ given.key[s, h]) / math.sqrt(5) for s in row]
                top = sum(math.exp(x) for x in logits)
                for s, x in zip(row, logits, strict=True):
                    on_history += 0.0 if bool(SHIELD[s]) else math.exp(x) / top
                    whole += math.exp(x) / top
        assert float(found[b]) == pytest.approx(on_history / whole if n else 0.0, abs=1e-12)
    for threshold in (0.2, 0.7, 0.95):
        assert stop(threshold).stop(made, given).tolist() == [share < threshold for share in found.tolist()]


def test_zero_never_stops_and_above_one_always():
    made = view(protected=SHIELD)
    assert not bool(stop(0.0).stop(made, probe(made)).any())
    assert bool(stop(1.5).stop(made, probe(made)).all())
    bare = view()
    assert not bool(stop(0.999).stop(bare, probe(bare))[torch.tensor([0, 2, 3])].any())


def test_each_row_stops_by_itself():
    made = view(protected=SHIELD)
    given = probe(made)
    found = stop(0.7).share(made, given)
    for b, n in enumerate(LENGTHS):
        place = slice(int(made.offsets[b]), int(made.offsets[b]) + n)
        alone = TokenView.of(made.values[place], torch.tensor([0, n]), protected=SHIELD[place])
        own = LayerProbe(0, query=given.query[b : b + 1], key=given.key[place])
        torch.testing.assert_close(stop(0.7).share(alone, own)[0], found[b], atol=1e-12, rtol=0)


def looking(on_history: float):
    """A layer whose protected tokens read only each other where ``on_history`` is 0; the probe says how its attention falls."""

    def layer(made: TokenView) -> tuple[Tensor, LayerProbe]:
        assert made.protected is not None
        logit = torch.where(made.protected, 0.0, math.log(max(on_history, 1e-300)) if on_history else -1e4).double()
        key = logit[:, None, None]
        same = made.rows[:, None] == made.rows[None]
        weights = torch.where(same, logit[None].expand(len(logit), -1), -torch.inf).softmax(1).nan_to_num()
        added = torch.where(made.protected[:, None], weights @ made.values, 0.0)
        query = torch.ones(len(made), 1, 1, 1, dtype=torch.float64)
        return made.values + added, LayerProbe(0, query=query, key=key)

    return layer


def schedule(threshold: float, layer: int) -> PruneSchedule:
    config = PruneSchedule.Config(
        scorer={"name": "norm"}, selector={"name": "top_k"}, stop={"name": "todre", "threshold": threshold}, stop_layer=layer
    )
    return PruneSchedule(config)


def test_what_is_read_off_does_not_change_where_nobody_looks_at_the_history():
    made = view(protected=SHIELD)
    run = [looking(0.8), looking(0.5), looking(0.0), looking(0.0), looking(0.0)]
    whole, _ = schedule(0.0, 2)(run, made)
    cut, chosen = schedule(0.1, 2)(run, made)
    assert torch.equal(chosen.mask(), SHIELD)
    torch.testing.assert_close(cut, whole[SHIELD], atol=1e-12, rtol=0)


def test_a_history_that_is_looked_at_stays():
    made = view(protected=SHIELD)
    run = [looking(0.8)] * 4
    _, chosen = schedule(0.1, 2)(run, made)
    assert torch.equal(chosen.index, torch.arange(25))


def test_a_late_layer():
    assert late_layer(32) == 27 and late_layer(8) == 6 and late_layer(2) == 0
    assert all(0 <= late_layer(depth) < depth - 1 for depth in range(2, 100))
    with pytest.raises(ConfigError, match=r"depth.*got 1"):
        late_layer(1)


def test_what_is_missing_is_named():
    made = view(protected=SHIELD)
    with pytest.raises(ConfigError, match=r"'todre'.*query.*layer 4"):
        stop(0.1).stop(made, LayerProbe(4, key=probe(made).key))
    with pytest.raises(ConfigError, match=r"'todre'.*key"):
        stop(0.1).stop(made, LayerProbe(4, query=probe(made).query))
    with pytest.raises(ValueError, match="threshold"):
        InformationMigration.Config(threshold=-0.1)
    assert components.get("stop_test", "todre") is InformationMigration
