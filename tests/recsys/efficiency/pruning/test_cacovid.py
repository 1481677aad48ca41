# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.pruning.cacovid import (
    CaCoVIDScorer,
    GroupedSubsetSampler,
    PlainSubsetSampler,
    PolicyTraining,
    adapted_share,
    advantages,
    capped_probabilities,
    policy_loss,
    train_policy,
)
from recsys.efficiency.scoring import ContextSimilarity
from recsys.efficiency.view import TokenView, held, offsets_of

LENGTHS = torch.tensor([9, 0, 4, 1, 30])
SAMPLERS = [GroupedSubsetSampler(), GroupedSubsetSampler(spread=1.0), PlainSubsetSampler()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_view(lengths=LENGTHS, dim=16, seed=0, context=2, **others):
    values = torch.randn(int(lengths.sum()), dim, generator=seeded(seed), dtype=torch.float64)
    given_ = torch.randn(len(lengths), context, dim, generator=seeded(seed + 1), dtype=torch.float64)
    return TokenView.of(values, offsets_of(lengths), context=given_, **others)


def a_policy(dim=16, dtype=torch.float64, **others):
    torch.manual_seed(0)
    return CaCoVIDScorer(CaCoVIDScorer.Config(dim=dim, heads=2, hidden=2 * dim, **others)).to(dtype)


def close(one, two, atol=1e-12):
    torch.testing.assert_close(one, two, rtol=0, atol=atol)


# The policy


def test_a_row_is_judged_by_itself():
    view, policy = a_view(), a_policy(layers=2)
    whole = policy.score(view)
    assert whole.shape == (44,) and whole.dtype == torch.float64
    for b in range(5):
        own = slice(int(view.offsets[b]), int(view.offsets[b + 1]))
        alone = TokenView.of(view.values[own], torch.tensor([0, own.stop - own.start]), context=view.context[b : b + 1])
        close(policy.eval().score(alone), whole[own])


def test_the_tokens_order_does_not_count_but_context_and_row_mates_do():
    view, policy = a_view(torch.tensor([12])), a_policy()
    scores, order = policy.score(view).detach(), torch.randperm(12, generator=seeded())
    close(policy.score(view.with_values(view.values[order])), scores[order])
    other = TokenView.of(view.values, view.offsets, context=view.context.flip(-1))
    assert float((policy.score(other).detach() - scores).abs().min()) > 1e-9
    changed = view.values.clone()
    changed[0, 0] += 1
    assert float((policy.score(view.with_values(changed)).detach() - scores)[1:].abs().min()) > 1e-9


def test_context_and_tokens_are_told_apart():
    """With a token's vector and a context token swapped, the other tokens' scores differ."""
    view, policy = a_view(torch.tensor([5]), context=1), a_policy()
    policy.mark.data += 1
    values, context = view.values.clone(), view.values[:1].clone()[None]
    values[0] = view.context[0, 0]
    swapped = TokenView.of(values, view.offsets, context=context)
    assert float((policy.score(swapped) - policy.score(view))[1:].detach().abs().max()) > 1e-6


def test_every_parameter_gets_a_gradient():
    policy = a_policy()
    policy.score(a_view()).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters())
    assert all(bool((p.grad != 0).any()) for name, p in policy.named_parameters() if not name.endswith("in_proj_bias"))


def test_the_widths_halve_four_times_down_to_two():
    widths = [layer.out_features for layer in a_policy(64).head if isinstance(layer, torch.nn.Linear)]
    assert widths == [32, 16, 8, 4, 2]


def test_no_tokens_and_no_rows():
    policy = a_policy()
    assert policy.score(a_view(torch.tensor([0, 0]))).shape == (0,)
    assert policy.score(a_view(torch.zeros(0, dtype=torch.long))).shape == (0,)


# The capped probabilities


def redistributed(mass, cap):
    """The recursion, for one row."""
    p, capped = [m / sum(mass) for m in mass], set()
    while any(x > cap + 1e-13 for x in p):
        capped |= {i for i, x in enumerate(p) if x > cap + 1e-13}
        left, rest = 1 - cap * len(capped), sum(mass[i] for i in range(len(mass)) if i not in capped)
        p = [cap if i in capped else left * mass[i] / rest for i in range(len(mass))]
    return p


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=25), min_size=1, max_size=4), st.floats(1.0, 4.0))
def test_capped_probabilities_are_the_recursions(rows, share):
    lengths = torch.tensor([len(row) for row in rows])
    present = held(lengths, int(lengths.max()))
    mass = torch.zeros(present.shape, dtype=torch.float64)
    mass[present] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.float64)
    found = capped_probabilities(mass, present, share)
    close(found.sum(1), torch.ones(len(rows), dtype=torch.float64), 1e-9)
    assert bool((found[~present] == 0).all())
    for row, p in zip(rows, found, strict=True):
        cap = max(min(share / len(row), 0.9), 0.1) if len(row) > 1 else 1.0
        assert float(p.max()) <= cap + 1e-12
        p = p[: len(row)]
        close(p, torch.tensor(redistributed(row, cap), dtype=torch.float64), 1e-9)
        order = torch.tensor(row, dtype=torch.float64).argsort()
        assert bool((p[order].diff() >= -1e-12).all())


