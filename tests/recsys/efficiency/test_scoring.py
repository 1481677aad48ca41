# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import Tensor

from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import (
    ContextSimilarity,
    Norm,
    Random,
    Recency,
    TokenScorer,
    WeightedSum,
    context_of,
    probe_of,
    row_extreme,
    row_softmax,
    unit_scaled,
)
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = [4, 0, 7, 1, 20]


def view(lengths: list[int] = LENGTHS, seed: int = 0, context: bool = True) -> TokenView:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), 3, generator=generator, dtype=torch.float64)
    other = torch.randn(len(lengths), 2, 3, generator=generator, dtype=torch.float64) if context else None
    return TokenView.of(values, offsets_of(torch.tensor(lengths, dtype=torch.long)), context=other)


def scorers() -> list[TokenScorer]:
    parts = (Norm.Config(), Recency.Config(), Random.Config(seed=3))
    return [
        Recency(Recency.Config()),
        Random(Random.Config(seed=3)),
        Norm(Norm.Config()),
        ContextSimilarity(ContextSimilarity.Config()),
        WeightedSum(WeightedSum.Config(scorers=parts, weights=(0.5, -1.0, 2.0))),
    ]


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.config.name)
def test_a_row_does_not_depend_on_its_batch_mates(scorer: TokenScorer):
    made = view()
    whole = scorer.score(made)
    assert whole.shape == (32,)
    for b in range(len(LENGTHS)):
        begin, end = int(made.offsets[b]), int(made.offsets[b + 1])
        alone = TokenView.of(made.values[begin:end], torch.tensor([0, end - begin]), context=made.context[b : b + 1])
        torch.testing.assert_close(scorer.score(alone), whole[begin:end], atol=1e-12, rtol=0)


@pytest.mark.parametrize("scorer", scorers(), ids=lambda s: s.config.name)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_score(scorer: TokenScorer, lengths: list[int]):
    assert scorer.score(view(lengths)).shape == (0,)


def test_random_is_drawn_by_place_whatever_the_longest_row():
    scorer = Random(Random.Config(seed=5))
    longest = scorer.score(view([70]))
    for length in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64):
        assert torch.equal(scorer.score(view([length])), longest[:length])
    assert bool(((longest >= 0) & (longest < 1)).all()) and len(set(longest.tolist())) == 70
    assert not torch.equal(Random(Random.Config(seed=6)).score(view([70])), longest)


def test_recency_and_norm():
    made = view()
    assert Recency(Recency.Config()).score(made).tolist() == [float(p) for p in made.positions]
    torch.testing.assert_close(Norm(Norm.Config()).score(made), torch.linalg.vector_norm(made.values, dim=1))


def test_context_similarity_against_a_loop():
    made = view()
    found = ContextSimilarity(ContextSimilarity.Config()).score(made)
    for s in range(len(made.values)):
        wanted = torch.cosine_similarity(made.values[s][None], made.context[made.rows[s]]).max()
        assert float(found[s]) == pytest.approx(float(wanted), abs=1e-12)


def test_weighted_sum_against_its_parts():
    made = view()
    config = WeightedSum.Config(scorers=({"name": "norm"}, {"name": "context"}), weights=(0.3, 0.7))
    found = WeightedSum(config).score(made)
    parts = [unit_scaled(s.score(made), made.offsets) for s in (Norm(Norm.Config()), ContextSimilarity(ContextSimilarity.Config()))]
    torch.testing.assert_close(found, 0.3 * parts[0] + 0.7 * parts[1])


def test_unit_scaling_against_a_loop():
    offsets = offsets_of(torch.tensor(LENGTHS))
    scores = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100
    found = unit_scaled(scores, offsets)
    for b, length in enumerate(LENGTHS):
        own = scores[offsets[b] : offsets[b + 1]]
        got = found[offsets[b] : offsets[b + 1]]
        if length > 1:
            torch.testing.assert_close(got, (own - own.min()) / (own.max() - own.min()))
            assert float(got.min()) == 0 and float(got.max()) == 1
        elif length == 1:
            assert float(got) == 0
    torch.testing.assert_close(unit_scaled(scores * 3 - 8, offsets), found, atol=1e-12, rtol=0)


def test_equal_scores_scale_to_zero():
    assert unit_scaled(torch.full((4,), 7.0), torch.tensor([0, 4])).tolist() == [0.0] * 4


def test_softmax_and_extremes_within_rows():
    offsets = offsets_of(torch.tensor(LENGTHS))
    scores = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 300
    found = row_softmax(scores, offsets)
    low, high = row_extreme(scores, offsets, "amin"), row_extreme(scores, offsets, "amax")
    for b, length in enumerate(LENGTHS):
        own = scores[offsets[b] : offsets[b + 1]]
        torch.testing.assert_close(found[offsets[b] : offsets[b + 1]], own.softmax(0))
        assert (float(low[b]), float(high[b])) == ((float(own.min()), float(own.max())) if length else (0.0, 0.0))


def test_gradients_of_softmax_and_scaling():
    offsets = torch.tensor([0, 3, 3, 5])
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: row_softmax(s, offsets), (scores,))
    assert torch.autograd.gradcheck(lambda s: unit_scaled(s, offsets), (scores,))


def test_the_gradient_of_a_norm_at_zero_is_finite():
    values = torch.zeros(2, 3, requires_grad=True)
    Norm(Norm.Config()).score(TokenView.of(values, torch.tensor([0, 2]))).sum().backward()
    assert values.grad is not None and bool(values.grad.isfinite().all())


def test_nobody_carries_by_default():
    assert Norm(Norm.Config()).carry(view(), LayerProbe(0)) is None


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"'context'.*context"):
        ContextSimilarity(ContextSimilarity.Config()).score(view(context=False))
    with pytest.raises(ConfigError, match="me: expected a context"):
        context_of(view(context=False), "me")
    with pytest.raises(ConfigError, match="me: expected a probe"):
        probe_of(None, "me")
    with pytest.raises(ConfigError, match=r"ffn_out.*layer 3"):
        LayerProbe(3).require("ffn_out", "me")
    with pytest.raises(ConfigError, match=r"weights: expected 2.*got 1"):
        WeightedSum(WeightedSum.Config(scorers=({"name": "norm"}, {"name": "recency"}), weights=(1.0,)))


def test_a_probe_hands_out_what_it_has():
    tensor = torch.ones(2, 3)
    assert LayerProbe(0, key=tensor).require("key", "me") is tensor
    assert probe_of(LayerProbe(1), "me").layer == 1


def test_components_are_found_by_name():
    for name in ("recency", "random", "norm", "context", "sum"):
        assert issubclass(components.get("token_scorer", name), TokenScorer)


def test_cosines_do_not_depend_on_lengths_of_vectors():
    made = view()
    scorer = ContextSimilarity(ContextSimilarity.Config())
    scaled: Tensor = scorer.score(made.with_values(made.values * 17))
    torch.testing.assert_close(scaled, scorer.score(made))
    assert math.isclose(float(scorer.score(TokenView.of(made.context[:1, 0], torch.tensor([0, 1]), context=made.context[:1]))[0]), 1.0)
