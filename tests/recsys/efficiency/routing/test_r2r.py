# SPDX-License-Identifier: Apache-2.0
"""R2R: a small model whose diverging steps a large one takes, and the router that tells them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from scipy.special import digamma
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.efficiency.routing.dispatch import threshold_for_recall
from recsys.efficiency.routing.r2r import (
    DivergenceRouter,
    Usage,
    aleatoric_scorer,
    entropy_scorer,
    label_steps,
    logit_uncertainty,
    positive_weight,
    routed_beam,
    routed_greedy,
    router_loss,
)

V, LEVELS, WIDTH = 7, 4, 6


class Toy(nn.Module):
    """A causal model over codes: states are a decayed sum of embeddings by place."""

    def __init__(self, seed: int, like: "Toy | None" = None, away: float = 1.0, start: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.code = torch.randn(LEVELS + start, 40, WIDTH, generator=generator, dtype=torch.float64)
        self.head = 2.0 * torch.randn(WIDTH, V, generator=generator, dtype=torch.float64)
        if like is not None:
            self.code, self.head = like.code + away * self.code, like.head + away * self.head
        self.asked: list[Tensor] = []

    def states(self, prefixes: Tensor) -> Tensor:
        self.asked.append(prefixes)
        decay = 0.7 ** torch.arange(prefixes.shape[1] - 1, -1, -1, dtype=torch.float64)
        return torch.tanh((self.code[torch.arange(prefixes.shape[1]), prefixes] * decay[:, None]).sum(1))

    def large(self, prefixes: Tensor) -> Tensor:
        return self.states(prefixes) @ self.head

    def small(self, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.states(prefixes)
        return hidden @ self.head, hidden


def models(away: float = 0.7) -> tuple[Toy, Toy]:
    large = Toy(0)
    return Toy(1, large, away), large


def users(count: int = 12) -> Tensor:
    return torch.arange(count)[:, None]


def greedy(model: Toy, start: Tensor, levels: int = LEVELS) -> Tensor:
    prefixes = start
    for _ in range(levels):
        prefixes = torch.cat((prefixes, model.large(prefixes).argmax(1, keepdim=True)), 1)
    return prefixes[:, start.shape[1] :]


def uncertain(hidden: Tensor, code: Tensor, logits: Tensor, level: Tensor) -> Tensor:
    """A router with scores from 0 to 1."""
    return 1.0 - logits.softmax(-1).amax(-1)


def router(levels: int = LEVELS, **config) -> DivergenceRouter:
    torch.manual_seed(0)
    embedding = torch.randn(levels, V, 3, dtype=torch.float64)
    return DivergenceRouter(WIDTH, embedding, DivergenceRouter.Config(**{"width": 16, "blocks": 2, **config})).double().eval()


# --- decoding


def test_the_ends_of_the_threshold_are_the_two_models():
    small, large = models()
    by_large, by_small = greedy(large, users()), greedy(small, users())
    assert not torch.equal(by_large, by_small)
    for scorer in (uncertain, router().score):
        all_ = routed_greedy(small.small, large.large, scorer, 0.0, LEVELS, users())
        assert torch.equal(all_.codes, by_large) and bool(all_.routed.all()) and all_.usage.share == 1.0
        large.asked.clear()
        none = routed_greedy(small.small, large.large, scorer, 1.01, LEVELS, users())
        assert torch.equal(none.codes, by_small) and not bool(none.routed.any())
        assert none.usage == Usage(steps=12 * LEVELS) and not large.asked  # the large model was never called


def test_each_code_is_what_its_model_says_of_the_whole_prefix():
    small, large = models()
    found = routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users())
    assert 0 < int(found.routed.sum()) < found.routed.numel()
    for user, level in itertools.product(range(12), range(LEVELS)):
        prefix = torch.cat((users()[user], found.codes[user, :level]))[None]
        logits, hidden = small.small(prefix)
        routed = bool(uncertain(hidden, logits.argmax(1), logits, torch.tensor([level])) >= 0.35)
        assert routed == bool(found.routed[user, level])
        logits = large.large(prefix) if routed else logits
        assert int(found.codes[user, level]) == int(logits.argmax())
    assert not torch.equal(found.codes, greedy(large, users())) and not torch.equal(found.codes, greedy(small, users()))


class Cached:
    """A large model that keeps its state of each user and reads only what it has not seen."""

    def __init__(self, inner: Toy) -> None:
        self.inner, self.kept, self.read, self.switches = inner, {}, 0, 0

    def __call__(self, prefixes: Tensor) -> Tensor:
        out = []
        for prefix in prefixes:
            length, state = self.kept.get(int(prefix[0]), (0, torch.zeros(WIDTH, dtype=torch.float64)))
            self.switches += len(prefix) - length > 1 or length == 0
            for place in range(length, len(prefix)):
                state = 0.7 * state + self.inner.code[place, prefix[place]]
                self.read += 1
            self.kept[int(prefix[0])] = (len(prefix), state)
            out.append(torch.tanh(state) @ self.inner.head)
        return torch.stack(out)


def test_a_large_model_with_a_cache_catches_up_and_its_reading_is_counted():
    small, large = models()
    cached = Cached(large)
    found = routed_greedy(small.small, cached, uncertain, 0.35, LEVELS, users())
    fresh = routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users())
    assert torch.equal(found.codes, fresh.codes) and found.usage == fresh.usage
    usage = found.usage
    assert usage.read == cached.read > usage.routed > usage.switches == cached.switches
    assert usage.routed == int(found.routed.sum()) and usage.steps == 12 * LEVELS
    assert usage.calls == int(found.routed.any(0).sum())


def test_activated_parameters():
    usage = Usage(steps=1000, routed=128)
    assert usage.active(1.5, 32.0) == pytest.approx(5.6, abs=0.01)  # the paper's 12.8 % and 5.6 billion
    assert Usage().active(1.5, 32.0) == 1.5


def test_less_is_routed_with_a_higher_threshold():
    """At the first level, whose prefixes are the same; later ones depend on what was routed before."""
    small, large = models()
    first = [routed_greedy(small.small, large.large, uncertain, t / 20, 1, users(40)).usage.routed for t in range(22)]
    assert first == sorted(first, reverse=True) and first[0] == 40 and first[-1] == 0 and len(set(first)) > 5


def test_the_same_model_twice_decides_nothing():
    small, _ = models()
    for theta in (0.0, 0.3, 1.1):
        assert torch.equal(routed_greedy(small.small, small.large, uncertain, theta, LEVELS, users()).codes, greedy(small, users()))


def test_a_user_does_not_depend_on_the_others_and_there_may_be_none():
    small, large = models()
    whole = routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users())
    again = routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users())
    assert torch.equal(whole.codes, again.codes) and whole.usage == again.usage
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users()[order]).codes, whole.codes[order])
    alone = routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users()[4:5])
    assert torch.equal(alone.codes[0], whole.codes[4]) and torch.equal(alone.routed[0], whole.routed[4])
    empty = routed_greedy(small.small, large.large, uncertain, 0.35, LEVELS, users(0))
    assert empty.codes.shape == (0, LEVELS) == empty.routed.shape and empty.usage.routed == 0
    assert routed_greedy(small.small, large.large, uncertain, 0.35, 0, users()).codes.shape == (12, 0)
    beams = routed_beam(small.small, large.large, uncertain, 0.35, LEVELS, users(), 3)
    assert torch.equal(routed_beam(small.small, large.large, uncertain, 0.35, LEVELS, users()[order], 3).codes, beams.codes[order])
    assert routed_beam(small.small, large.large, uncertain, 0.35, LEVELS, users(0), 3).codes.shape == (0, 3, LEVELS)


def test_bad_values_are_errors():
    small, large = models()
    with pytest.raises(ConfigError, match="the small model's 7 codes, got 5"):
        routed_greedy(small.small, lambda prefixes: large.large(prefixes)[:, :5], uncertain, 0.0, LEVELS, users())
    with pytest.raises(ConfigError, match="width: expected at least 1, got 0"):
        routed_beam(small.small, large.large, uncertain, 0.0, LEVELS, users(), 0)
    with pytest.raises(ConfigError, match=r"start: .* got \(12, 0\)"):
        routed_greedy(small.small, large.large, uncertain, 0.0, LEVELS, users()[:, :0])
    with pytest.raises(ConfigError, match="evaluation mode"):
        routed_greedy(small.small, large.large, router().train().score, 0.0, LEVELS, users())
    with pytest.raises(ConfigError, match="embedding: expected"):
        DivergenceRouter(WIDTH, torch.zeros(V, 3), DivergenceRouter.Config())


# --- beams


def routed_log_probs(small: Toy, large: Toy, theta: float, levels: int, user: int) -> dict[tuple[int, ...], float]:
    """Every sequence's score under the routed model, by the definition."""
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for level in range(levels):
        after = {}
        for codes, score in scores.items():
            prefix = torch.tensor([[user, *codes]])
            logits, hidden = small.small(prefix)
            if float(uncertain(hidden, logits.argmax(1), logits, torch.tensor([level]))) >= theta:
                logits = large.large(prefix)
            after |= {(*codes, code): score + float(p) for code, p in enumerate(logits[0].log_softmax(0))}
        scores = after
    return scores