def test_groups_without_mass_share_what_the_caps_leave():
    found = capped_probabilities(
        torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([[True] * 4, [True, True, False, False]])
    )
    close(found, torch.tensor([[0.5, 1 / 6, 1 / 6, 1 / 6], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64))


# The samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exactly_k_of_each_row_and_first_the_highest(sampler):
    offsets, scores = offsets_of(LENGTHS), torch.randn(44, generator=seeded()).round(decimals=1)
    for k in ([3, 0, 1, 1, 2], [9, 0, 4, 0, 15], [0] * 5, [1, 0, 2, 1, 30]):
        kept = sampler.sample(scores, offsets, torch.tensor(k), 40, seeded(1))
        for b, wanted in enumerate(k):
            own = slice(int(offsets[b]), int(offsets[b + 1]))
            assert kept[:, own].sum(1).tolist() == [wanted] * 40
            best = sorted(range(own.stop - own.start), key=lambda i: (float(scores[own][i]), i), reverse=True)[:wanted]
            assert sorted(kept[0, own].nonzero()[:, 0].tolist()) == sorted(best)
        again = sampler.sample(scores, offsets, torch.tensor(k), 40, seeded(1))
        assert torch.equal(kept, again)
    drawn = sampler.sample(scores, offsets, torch.tensor([3, 0, 1, 1, 2]), 40, seeded(1), best_first=False)
    assert drawn[:, 14:].unique(dim=0).shape[0] > 5


def test_no_rows_or_tokens_to_sample():
    for sampler in SAMPLERS:
        assert sampler.sample(torch.zeros(0), torch.tensor([0]), torch.zeros(0, dtype=torch.long), 3).shape == (3, 0)
        assert sampler.sample(torch.zeros(0), torch.tensor([0, 0]), torch.tensor([0]), 3).shape == (3, 0)


def test_a_grouped_draw_stays_in_one_neighbourhood_of_scores():
    scores = torch.randn(60, generator=seeded(), dtype=torch.float64)
    order = scores.argsort(descending=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(60)
    offsets, k = torch.tensor([0, 60]), torch.tensor([4])
    kept = GroupedSubsetSampler().sample(scores, offsets, k, 4000, seeded(2), best_first=False)
    groups = place * 7 // 60  # floor(60 / (2 * 4)) = 7 groups
    used = torch.stack([groups[row].unique() for row in kept])
    assert used.shape == (4000, 1)
    mass = torch.zeros(7, dtype=torch.float64).index_add(0, groups, scores.softmax(0))
    expected = capped_probabilities(mass[None], torch.ones(1, 7, dtype=torch.bool))[0]
    close(torch.bincount(used[:, 0], minlength=7) / 4000, expected.float(), 0.03)


def test_the_first_pick_in_a_group_has_the_clamped_probability():
    """With k = 1 in a row of two tokens there is one group of two; a third of the draws at least go to the lower one."""
    scores, offsets = torch.tensor([9.0, 0.0], dtype=torch.float64), torch.tensor([0, 2])
    grouped = GroupedSubsetSampler().sample(scores, offsets, torch.tensor([1]), 6000, seeded(), best_first=False)
    assert float(grouped[:, 1].double().mean()) == pytest.approx(0.25 / 1.25, abs=0.02)  # 1 and 0, clamped to [1/4, 1]
    plain = PlainSubsetSampler().sample(scores, offsets, torch.tensor([1]), 6000, seeded(), best_first=False)
    assert float(plain[:, 1].double().mean()) < 0.002


def test_plain_draws_are_without_replacement_by_the_softmax():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    kept = PlainSubsetSampler().sample(p.log() + 3, torch.tensor([0, 3]), torch.tensor([2]), 20000, seeded(), best_first=False)
    without = torch.tensor([float((~kept[:, i]).double().mean()) for i in range(3)], dtype=torch.float64)
    expected = [p[j] * p[k] / (1 - p[j]) + p[k] * p[j] / (1 - p[k]) for j, k in ((1, 2), (0, 2), (0, 1))]
    close(without, torch.stack(expected), 0.015)


# The loss


def drawn(rollouts=6, seed=0):
    offsets = offsets_of(LENGTHS)
    old = torch.randn(44, generator=seeded(seed), dtype=torch.float64)
    kept = PlainSubsetSampler().sample(old, offsets, torch.tensor([3, 0, 2, 1, 7]), rollouts, seeded(seed + 1))
    advantage = advantages(torch.randn(rollouts, 5, generator=seeded(seed + 2), dtype=torch.float64))
    return offsets, old, kept, advantage


def brute_loss(logits, old, kept, advantage, offsets, config):
    total, rows = 0.0, len(offsets) - 1
    for r in range(len(kept)):
        for b in range(rows):
            own = slice(int(offsets[b]), int(offsets[b + 1]))
            n, k = own.stop - own.start, int(kept[r, own].sum())
            if not n or not 0 < k < n:
                continue
            num = den = 0.0
            for s in range(own.start, own.stop):
                p, q = torch.sigmoid(logits[s]), torch.sigmoid(old[s])
                ratio = p / q if kept[r, s] else (1 - p) / (1 - q)
                gain = advantage[r, b]
                weight = 1 - k / n if kept[r, s] else k / n
                num = num - weight * torch.minimum(ratio * gain, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * gain)
                den += weight
            total = total + num / den
    return total / (len(kept) * rows)


def test_the_loss_is_the_papers():
    offsets, old, kept, advantage = drawn()
    logits = old + 0.5 * torch.randn(44, generator=seeded(9), dtype=torch.float64)
    config = PolicyTraining()
    close(policy_loss(logits, old, kept, advantage, offsets, config), brute_loss(logits, old, kept, advantage, offsets, config))
    assert float(((logits.sigmoid() / old.sigmoid()) > 1.28).double().mean()) > 0  # the clip was at work


def test_the_same_policy_has_ratio_one_and_the_gradient_of_reinforce():
    offsets, old, kept, advantage = drawn()
    logits = old.clone().requires_grad_()
    loss = policy_loss(logits, old, kept, advantage, offsets, PolicyTraining())
    loss.backward()
    score_function = torch.zeros_like(old)  # d log P(choice) / d logit = choice − p, balanced and weighted by the advantage
    for b in range(5):
        own = slice(int(offsets[b]), int(offsets[b + 1]))
        choice = kept[:, own].double()
        share = choice.mean(1, keepdim=True) if choice.shape[1] else choice.sum(1, keepdim=True)
        weight = choice * (1 - share) + (1 - choice) * share
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-7)
        score_function[own] = -(weight * advantage[:, b : b + 1] * (choice - old[own].sigmoid())).sum(0) / (6 * 5)
    close(logits.grad, score_function)
    for same in (PolicyTraining(eps_low=0.0, eps_high=0.0), PolicyTraining(eps_low=0.9, eps_high=9.0)):
        close(policy_loss(old, old, kept, advantage, offsets, same), loss.detach())


def test_kept_and_dropped_tokens_weigh_the_same_together():
    """Without a preference, 3 kept of 30 pull up as strongly as 27 dropped pull down."""
    kept = torch.zeros(1, 30, dtype=torch.bool)
    kept[0, :3] = True
    logits = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    policy_loss(logits, logits.detach(), kept, torch.ones(1, 1).double(), torch.tensor([0, 30]), PolicyTraining()).backward()
    close(-logits.grad[:3].sum(), logits.grad[3:].sum())
    assert float(logits.grad[3:].sum()) > 0.1


def test_equal_rewards_have_no_gradient():
    offsets, old, kept, _ = drawn()
    rewards = torch.full((6, 5), 0.1, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 0.7, 1e6], dtype=torch.float64)
    assert bool((advantages(rewards) == 0).all())
    logits = (old + 0.3).requires_grad_()
    policy_loss(logits, old, kept, advantages(rewards), offsets, PolicyTraining()).backward()
    assert bool((logits.grad == 0).all())
    assert bool((advantages(torch.rand(1, 4)) == 0).all())


