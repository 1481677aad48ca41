# SPDX-License-Identifier: Apache-2.0
"""Choices in front of a model, on planted histories: ToDRE, IDPruner, CaCoVID and QuoTA beside top-k, chance and even shares."""

import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.frame import Check
from benchmarks.token_efficiency.pruning_needles import seeded
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.pruning.cacovid import (
    CaCoVIDScorer,
    GroupedSubsetSampler,
    PlainSubsetSampler,
    PolicyTraining,
    SubsetSampler,
    train_policy,
)
from recsys.efficiency.pruning.idpruner import IDPruner, hopkins, importance_retention
from recsys.efficiency.pruning.quota import QuotaAllocator
from recsys.efficiency.pruning.todre import DiverseRetention, coverage_radius
from recsys.efficiency.scoring import ContextSimilarity, TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import MMR, ranks
from recsys.efficiency.view import TokenView

# ToDRE

POINTS, CLUSTERS, KEPT = 400, 16, 32


def clustered(seed: int, rows: int = 8) -> TokenView:
    """Rows of 400 points around 16 directions, the largest with a third of them and the smallest with a few."""
    generator = seeded(seed)
    centers = F.normalize(torch.randn(rows, CLUSTERS, 16, generator=generator), dim=2)
    share = (1 / torch.arange(1, CLUSTERS + 1).double() ** 1.5).expand(rows, -1)
    drawn = torch.multinomial(share, POINTS - CLUSTERS, replacement=True, generator=generator)
    cluster = torch.cat((torch.arange(CLUSTERS).expand(rows, -1), drawn), 1)
    points = centers.gather(1, cluster[..., None].expand(-1, -1, 16)) + 0.05 * torch.randn(rows, POINTS, 16, generator=generator)
    return TokenView.padded(points, torch.full((rows,), POINTS))


def todre(seeds: range) -> tuple[Row, Check]:
    """The coverage radius of 32 of 400 points: k-center, max-sum and chance."""
    selectors = {name: MMR.Config(importance=0.0, similarity=name) for name in ("nearest", "total")}
    pruning = {
        name: DiverseRetention(DiverseRetention.Config(events=KEPT, recent=0, selector=selector)) for name, selector in selectors.items()
    }
    radii: dict[str, list[float]] = {"nearest": [], "total": [], "random": []}
    for seed in seeds:
        view = clustered(seed)
        drawn = torch.rand(len(view.values), generator=seeded(30_000 + seed))
        chosen = {name: own(view) for name, own in pruning.items()}
        chosen["random"] = RowSelection.of_mask(ranks(drawn, view.offsets) < KEPT, view.offsets)
        for name, own in chosen.items():
            radii[name].append(float(coverage_radius(view, own).mean()))
    means = {name: statistics.fmean(own) for name, own in radii.items()}
    told = f"k-center {means['nearest']:.2f}, max-sum {means['total']:.2f}, random {means['random']:.2f}"
    row = Row(
        "todre",
        f"{KEPT} of {POINTS} points in {CLUSTERS} clusters of very different sizes",
        means["random"] / means["nearest"],
        "coverage radius",
        None,
        "2.6 of time at 95.0% of quality, 10% kept, LLaVA-NeXT-7B",
        told,
    )
    worst = max(a / b for a, b in zip(radii["nearest"], radii["random"], strict=True))
    note = f"chord distance, mean over 8 rows and {len(seeds)} seeds: {told}; worst seed {worst:.3f}"
    return row, Check("kcenter_radius", round(means["nearest"] / means["random"], 4), at_most=0.5, note=note)


# IDPruner

EVENTS, TASTES, BUDGET = 400, 24, 40


@dataclass(frozen=True)
class Tastes:
    """Users with tastes of very different weights.

    Attributes:
        view: the events of each history, with the last one as context.
        category: int64 ``[B, N]`` of each event.
        future: float ``[B, C]``, how many of the next 50 events are of each category.
    """

    view: TokenView
    category: Tensor
    future: Tensor


def tastes(seed: int, rows: int = 16) -> Tastes:
    """Past and future events drawn from the same tastes, each around its category's vector."""
    generator = seeded(seed)
    weights = torch.rand(rows, TASTES, generator=generator) ** 3
    centers = torch.randn(TASTES, 16, generator=generator)
    category = torch.multinomial(weights, EVENTS, replacement=True, generator=generator)
    values = centers[category] + 0.5 * torch.randn(rows, EVENTS, 16, generator=generator)
    later = torch.multinomial(weights, 50, replacement=True, generator=generator)
    future = torch.zeros(rows, TASTES).scatter_add(1, later, torch.ones(rows, 50))
    view = TokenView.padded(values, torch.full((rows,), EVENTS))
    return Tastes(replace(view, context=values[:, -1:]), category, future)