@pytest.mark.parametrize("theta", [0.0, 0.35, 1.1])
def test_beams_of_full_width_find_the_best_of_all_sequences(theta):
    small, large = models()
    found = routed_beam(small.small, large.large, uncertain, theta, 3, users(4), V**2)
    assert found.codes.shape == (4, V**2, 3)
    for user in range(4):
        scores = routed_log_probs(small, large, theta, 3, user)
        best = sorted(scores, key=scores.__getitem__, reverse=True)[: V**2]
        assert [tuple(codes) for codes in found.codes[user].tolist()] == best
        assert found.scores[user].tolist() == pytest.approx([scores[codes] for codes in best])


def test_a_beam_of_one_is_greedy():
    small, large = models()
    for theta in (0.0, 0.35, 1.1):
        beam = routed_beam(small.small, large.large, uncertain, theta, LEVELS, users(), 1)
        one = routed_greedy(small.small, large.large, uncertain, theta, LEVELS, users())
        assert torch.equal(beam.codes[:, 0], one.codes) and beam.usage == one.usage


def test_beams_are_routed_each_by_itself_and_together_in_one_call():
    small, large = models()
    large.asked.clear()
    found = routed_beam(small.small, large.large, uncertain, 0.35, LEVELS, users(), 5)
    assert found.usage.calls == len(large.asked) <= LEVELS and found.usage.routed == sum(len(asked) for asked in large.asked)
    assert found.usage.steps == 12 * (1 + 5 * (LEVELS - 1)) > found.usage.routed > 0
    assert any(0 < beams < 5 for beams in torch.bincount(large.asked[1][:, 0]).tolist())  # some beams of a user, and others not