def test_a_ratio_beyond_the_clip_has_no_gradient():
    kept, offsets = torch.tensor([[True, False]]), torch.tensor([0, 2])
    for gain, shift, moved in ((1.0, 3.0, False), (1.0, -3.0, True), (-1.0, -3.0, False), (-1.0, 3.0, True)):
        logits = torch.tensor([shift, -shift], dtype=torch.float64, requires_grad=True)
        policy_loss(logits, torch.zeros(2).double(), kept, torch.tensor([[gain]]).double(), offsets, PolicyTraining()).backward()
        assert bool((logits.grad != 0).any()) == moved


def test_the_divergence_from_a_half():
    offsets, old, kept, advantage = drawn()
    plain, held_back = (policy_loss(old, old, kept, advantage, offsets, PolicyTraining(kl=kl)) for kl in (0.0, 2.0))
    bernoulli = torch.distributions.Bernoulli(logits=old)
    each = torch.distributions.kl_divergence(bernoulli, torch.distributions.Bernoulli(torch.full_like(old, 0.5)))
    means = [each[offsets[b] : offsets[b + 1]].mean() for b in (0, 2, 3, 4)]
    close(held_back - plain, 2 * torch.stack(means).sum() / 5)


def test_the_loss_has_the_gradient_it_says():
    offsets, old, kept, advantage = drawn()
    logits = (old + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: policy_loss(z, old, kept, advantage, offsets, PolicyTraining(kl=0.3)), (logits,))


