# SPDX-License-Identifier: Apache-2.0
"""§2 of the specification, property by property."""

import pytest
import torch
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.idpruner import IDPruner, QuantileScaled, hopkins, importance_retention, quantile_scaled
from recsys.efficiency.scoring import Random, TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import MMR, TopK
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = [10, 0, 16, 1]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(lengths: list[int] = LENGTHS, seed: int = 0) -> TokenView:
    return TokenView.of(drawn(sum(lengths), 5, seed=seed), offsets_of(torch.tensor(lengths, dtype=torch.long)))


class Fixed(TokenScorer):
    """Scores that were given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        return self.scores


def pruner(scores: Tensor, weight: float = 0.5, recent: int = 0, **others: object) -> IDPruner:
    given = {"recent": recent, "selector": {"importance": weight}, **others}
    return IDPruner(IDPruner.Config(**given), Fixed(scores))


def by_loop(x: Tensor, scores: list[float], k: int, weight: float) -> list[int]:
    """The paper's algorithm, as it stands in the specification."""
    low, high = min(scores), max(scores)
    importance = [(s - low) / (high - low + 1e-300) for s in scores]
    unit = x / x.norm(dim=1, keepdim=True)
    kept = [max(range(len(x)), key=lambda i: importance[i])]
    nearest = [float(unit[i] @ unit[kept[0]]) for i in range(len(x))]
    while len(kept) < k:
        rest = [i for i in range(len(x)) if i not in kept]
        kept.append(max(rest, key=lambda i: weight * importance[i] - (1 - weight) * nearest[i]))
        nearest = [max(nearest[i], float(unit[i] @ unit[kept[-1]])) for i in range(len(x))]
    return sorted(kept)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_against_the_papers_algorithm(weight: float, share: float):
    for seed in range(10):
        made, scores = view(seed=seed), drawn(27, seed=seed + 50)
        chosen = pruner(scores, weight, share=share)(made)
        wanted = []
        for b, n in enumerate(LENGTHS):
            row = slice(int(made.offsets[b]), int(made.offsets[b]) + n)
            if n:
                wanted += [row.start + i for i in by_loop(made.values[row], scores[row].tolist(), max(1, round(share * n)), weight)]
        assert chosen.index.tolist() == wanted


def test_the_defaults_are_the_papers():
    config = IDPruner.Config(share=0.25)
    assert (config.selector.importance, config.selector.parallel, config.selector.similarity) == (0.5, 1, "nearest")
    assert config.scorer.name == "context" and config.scaling == "min_max"
    assert IDPruner(config)(view()).lengths.tolist() == [2, 0, 4, 1]


def test_importance_alone_is_top_k():
    for seed in range(20):
        made, scores = view(seed=seed), drawn(27, seed=seed + 50)
        k = torch.tensor([4, 0, 4, 1])
        assert torch.equal(pruner(scores, 1.0, events=4)(made).index, TopK(TopK.Config()).select(made, scores, k).index)


def test_diversity_alone_is_the_farthest_first_traversal_from_the_most_important():
    for seed in range(20):
        made, scores = view([12], seed=seed), drawn(12, seed=seed + 50)
        unit = made.values / made.values.norm(dim=1, keepdim=True)
        chord, kept = torch.cdist(unit, unit), [int(scores.argmax())]
        while len(kept) < 5:
            kept.append(int(chord[:, kept].amin(1).argmax()))
        assert pruner(scores, 0.0, events=5)(made).index.tolist() == sorted(kept)


def test_scale_and_shift_of_the_importance_change_nothing():
    made, scores = view(), drawn(27, seed=1)
    for scaling in ("min_max", "quantile"):
        plain = pruner(scores, events=5, scaling=scaling)(made).index
        for factor, shift in ((3.0, -7.0), (0.01, 100.0)):
            assert torch.equal(pruner(scores * factor + shift, events=5, scaling=scaling)(made).index, plain)


def test_constant_importance_leaves_only_the_difference():
    made, scores = view(), torch.full((27,), 2.5, dtype=torch.float64)
    found = [pruner(scores, weight, events=5)(made).index.tolist() for weight in (0.0, 0.3, 0.9)]
    assert found[0] == found[1] == found[2]


def test_keeping_all_is_the_identity():
    assert torch.equal(pruner(drawn(27), share=1.0)(view()).index, torch.arange(27))