def test_codes_that_cannot_follow_are_never_taken():
    small, large = models()

    def masked(logits: Tensor, prefixes: Tensor) -> Tensor:
        """After the code 0 only 1 may follow, and two codes in all at the first level."""
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if prefixes.shape[1] == 1:
            allowed[:, 2:] = False
        allowed[(prefixes[:, -1] == 0) & (prefixes.shape[1] > 1)] = torch.arange(V) == 1
        return logits.masked_fill(~allowed, -torch.inf)

    def small_step(prefixes: Tensor) -> tuple[Tensor, Tensor]:
        logits, hidden = small.small(prefixes)
        return masked(logits, prefixes), hidden

    def large_step(prefixes: Tensor) -> Tensor:
        return masked(large.large(prefixes), prefixes)

    for theta in (0.0, 0.35, 1.1):
        found = routed_beam(small_step, large_step, uncertain, theta, 2, users(), 20)
        alive = found.scores > -torch.inf
        assert alive.sum(1).tolist() == [1 + V] * 12 and not bool(found.scores.isnan().any())
        codes = found.codes[alive]
        assert bool((codes[:, 0] < 2).all()) and bool((codes[codes[:, 0] == 0, 1] == 1).all())
        assert found.usage.steps == 12 * 3  # dead beams are neither counted nor routed
        assert theta != 0.0 or found.usage.routed == 12 * 3
    codes = routed_greedy(small_step, large_step, router().score, 0.5, LEVELS, users()).codes
    assert bool((codes[:, 0] < 2).all())


# --- labels


def by_definition(small: Toy, large: Toy, user: int, same) -> list[bool]:
    item, labels = greedy(large, users()[user : user + 1])[0], []
    for level in range(LEVELS):
        code = int(small.large(torch.cat((torch.tensor([user]), item[:level]))[None]).argmax())
        if code == int(item[level]):
            labels.append(False)
            continue
        other = [*item[:level].tolist(), code]
        while len(other) < LEVELS:
            other.append(int(large.large(torch.tensor([[user, *other]])).argmax()))
        labels.append(not bool(same(torch.tensor([other]), item[None])[0]))
    return labels