# Training


class Table(torch.nn.Module):
    """A policy that is a table of logits."""

    def __init__(self, count):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def score(self, view, probe=None):
        return self.logits


def test_rows_solved_without_history_teach_nothing():
    view = a_view(torch.tensor([6, 6, 0]))
    seen = []

    def reward(selection):
        seen.append(selection)
        found = selection.gather(torch.arange(12.0)).new_zeros(3).index_add(0, view.rows[selection.index], selection.index.float())
        return torch.stack((torch.ones(()), found[1] / 100, torch.zeros(())))

    policy = Table(12)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    step = train_policy(policy, view, reward, optimizer, torch.tensor([2, 2, 0]), PolicyTraining(rollouts=5), generator=seeded())
    assert step.used.tolist() == [False, True, False]
    assert step.evaluations == 3 + 5 and step.rewards.shape == (5, 3)
    assert len(seen[0].index) == 0 and [s.lengths.tolist() for s in seen[1:]] == [[0, 2, 0]] * 5
    assert bool((policy.logits[:6] == 0).all()) and bool((policy.logits[6:] != 0).any())
    nothing = train_policy(policy, view, lambda s: torch.ones(3), optimizer, torch.tensor([2, 2, 0]))
    assert nothing.loss == 0 and not bool(nothing.used.any()) and nothing.rewards.shape == (0, 3)
    without = train_policy(policy, view, reward, optimizer, torch.tensor([2, 2, 0]), PolicyTraining(rollouts=5, solved=None))
    assert without.used.tolist() == [True, True, False] and without.evaluations == 10


def test_protected_tokens_are_in_every_trial_and_groups_are_whole():
    lengths = torch.tensor([8, 5])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 0, 0, 1, 1, 1])
    protected = torch.zeros(13, dtype=torch.bool)
    protected[torch.tensor([2, 12])] = True
    view = a_view(lengths, groups=groups, protected=protected)
    whole = groups + 10 * view.rows

    def reward(selection):
        kept = selection.mask()
        assert bool(kept[torch.isin(whole, whole[protected])].all())
        assert all(kept[whole == g].unique().numel() == 1 for g in whole.unique())
        free = [len(set(whole[kept & (view.rows == b)].tolist())) - 1 for b in range(2)]
        assert free in ([0, 0], [2, 1])
        return torch.rand(2, generator=seeded(len(selection.index)))

    policy = a_policy()
    optimizer = torch.optim.Adam(policy.parameters())
    train_policy(policy, view, reward, optimizer, torch.tensor([2, 1]), PolicyTraining(rollouts=8), generator=seeded())
    with pytest.raises(ConfigError, match="row 1"):
        train_policy(policy, view, reward, optimizer, torch.tensor([2, 2]))


def test_passes_keep_what_was_tried_and_draw_from_the_old_policy():
    view, policy = a_view(torch.tensor([10])), Table(10)
    tried = []

    def reward(selection):
        tried.append(tuple(selection.index.tolist()))
        return selection.recall(torch.tensor([1.0] + [0.0] * 9)).float()

    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    config = PolicyTraining(rollouts=20, passes=3, solved=None)
    step = train_policy(policy, view, reward, optimizer, torch.tensor([1]), config, PlainSubsetSampler(), seeded(3))
    assert step.rewards.shape == (60, 1) and step.evaluations == len(tried) == 60
    assert tried[0] == (9,)  # of equal scores the latest, once
    assert int(step.rewards.sum()) == tried.count((0,)) > 0
    assert int(policy.logits.argmax()) == 0