def covered(drawn: Tastes, chosen: RowSelection) -> float:
    """The share of the future events whose category is among the kept ones."""
    kept = chosen.mask().view_as(drawn.category).float()
    there = torch.zeros_like(drawn.future).scatter_add(1, drawn.category, kept) > 0
    return float(((drawn.future * there).sum(1) / drawn.future.sum(1)).mean())


def idpruner(seeds: range) -> tuple[Row, Check]:
    """Importance (of the future, which the score only guesses) and spread (1 - Hopkins) at equal K, beside top-k of the same scores."""
    trade_offs = {"mmr": 0.5, "top_k": 1.0}
    pruning = {
        name: IDPruner(IDPruner.Config(events=BUDGET, recent=1, selector=MMR.Config(importance=weight)))
        for name, weight in trade_offs.items()
    }
    importance: dict[str, list[float]] = {"mmr": [], "top_k": []}
    spread: dict[str, list[float]] = {"mmr": [], "top_k": []}
    retained = []
    for seed in seeds:
        drawn = tastes(seed)
        for name, own in pruning.items():
            chosen = own(drawn.view)
            importance[name].append(covered(drawn, chosen))
            spread[name].append(1 - float(hopkins(drawn.view, chosen, seed).mean()))
            if name == "mmr":
                scores = ContextSimilarity(ContextSimilarity.Config()).score(drawn.view).clamp(min=0)
                retained.append(float(importance_retention(chosen, scores).mean()))
    margins = [[a - b for a, b in zip(own["mmr"], own["top_k"], strict=True)] for own in (importance, spread)]
    above = all(margin > 0 for own in margins for margin in own)
    means = {name: (statistics.fmean(importance[name]), statistics.fmean(spread[name])) for name in trade_offs}
    row = Row(
        "idpruner",
        f"{BUDGET} of {EVENTS} events, {TASTES} categories, scores: similarity with the last event, lambda 0.5",
        means["mmr"][0] / means["top_k"][0],
        "future events in kept categories",
        beside(lambda: pruning["mmr"](drawn.view), lambda: pruning["top_k"](drawn.view)),
        "86.47% of quality at 90% pruned beside 85.39% by importance alone, Qwen2.5-VL-7B",
        f"covered {means['mmr'][0]:.3f} beside {means['top_k'][0]:.3f}, spread {means['mmr'][1]:.3f} beside {means['top_k'][1]:.3f}",
    )
    note = (
        f"1 where both are above top-k for each of {len(seeds)} seeds. Importance is what it is kept for, the share of future events "
        f"whose category is kept: by at least {min(margins[0]):.3f}; spread is 1 - Hopkins: by at least {min(margins[1]):.3f}. Of the "
        f"scores' own sum, of which nothing can keep more than top-k, {statistics.fmean(retained):.3f} is kept"
    )
    return row, Check("idpruner_frontier", float(above), at_least=1.0, note=note)


# CaCoVID


def planted(kinds: Tensor, generator: torch.Generator, rows: int = 4, length: int = 48, count: int = 4) -> tuple[TokenView, Tensor]:
    """Rows of noisy tokens of several kinds, and which are of kind 0, the planted one; the context looks like kind 1."""
    place = torch.rand(rows, length, generator=generator).argsort(1) < count
    kind = torch.where(place, 0, 1 + torch.randint(len(kinds) - 1, (rows, length), generator=generator))
    values = kinds[kind] + 0.3 * torch.randn(rows, length, kinds.shape[1], generator=generator)
    view = TokenView.padded(values, torch.full((rows,), length), context=kinds[1].expand(rows, 1, -1))
    return view, place.flatten().float()


@torch.no_grad()
def recall(scorer: TokenScorer, view: TokenView, wanted: Tensor, k: int = 4) -> float:
    """The share of the planted tokens among the k best of each row."""
    kept = ranks(scorer.score(view), view.offsets) < k
    return float((kept * wanted).sum() / wanted.sum())


def _solved(wanted: Tensor, chosen: RowSelection) -> Tensor:
    return (chosen.recall(wanted) >= 0.75).float()