def test_one_place_goes_to_the_most_important_for_every_trade_off():
    made, scores = view(), drawn(27, seed=1)
    for weight in (0.0, 0.5, 1.0):
        chosen = pruner(scores, weight, events=1)(made)
        wanted = [int(o) + int(scores[o:e].argmax()) for o, e in zip(made.offsets[:-1], made.offsets[1:], strict=True) if e > o]
        assert chosen.index.tolist() == wanted


def test_the_second_of_two_equal_tokens_only_where_forced_or_where_importance_rules():
    x = torch.eye(6, dtype=torch.float64)[[0, 0, 1, 2, 3]]
    made, scores = TokenView.of(x, torch.tensor([0, 5])), torch.tensor([1.0, 0.99, 0.1, 0.1, 0.0], dtype=torch.float64)
    assert 1 not in pruner(scores, 0.5, events=4)(made).index.tolist()
    assert 1 in pruner(scores, 0.5, events=5)(made).index.tolist()
    assert 1 in pruner(scores, 0.9, events=2)(made).index.tolist()


def test_several_at_once_is_exact_at_one():
    made, scores = view(), drawn(27, seed=1)
    plain = pruner(scores, events=6)(made)
    one = IDPruner(IDPruner.Config(events=6, recent=0, selector={"importance": 0.5, "parallel": 1}), Fixed(scores))(made)
    many = IDPruner(IDPruner.Config(events=6, recent=0, selector={"importance": 0.5, "parallel": 4}), Fixed(scores))(made)
    assert torch.equal(one.index, plain.index) and torch.equal(many.lengths, plain.lengths)


def test_a_row_does_not_depend_on_its_batch_mates():
    made, scores = view(), drawn(27, seed=1)
    for scaling in ("min_max", "quantile"):
        whole = pruner(scores, events=4, scaling=scaling)(made)
        for b, n in enumerate(LENGTHS):
            row = slice(int(made.offsets[b]), int(made.offsets[b]) + n)
            alone = pruner(scores[row], events=4, scaling=scaling)(TokenView.of(made.values[row], torch.tensor([0, n])))
            assert (alone.index + row.start).tolist() == whole.index[int(whole.offsets[b]) : int(whole.offsets[b + 1])].tolist()