def same_cluster(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, 0] == b[:, 0]) & (a[:, 1] % 2 == b[:, 1] % 2)


def test_labels_are_what_the_definition_says():
    small, large = models()
    found = label_steps(small.small, large.large, LEVELS, users(), same_cluster)
    labels = found.label.view(LEVELS, 12).T
    expected = torch.tensor([by_definition(small, large, user, same_cluster) for user in range(12)])
    assert torch.equal(labels, expected) and 0 < int(expected.sum()) < expected.numel()
    item = greedy(large, users())
    differs = item != found.code.view(LEVELS, 12).T
    assert not bool((labels & ~differs).any()) and bool((differs & ~labels).any())  # identical is never positive; neutral ones exist
    assert found.level.view(LEVELS, 12)[:, 0].tolist() == list(range(LEVELS))
    for level in range(LEVELS):
        logits, hidden = small.small(torch.cat((users(), item[:, :level]), 1))
        own = slice(12 * level, 12 * level + 12)
        assert torch.equal(found.hidden[own], hidden) and torch.equal(found.code[own], logits.argmax(1))
        assert torch.equal(found.logits[own], logits.sort(1, descending=True).values)
    anything = label_steps(small.small, large.large, LEVELS, users(), lambda a, b: torch.ones(len(a), dtype=torch.bool))
    assert not bool(anything.label.any())
    strict = label_steps(small.small, large.large, LEVELS, users(), lambda a, b: (a == b).all(1), top=3)
    assert torch.equal(strict.label.view(LEVELS, 12).T, differs) and strict.logits.shape == (LEVELS * 12, 3)


def test_equal_models_give_no_positives_and_no_users_no_steps():
    _, large = models()
    assert not bool(label_steps(large.small, large.large, LEVELS, users(), same_cluster).label.any())
    assert label_steps(large.small, large.large, LEVELS, users(0), same_cluster).label.shape == (0,)


# --- router


@torch.no_grad()
def test_the_router_is_the_papers_network():
    found = router()
    hidden, logits = torch.randn(5, WIDTH, dtype=torch.float64), torch.randn(5, V, dtype=torch.float64)
    code, level = logits.argmax(1), torch.tensor([0, 1, 2, 3, 1])
    x = torch.cat((hidden, found.embedding[level, code], found.project(logits.sort(1, descending=True).values)), 1)
    first, *blocks, norm, last = found.network
    x = first(x)
    assert len(blocks) == 2 and len(DivergenceRouter(WIDTH, torch.zeros(1, V, 3), DivergenceRouter.Config(width=8)).network) == 6 + 3
    for block in blocks:
        before, up, gelu, _, down, _ = block.network
        x = x + down(gelu(up(before(x))))
    expected = last(norm(x))[:, 0]
    torch.testing.assert_close(found(hidden, code, logits, level), expected, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(found.score(hidden, code, logits, level), expected.sigmoid(), rtol=0.0, atol=1e-10)


@torch.no_grad()
def test_the_router_sees_the_code_that_was_taken_and_its_level():
    found, hidden, logits = router(), torch.zeros(1, WIDTH, dtype=torch.float64), torch.zeros(1, V, dtype=torch.float64)
    scores = {float(found(hidden, torch.tensor([c]), logits, torch.tensor([v]))) for c in range(V) for v in range(LEVELS)}
    assert len(scores) == V * LEVELS
    shared = router(levels=1)
    assert float(shared(hidden, torch.tensor([2]), logits, torch.tensor([3]))) == float(
        shared(hidden, torch.tensor([2]), logits, torch.tensor([0]))
    )


@torch.no_grad()
def test_the_largest_logits_are_enough_and_may_be_minus_infinity():
    found = router(top=3)
    hidden, logits = torch.randn(4, WIDTH, dtype=torch.float64), torch.randn(4, V, dtype=torch.float64)
    code, level = logits.argmax(1), torch.zeros(4, dtype=torch.long)
    assert torch.equal(found(hidden, code, logits, level), found(hidden, code, logits.topk(3).values, level))
    impossible = logits.clone().scatter_(1, logits.topk(V - 2, largest=False).indices, -torch.inf)
    least = logits.topk(2).values
    filled = torch.cat((least, least[:, 1:]), 1)
    assert torch.equal(found(hidden, code, impossible, level), found(hidden, code, filled, level))
    assert bool(found(hidden, code, torch.full_like(logits, -torch.inf), level).isfinite().all())


def test_embeddings_are_kept_and_gradients_are_right():
    found = router(dropout=0.0)
    assert "embedding" not in dict(found.named_parameters()) and "embedding" in found.state_dict()
    hidden = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, V, dtype=torch.float64, requires_grad=True)
    level = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(lambda h, z: found(h, torch.tensor([1, 4]), z, level), (hidden, logits))