def evaluations(sampler: SubsetSampler, seed: int, at_most: int) -> tuple[int, float, float]:
    """Rows that the model is run for until the policy finds 0.9 of the planted tokens of other rows, or ``at_most`` steps are over.

    A row is solved, reward 1, where three of its four planted tokens are kept. Also the recall reached, and that of similarity with the
    context.
    """
    generator = seeded(seed)
    kinds = torch.randn(8, 32, generator=generator)
    torch.manual_seed(seed)
    policy = CaCoVIDScorer(CaCoVIDScorer.Config(dim=32, heads=2, hidden=64))
    held_out, wanted = planted(kinds, generator, rows=32)
    optimizer, config = torch.optim.Adam(policy.parameters(), lr=3e-3), PolicyTraining(rollouts=16, solved=None)
    total, found = 0, 0.0
    for _ in range(at_most):
        view, own = planted(kinds, generator)
        step = train_policy(policy, view, partial(_solved, own), optimizer, torch.full((4,), 4), config, sampler, generator)
        total += step.evaluations
        found = recall(policy, held_out, wanted)
        if found >= 0.9:
            break
    return total, found, recall(ContextSimilarity(ContextSimilarity.Config()), held_out, wanted)


def cacovid(seeds: range, at_most: int) -> tuple[Row, Check]:
    """Evaluations of the frozen model until the planted tokens are found, grouped sampling beside plain."""
    samplers = {"grouped": GroupedSubsetSampler(), "plain": PlainSubsetSampler()}
    runs = {name: [evaluations(sampler, seed, at_most) for seed in seeds] for name, sampler in samplers.items()}
    totals = {name: sum(run[0] for run in own) for name, own in runs.items()}
    reached = {name: sum(run[1] >= 0.9 for run in own) for name, own in runs.items()}
    similarity = statistics.fmean(run[2] for run in runs["grouped"])
    row = Row(
        "cacovid",
        "4 planted of 48 tokens, reward 1 where 3 are kept, until recall 0.9 on other rows",
        totals["plain"] / totals["grouped"],
        "model evaluations",
        None,
        "96.1% of quality at 10% kept, 2.7 of prefill, LLaVA-OneVision-7B; sampling not measured alone",
        f"recall {statistics.fmean(run[1] for run in runs['grouped']):.2f}, similarity with the context {similarity:.2f}",
    )
    each = ", ".join(f"{a[0]} to {b[0]}" for a, b in zip(runs["grouped"], runs["plain"], strict=True))
    note = (
        f"model evaluations, grouped over plain, summed over {len(seeds)} seeds ({each}); recall 0.9 within {at_most} steps by "
        f"{reached['grouped']} grouped and {reached['plain']} plain runs, the others count what they took"
    )
    return row, Check("cacovid_samples", round(totals["grouped"] / totals["plain"], 4), at_most=0.999, note=note)


# QuoTA

SESSIONS, EACH, RELEVANT, QUOTA = 40, 12, 6, 96


def sessions(seed: int) -> tuple[TokenView, Tensor, Tensor]:
    """A history of 40 sessions of 12 noisy events, of which 6 sessions are of the query's kind; the session of each event, and these 6."""
    generator = seeded(seed)
    query, others = torch.randn(16, generator=generator), torch.randn(SESSIONS, 16, generator=generator)
    relevant = torch.rand(SESSIONS, generator=generator).argsort() < RELEVANT
    kind = torch.where(relevant[:, None], query, others)
    session = torch.arange(SESSIONS).repeat_interleave(EACH)
    values = kind[session] + 2.0 * torch.randn(len(session), 16, generator=generator)
    return TokenView.of(values, torch.tensor([0, len(session)]), context=query[None, None]), session, relevant


def quota(seeds: range) -> tuple[Row, Check]:
    """How much of an equal budget goes to the relevant sessions, by the square of their relevance and evenly."""
    shares: dict[float, list[float]] = {2.0: [], 0.0: []}
    for seed in seeds:
        view, session, relevant = sessions(seed)
        for exponent, own in shares.items():
            quotas = QuotaAllocator(QuotaAllocator.Config(events=QUOTA, exponent=exponent)).quotas(view, session)
            assert int(quotas.sum()) == QUOTA
            own.append(float(quotas[relevant].sum()) / QUOTA)
    ours, even = (statistics.fmean(own) for own in shares.values())
    row = Row(
        "quota",
        f"{QUOTA} of {SESSIONS * EACH} events, {RELEVANT} of {SESSIONS} sessions relevant",
        ours / even,
        "budget in relevant sessions",
        None,
        "+3.2% mean of six benchmarks at equal budget, LLaVA-Video-7B",
        f"{ours:.3f} of the budget, evenly {even:.3f}",
    )
    worst = min(a / b for a, b in zip(*shares.values(), strict=True))
    note = f"events, over {len(seeds)} seeds: {ours:.3f} of the budget beside {even:.3f}; worst seed {worst:.2f}"
    return row, Check("quota_relevant_share", round(ours / even, 4), at_least=1.001, note=note)


def measure(seeds: range, policies: range, at_most: int = 60) -> list[tuple[Row, Check]]:
    """The four; policies are trained for seeds of their own."""
    return [todre(seeds), idpruner(seeds), cacovid(policies, at_most), quota(seeds)]