@pytest.mark.parametrize("scaling", ["min_max", "quantile"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_prune(scaling: str, lengths: list[int]):
    assert pruner(torch.zeros(0), share=0.5, scaling=scaling)(view(lengths)).lengths.tolist() == [0] * len(lengths)


def test_recent_events_stay():
    chosen = IDPruner(IDPruner.Config(events=4, recent=2))(view())
    assert bool(chosen.mask()[[8, 9, 24, 25, 26]].all()) and chosen.lengths.tolist() == [4, 0, 4, 1]


# ---- quantiles


def test_quantiles_against_a_loop():
    scores = (drawn(27, seed=2) * 3).round()
    made = view()
    found = quantile_scaled(scores, made.offsets)
    for b, n in enumerate(LENGTHS):
        own = scores[int(made.offsets[b]) : int(made.offsets[b]) + n].tolist()
        for i, value in enumerate(own):
            below, alike = sum(o < value for o in own), sum(o == value for o in own)
            wanted = (below + (alike - 1) / 2) / (n - 1) if n > 1 else 0.0
            assert float(found[int(made.offsets[b]) + i]) == pytest.approx(wanted)


def test_an_outlier_does_not_squash_the_others():
    """All but one look alike to min-max; quantiles still tell them apart."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    made = TokenView.of(base + 0.05 * torch.randn(20, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 20]))
    scores = torch.rand(20, generator=generator, dtype=torch.float64)
    scores[4] = 1e9
    top = set(TopK(TopK.Config()).select(made, scores, torch.tensor([5])).index.tolist())
    shared = {s: len(top & set(pruner(scores, 0.9, events=5, scaling=s)(made).index.tolist())) for s in ("min_max", "quantile")}
    assert shared["quantile"] == 5 > shared["min_max"]


def test_quantiles_hand_on_what_is_carried():
    class Carrying(Fixed):
        def carry(self, view: TokenView, probe: LayerProbe) -> Tensor:
            return self.scores

    scores = drawn(27)
    assert QuantileScaled(Carrying(scores)).carry(view(), LayerProbe(0)) is scores
    assert QuantileScaled(Fixed(scores)).carry(view(), LayerProbe(0)) is None


# ---- how the trade-off is looked at


def selections(made: TokenView, seed: int = 0) -> RowSelection:
    return RowSelection.of_mask(torch.rand(len(made.values), generator=torch.Generator().manual_seed(seed)) < 0.4, made.offsets)


def test_importance_retention_against_a_loop():
    made, importance = view(), drawn(27, seed=3).abs()
    chosen = selections(made)
    found = importance_retention(chosen, importance)
    for b, n in enumerate(LENGTHS):
        begin = int(made.offsets[b])
        own = importance[begin : begin + n].tolist()
        kept = [own[int(i) - begin] for i in chosen.index if begin <= int(i) < begin + n]
        wanted = sum(kept) / sum(sorted(own, reverse=True)[: len(kept)]) if kept else 1.0
        assert float(found[b]) == pytest.approx(wanted)
    k = torch.tensor([3, 0, 5, 1])
    assert importance_retention(TopK(TopK.Config()).select(made, importance, k), importance).tolist() == pytest.approx([1.0] * 4)
    with pytest.raises(ConfigError, match="importance"):
        importance_retention(chosen, -importance)
    with pytest.raises(ConfigError, match="27 numbers"):
        importance_retention(chosen, importance[:-1])


def test_hopkins_against_a_loop():
    made = view()
    chosen = selections(made, 1)
    scores = Random(Random.Config(seed=4)).score(made)
    found = hopkins(made, chosen, seed=4)
    unit = made.values / made.values.norm(dim=1, keepdim=True)
    for b, n in enumerate(LENGTHS):
        row = list(range(int(made.offsets[b]), int(made.offsets[b]) + n))
        kept = [s for s in row if s in chosen.index.tolist()]
        drawn_ = sorted(row, key=lambda s: -float(scores[s]))[: len(kept)]
        if len(kept) < 2:
            assert float(found[b]) == 0.5
            continue
        far = sum(min(1 - float(unit[r] @ unit[c]) for c in kept) for r in drawn_)
        near = sum(min(1 - float(unit[v] @ unit[c]) for c in kept if c != v) for v in kept)
        assert float(found[b]) == pytest.approx(max(far, 0) / (far + near), abs=1e-9)


def test_clustered_is_near_one_and_spread_near_zero():
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(10, dtype=torch.float64)
    cluster = torch.arange(100) // 10
    made = TokenView.of(centers[cluster] + 0.01 * torch.randn(100, 10, generator=generator, dtype=torch.float64), torch.tensor([0, 100]))
    piled = RowSelection.of_mask(cluster == 3, made.offsets)
    spread = RowSelection.of_mask(torch.arange(100) % 10 == 0, made.offsets)
    assert float(hopkins(made, piled)) > 0.95 and float(hopkins(made, spread)) < 0.05


def test_both_measures_move_with_the_trade_off():
    retained, clustered = [], []
    for weight in (0.0, 0.5, 1.0):
        kept, piled = [], []
        for seed in range(8):
            made = view([60], seed=seed)
            scores = torch.cosine_similarity(made.values, made.values[-1:]) + 1
            chosen = pruner(scores, weight, events=12)(made)
            kept.append(float(importance_retention(chosen, scores)))
            piled.append(float(hopkins(made, chosen)))
        retained.append(sum(kept) / 8)
        clustered.append(sum(piled) / 8)
    assert retained == sorted(retained) and clustered == sorted(clustered) and retained[0] < retained[2] and clustered[0] < clustered[2]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_measures_of_nothing(lengths: list[int]):
    made = view(lengths)
    chosen = RowSelection.all(made)
    assert hopkins(made, chosen).tolist() == [0.5] * len(lengths)
    assert importance_retention(chosen, torch.zeros(0)).tolist() == [1.0] * len(lengths)


def test_hopkins_of_duplicates_and_of_a_row_alone():
    same = TokenView.of(torch.ones(4, 3, dtype=torch.float64), torch.tensor([0, 4]))
    assert float(hopkins(same, RowSelection.all(same))) == 0.5
    made = view()
    chosen, whole = selections(made, 2), hopkins(made, selections(made, 2))
    row = slice(10, 26)
    alone = TokenView.of(made.values[row], torch.tensor([0, 16]))
    torch.testing.assert_close(hopkins(alone, RowSelection.of_mask(chosen.mask()[row], alone.offsets))[0], whole[2])


def test_only_mmr_selects():
    with pytest.raises(ValueError, match="selector"):
        IDPruner.Config(share=0.5, selector={"name": "top_k"})
    assert isinstance(pruner(drawn(27), share=0.5).selector, MMR)