def test_training_is_deterministic():
    results = []
    for _ in range(2):
        policy, view, planted = toy(0)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        train_policy(policy, view, lambda s, p=planted: s.recall(p), optimizer, torch.full((4,), 4), generator=seeded(5))
        results.append(policy.score(view).detach())
    assert torch.equal(*results)


def test_the_adapted_share():
    assert [adapted_share(0.2, accuracy) for accuracy in (1.0, 0.875, 0.5, 0.125, 0.0)] == [0.1, 0.1, 0.2, 0.4, 0.4]
    assert adapted_share(0.7, 0.0) == 1.0


# Planted tokens


def planted_view(kinds, generator, rows=4, length=48, planted=4):
    """Rows of noisy tokens of several kinds; those of kind 0 are the planted ones, while the context looks like kind 1."""
    place = torch.rand(rows, length, generator=generator).argsort(1) < planted
    kind = torch.where(place, 0, 1 + torch.randint(len(kinds) - 1, (rows, length), generator=generator))
    values = kinds[kind] + 0.3 * torch.randn(rows, length, kinds.shape[1], generator=generator)
    view = TokenView.padded(values, torch.full((rows,), length), context=kinds[1].expand(rows, 1, -1))
    return view, place.flatten().float()


def toy(seed, **others):
    generator = seeded(seed)
    kinds = torch.randn(8, 32, generator=generator)
    torch.manual_seed(seed)
    policy = CaCoVIDScorer(CaCoVIDScorer.Config(dim=32, heads=2, hidden=64))
    return policy, *planted_view(kinds, generator, **others)


def evaluations_until_found(sampler, seed, threshold=0.75, at_most=20):
    """Rows that the frozen model is run for until top-k finds .9 of the planted tokens of other rows, if three of four solve a row."""
    policy, validation, planted = toy(seed, rows=32)
    generator = seeded(seed)
    kinds = torch.randn(8, 32, generator=generator)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    evaluations, config = 0, PolicyTraining(rollouts=16, solved=None)
    for _ in range(at_most):
        view, own = planted_view(kinds, generator)

        def reward(selection, own=own):
            return (selection.recall(own) >= threshold).float()

        step = train_policy(policy, view, reward, optimizer, torch.full((4,), 4), config, sampler, generator)
        evaluations += step.evaluations
        if recall_of(policy, validation, planted) >= 0.9:
            break
    return evaluations, policy, validation, planted


@torch.no_grad()
def recall_of(scorer, view, planted, k=4):
    kept = PlainSubsetSampler().sample(scorer.score(view), view.offsets, torch.full((len(view),), k), 1)[0]
    return float((kept * planted).sum() / planted.sum())


def test_grouped_sampling_finds_combinations_with_fewer_evaluations_and_beats_a_similarity_scorer():
    totals = {}
    for name, sampler in (("grouped", GroupedSubsetSampler()), ("plain", PlainSubsetSampler())):
        runs = [evaluations_until_found(sampler, seed) for seed in range(3)]
        totals[name] = sum(run[0] for run in runs)
        if name == "grouped":
            for _, policy, view, planted in runs:
                assert recall_of(policy, view, planted) >= 0.9
                assert recall_of(ContextSimilarity(ContextSimilarity.Config()), view, planted) < 0.5
    assert totals["grouped"] / totals["plain"] < 1, totals


# Errors


def test_errors_name_what_is_wrong():
    view, policy = a_view(), a_policy()
    with pytest.raises(ConfigError, match="context"):
        policy.score(TokenView.of(view.values, view.offsets))
    with pytest.raises(DataError, match="context"):
        policy.score(a_view(context=0))
    with pytest.raises(DataError, match="values"):
        policy.score(a_view(dim=8))
    with pytest.raises(ConfigError, match="heads"):
        CaCoVIDScorer(CaCoVIDScorer.Config(dim=6, heads=4))
    with pytest.raises(ConfigError, match="spread"):
        GroupedSubsetSampler(spread=0.5)
    with pytest.raises(ConfigError, match="share"):
        capped_probabilities(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.5)
    with pytest.raises(ConfigError, match=r"k: row 2"):
        GroupedSubsetSampler().sample(torch.zeros(44), view.offsets, torch.tensor([1, 0, 5, 1, 1]), 2)
    with pytest.raises(ConfigError, match="rollouts"):
        PlainSubsetSampler().sample(torch.zeros(44), view.offsets, torch.tensor([1, 0, 1, 1, 1]), 0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for wrong in (torch.zeros(4), torch.full((5,), torch.nan)):
        with pytest.raises(DataError, match="reward"):
            train_policy(policy, view, lambda s, wrong=wrong: wrong, optimizer, torch.tensor([1, 0, 1, 1, 1]))