def test_the_loss_weighs_positives():
    label, logits = torch.tensor([True, False, False, False]), torch.randn(4, dtype=torch.float64)
    assert float(positive_weight(label)) == 3.0 and float(positive_weight(label, 0.5)) == 1.5
    assert float(positive_weight(label[1:])) == 1.0 == float(positive_weight(label[:1])) == float(positive_weight(label[:0]))
    expected = -(3 * F.logsigmoid(logits[0]) + F.logsigmoid(-logits[1:]).sum()) / 4
    torch.testing.assert_close(router_loss(logits, label, positive_weight(label)), expected)


def test_the_baselines():
    logits = torch.randn(6, 15, dtype=torch.float64) * 2
    nothing = (torch.empty(6, 0), torch.zeros(6).long(), logits, torch.zeros(6).long())
    torch.testing.assert_close(entropy_scorer(*nothing), torch.distributions.Categorical(logits=logits).entropy())
    aleatoric, epistemic = logit_uncertainty(logits)
    for n in range(6):
        x = sorted(max(0.0, float(z)) for z in logits[n].topk(10).values)
        total = sum(x)
        assert float(aleatoric[n]) == pytest.approx(-sum(e / total * (digamma(e + 1) - digamma(total + 1)) for e in x))
        assert float(epistemic[n]) == pytest.approx(10 / (total + 10))
    assert torch.equal(aleatoric_scorer(*nothing), aleatoric)
    certain, none = torch.tensor([[9.0] + [-torch.inf] * 4]), torch.full((1, 5), -3.0)
    assert float(entropy_scorer(certain, certain, certain, certain)) == 0.0
    assert [float(part) for part in logit_uncertainty(certain)] == pytest.approx([0.0, 5 / 14], abs=1e-6)
    assert [float(part) for part in logit_uncertainty(none)] == [0.0, 1.0]


def test_a_router_learns_and_its_threshold_finds_the_wanted_share_of_positives():
    torch.manual_seed(0)
    large = Toy(0, start=2)
    small = Toy(1, large, 0.5, start=2)
    start = torch.stack((torch.arange(40).repeat_interleave(40), torch.arange(40).repeat(40)), 1)
    start = start[torch.randperm(1600)]
    train, held_out = (label_steps(small.small, large.large, LEVELS, part, same_cluster) for part in (start[:1200], start[1200:]))
    embedding = torch.randn(LEVELS, V, 4, dtype=torch.float64)
    found = DivergenceRouter(WIDTH, embedding, DivergenceRouter.Config(width=24, blocks=3, dropout=0.0)).double()
    optimizer, weight = torch.optim.AdamW(found.parameters(), lr=4e-3, weight_decay=5e-4), positive_weight(train.label)
    assert 0.02 < float(train.label.double().mean()) < 0.4
    for _ in range(50):
        picked = torch.randint(len(train.label), (256,))
        optimizer.zero_grad()
        logits = found(train.hidden[picked], train.code[picked], train.logits[picked], train.level[picked])
        router_loss(logits, train.label[picked], weight).backward()
        optimizer.step()
    p = found.eval().score(held_out.hidden, held_out.code, held_out.logits, held_out.level)
    assert roc_auc_score(held_out.label, p) > 0.65
    theta = threshold_for_recall(p, held_out.label, 0.95)
    assert float((p[held_out.label] >= theta).double().mean()) >= 0.95 and float((p >= theta).double().mean()) < 0.95
    decoded = routed_greedy(small.small, large.large, found.score, theta, LEVELS, start[1200:])
    item = greedy(large, start[1200:])
    assert 0.0 < decoded.usage.share < 1.0
    kept = float(same_cluster(decoded.codes, item).double().mean())
    assert kept > float(same_cluster(greedy(small, start[1200:]), item).double().mean()) + 0.05
