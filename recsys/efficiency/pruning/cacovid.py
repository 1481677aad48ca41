# SPDX-License-Identifier: Apache-2.0
"""CaCoVID: a small policy learns by trial which combinations of tokens help a frozen model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import TokenScorer, context_of
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import ranks
from recsys.efficiency.view import TokenView, group_means, held, offsets_of, row_of, to_padded

Reward: TypeAlias = Callable[[RowSelection], Tensor]
"""What the frozen model makes of each row's kept tokens, float ``[B]``; higher is better: log p of the true next item, hit@K, …"""


@register("token_scorer", "cacovid")
class CaCoVIDScorer(TokenScorer):
    """The policy: how much likelier a token is kept than dropped, judged together with the context.

    §4 of the specification. Non-causal transformer layers over ``[context; tokens]``, then RMS norm and an MLP whose widths halve four
    times down to two logits; their difference is the score. The paper starts from a layer of its language model, whose rotary positions
    tell it the order; here the layers are new, order comes in only by the tokens' vectors, and a learned vector marks the context. The
    paper's second head, on frames, which shares a budget out among them, is left to the budget allocators.
    """

    class Config(BaseConfig):
        """The network.

        Attributes:
            dim: d of tokens and context.
            heads: of the attention; divides ``dim``.
            layers: how many.
            hidden: width of the feed-forward networks; 4 d if null.
        """

        name: Literal["cacovid"] = "cacovid"
        dim: int = Field(ge=1)
        heads: int = Field(4, ge=1)
        layers: int = Field(1, ge=1)
        hidden: int | None = Field(None, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.dim % config.heads:
            raise ConfigError(f"token_scorer 'cacovid': heads: expected a divisor of dim={config.dim}, got {config.heads}")
        self.config = config
        self.mark = nn.Parameter(torch.randn(config.dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.dim, config.heads, config.hidden or 4 * config.dim, dropout=0.0, activation=F.silu, batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        widths = [max(config.dim >> halvings, 2) for halvings in range(5)]
        inner = [layer for enter, leave in pairwise(widths) for layer in (nn.Linear(enter, leave), nn.SiLU())]
        self.head = nn.Sequential(nn.RMSNorm(config.dim), *inner, nn.Linear(widths[-1], 2))

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """The logit of keeping each token; its sigmoid is the probability.

        Raises:
            ConfigError: there is no context.
            DataError: tokens or context are not of width ``dim``, or the context has no token.
        """
        context = context_of(view, "token_scorer 'cacovid'")
        if not context.shape[1]:
            raise DataError(f"context: expected [B, M, d] with M of at least 1, got {tuple(context.shape)}")
        if view.values.shape[1] != self.config.dim or context.shape[2] != self.config.dim:
            raise DataError(f"values: expected tokens and context of {self.config.dim}, got {view.values.shape[1]} and {context.shape[2]}")
        if not len(view.values):
            return view.values.new_zeros(0)
        tokens_bld = to_padded(view.values, view.offsets)
        inside = held(view.lengths, tokens_bld.shape[1])
        x = torch.cat((context + self.mark, tokens_bld), 1)
        padding = F.pad(~inside, (context.shape[1], 0), value=False)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        logits: Tensor = self.head(x[:, context.shape[1] :][inside])
        return logits[:, 1] - logits[:, 0]


def capped_probabilities(mass: Tensor, present: Tensor, share: float = 2.0) -> Tensor:
    """Probabilities in proportion to mass, none above ``max(min(share / G, .9), .1)``; what is above goes to the others, in proportion.

    The fixed point of the recursive redistribution, found at once. Where one group is all there is, its probability is 1.

    Args:
        mass: ``[B, G]``, at least 0.
        present: bool ``[B, G]``: the groups that each row has, at least one.
        share: c, at least 1: how much likelier than the mean a group can be.

    Returns:
        float64 ``[B, G]``; each row sums to 1. A group with more mass is never less likely.
    """
    if share < 1.0:
        raise ConfigError(f"capped_probabilities: share: expected at least 1, got {share!r}")
    count = present.sum(-1, keepdim=True)
    cap = torch.where(count > 1, (share / count.double()).clamp(max=0.9).clamp(min=0.1), 1.0)
    weight = torch.where(present, mass.double(), 0.0)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    weight = torch.where(present, weight.clamp(min=1e-30), 0.0)
    ordered = weight.sort(-1, descending=True).values
    rest = ordered.flip(-1).cumsum(-1).flip(-1)
    level = (1 - torch.arange(mass.shape[-1], device=mass.device) * cap) / rest  # where the first j groups are at the cap
    fits = ordered * level <= cap * (1 + 1e-12)
    first = fits.long().argmax(-1, keepdim=True)
    return torch.minimum(weight * level.gather(-1, first), cap)


class SubsetSampler(ABC):
    """Draws subsets of a row's tokens, which the policy learns from."""

    @torch.no_grad()
    def sample(
        self, scores: Tensor, offsets: Tensor, k: Tensor, rollouts: int, generator: torch.Generator | None = None, best_first: bool = True
    ) -> Tensor:
        """bool ``[R, S]``: exactly ``k[b]`` tokens of row b in each rollout.

        Args:
            scores: ``[S]``, logits of keeping; compared within a row.
            offsets: int64 ``[B + 1]``.
            k: int64 ``[B]``, 0 to the row's length.
            rollouts: R.
            generator: of the draws, which are the same for the same generator and batch.
            best_first: whether the first rollout is the k highest instead of a draw.

        Raises:
            ConfigError: ``k`` is out of its range, or there are no rollouts.
        """
        if rollouts < 1:
            raise ConfigError(f"sample: rollouts: expected at least 1, got {rollouts}")
        _check_counts(k, offsets)
        logits_bl, rank_bl = to_padded(scores.double(), offsets, fill=-torch.inf), to_padded(ranks(scores, offsets), offsets)
        inside = held(offsets[1:] - offsets[:-1], logits_bl.shape[1])
        weights_rbl = self.log_weights(logits_bl, rank_bl, k, rollouts, generator)
        noise = logits_bl.new_empty(rollouts, *logits_bl.shape).exponential_(generator=generator)
        keys = weights_rbl - noise.clamp(min=torch.finfo(torch.float64).tiny).log()
        first = torch.arange(keys.shape[-1], device=k.device) < k[:, None]
        kept = torch.zeros_like(keys, dtype=torch.bool).scatter(-1, keys.argsort(-1, descending=True), first.expand_as(keys))
        if best_first:
            kept[0] = inside & (rank_bl < k[:, None])
        return kept[:, inside]

    @abstractmethod
    def log_weights(self, logits: Tensor, rank: Tensor, k: Tensor, rollouts: int, generator: torch.Generator | None) -> Tensor:
        """Log weights ``[R or 1, B, L]`` of draws without replacement, minus infinity for what cannot be drawn.

        Args:
            logits: float64 ``[B, L]``, minus infinity for padding.
            rank: int64 ``[B, L]``, 0 for a row's highest.
            k: see `sample`.
            rollouts: R.
            generator: see `sample`.
        """


class PlainSubsetSampler(SubsetSampler):
    """Draws from the whole row, by the softmax of its scores: what grouped sampling is compared with."""

    def log_weights(self, logits: Tensor, rank: Tensor, k: Tensor, rollouts: int, generator: torch.Generator | None) -> Tensor:
        """See `SubsetSampler.log_weights`."""
        return logits[None]


class GroupedSubsetSampler(SubsetSampler):
    """Draws from one neighbourhood of similar scores: G groups are explored instead of all combinations.

    A row of N tokens in descending order is cut into ``G = max(⌊N / (g k)⌋, 1)`` equal groups; a group is drawn by its capped share of the
    probability, and within it k tokens by theirs, clamped to ``[½, 2] / |group|``. Where N is no multiple of G, sizes differ by one.

    Args:
        spread: g, at least 1: tokens of a group for each one that is kept.
        share: c of `capped_probabilities`.
    """

    def __init__(self, spread: float = 2.0, share: float = 2.0) -> None:
        if spread < 1.0:
            raise ConfigError(f"spread: expected at least 1, got {spread!r}")
        self.spread, self.share = spread, share

    def log_weights(self, logits: Tensor, rank: Tensor, k: Tensor, rollouts: int, generator: torch.Generator | None) -> Tensor:
        """See `SubsetSampler.log_weights`."""
        inside = logits > -torch.inf
        lengths = inside.sum(1)
        groups = torch.where(k > 0, lengths / (self.spread * k.clamp(min=1)), 1.0).floor().long().clamp(min=1)
        group = rank * groups[:, None] // lengths.clamp(min=1)[:, None]
        weight = torch.where(inside, (logits - logits.amax(1, keepdim=True)).exp(), 0.0) if logits.shape[1] else logits
        width = int(groups.max()) if len(groups) else 0
        mass, sizes = (logits.new_zeros(len(k), width).scatter_add(1, group, x) for x in (weight, inside.to(logits.dtype)))
        drawn = self._drawn(mass, groups, rollouts, generator)
        within = weight / mass.gather(1, group).clamp(min=torch.finfo(mass.dtype).tiny)
        mean = 1 / sizes.gather(1, group).clamp(min=1)
        within = torch.minimum(torch.maximum(within, mean / 2), mean * 2).log()
        return torch.where(inside & (group == drawn[..., None]), within, -torch.inf)

    def _drawn(self, mass: Tensor, groups: Tensor, rollouts: int, generator: torch.Generator | None) -> Tensor:
        """int64 ``[R, B]``: the group of each row in each rollout."""
        if not len(groups):
            return groups.new_zeros(rollouts, 0)
        probabilities = capped_probabilities(mass, held(groups, mass.shape[1]), self.share)
        return probabilities.multinomial(rollouts, replacement=True, generator=generator).t()


class PolicyTraining(BaseConfig):
    """How a policy learns.

    Attributes:
        rollouts: subsets tried in each pass.
        passes: over the same rows, with what was tried before kept; the old policy draws them all, and each is followed by a step.
        eps_low: how far below 1 a ratio of probabilities still moves the policy.
        eps_high: how far above.
        kl: weight of the divergence from keeping each token with probability ½.
        solved: rows whose reward with no free token kept is at least this teach nothing and are left out ("blind-answerable"); null for no
            such test, which costs one more evaluation.
        clip: of the gradient's norm.
    """

    rollouts: int = Field(23, ge=1)
    passes: int = Field(1, ge=1, le=5)
    eps_low: float = Field(0.2, ge=0.0, lt=1.0)
    eps_high: float = Field(0.28, ge=0.0)
    kl: float = Field(0.0, ge=0.0)
    solved: float | None = 1.0
    clip: float = Field(5.0, gt=0.0)


def advantages(rewards: Tensor) -> Tensor:
    """``(R − mean) / (std + 1e-4)`` over the rollouts ``[R, B]`` of each row; exactly 0 where all are the same."""
    shifted = rewards - rewards[:1]
    return (shifted - shifted.mean(0)) / (shifted.std(0, correction=0) + 1e-4)


def policy_loss(
    logits: Tensor, old: Tensor, kept: Tensor, advantage: Tensor, offsets: Tensor, config: PolicyTraining, used: Tensor | None = None
) -> Tensor:
    """The clipped policy gradient, each token's choice taken as a Bernoulli draw of its own.

    The release's. It leaves out that choices without replacement hang together: biased, and works. Kept and dropped tokens of a row weigh
    the same together, ``1 − k/N`` and ``k/N`` each. The divergence from ½ is the exact one; the release estimates it from the choices.

    Args:
        logits: ``[S]`` of keeping.
        old: ``[S]``, the logits of the policy that drew, without gradient.
        kept: bool ``[R, S]``.
        advantage: ``[R, B]``.
        offsets: int64 ``[B + 1]``.
        config: ε and the divergence's weight.
        used: bool ``[B]``, the rows that count; None for all.
    """
    rows, count, lengths = row_of(offsets), len(offsets) - 1, (offsets[1:] - offsets[:-1]).clamp(min=1)
    used = torch.ones(count, dtype=torch.bool, device=offsets.device) if used is None else used
    ratio = (_chosen(logits, kept) - _chosen(old, kept)).exp()
    gain = advantage[:, rows]
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * gain)
    share = (_row_sums(kept.to(loss.dtype), rows, count) / lengths)[:, rows]
    weights = torch.where(kept, 1 - share, share)
    each = _row_sums(loss * weights, rows, count) / _row_sums(weights, rows, count).clamp(min=1e-7)
    if config.kl:
        away = logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits) + math.log(2)
        each = each + config.kl * _row_sums(away[None], rows, count) / lengths
    return (each * used).sum() / (len(kept) * used.sum()).clamp(min=1)


@dataclass(frozen=True)
class PolicyStep:
    """What came of one call of `train_policy`.

    Attributes:
        loss: of the last pass.
        rewards: float ``[R, B]``, of all rollouts of all passes.
        used: bool ``[B]``, the rows that taught something: not empty, and not solved without a token.
        evaluations: rows that were tried, and those that were run for nothing but to see whether they are solved without a history.
    """

    loss: float
    rewards: Tensor
    used: Tensor
    evaluations: int


def train_policy(
    policy: TokenScorer,
    view: TokenView,
    reward: Reward,
    optimizer: torch.optim.Optimizer,
    k: Tensor,
    config: PolicyTraining | None = None,
    sampler: SubsetSampler | None = None,
    generator: torch.Generator | None = None,
) -> PolicyStep:
    """Try subsets of each row's free units, and move the policy towards those that helped.

    The view's context must not tell what the reward is measured by, and its rows must not be those that the policy is evaluated on.

    Args:
        policy: its scores are logits of keeping a token.
        view: groups are tried whole, protected tokens always kept.
        reward: of the frozen model, for one choice for all B rows.
        optimizer: of the policy.
        k: int64 ``[B]``, free units that are kept.
        config: see `PolicyTraining`.
        sampler: draws the subsets; `GroupedSubsetSampler` if None.
        generator: of the draws.

    Raises:
        ConfigError: ``k`` is out of its range.
        DataError: a reward is not a number, or there is not one for each row.
    """
    config, sampler = config or PolicyTraining(), sampler or GroupedSubsetSampler()
    trial = _Trial(view, reward)
    used = trial.offsets[1:] > trial.offsets[:-1]
    if config.solved is not None:
        used = used & (trial.rewards(trial.none())[0] < config.solved)
    _check_counts(k, trial.offsets)
    old, loss, kept, rewards = None, 0.0, trial.none()[:0], view.values.new_zeros(0, len(view))
    for number in range(config.passes if bool(used.any()) else 0):
        logits = trial.logits(policy)
        old = logits.detach() if old is None else old
        drawn = sampler.sample(old, trial.offsets, torch.where(used, k, 0), config.rollouts, generator, best_first=number == 0)
        kept, rewards = torch.cat((kept, drawn)), torch.cat((rewards, trial.rewards(drawn)))
        found = policy_loss(logits, old, kept, advantages(rewards), trial.offsets, config, used)
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), config.clip)
        optimizer.step()
        loss = float(found.detach())
    tried = len(kept) * int(used.sum()) + (len(view) if config.solved is not None else 0)
    return PolicyStep(loss, rewards, used, tried)


def adapted_share(share: float, accuracy: float) -> float:
    """The share of tokens that a row is tried with next: half where it is solved mostly (from .875), twice where hardly ever (to .125)."""
    if accuracy >= 0.875:
        return share / 2
    return min(2 * share, 1.0) if accuracy <= 0.125 else share


class _Trial:
    """The free units of a view, and the reward of keeping some of them."""

    def __init__(self, view: TokenView, reward: Reward) -> None:
        self.view, self.reward = view, reward
        self.units, self.unit = view.units()
        whole = torch.zeros(len(self.units.values), dtype=torch.bool, device=view.offsets.device)
        self.forced = whole if self.units.protected is None else self.units.protected
        self.free = (~self.forced).nonzero()[:, 0]
        self.offsets = offsets_of(torch.bincount(self.units.rows[self.free], minlength=len(view)))

    def logits(self, policy: TokenScorer) -> Tensor:
        """``[S]`` of the free units."""
        scores = policy.score(self.view)
        return (scores if self.view.groups is None else group_means(scores, self.unit, len(self.units.values)))[self.free]

    def none(self) -> Tensor:
        """bool ``[1, S]``: no free unit."""
        return torch.zeros(1, len(self.free), dtype=torch.bool, device=self.free.device)

    @torch.no_grad()
    def rewards(self, kept: Tensor) -> Tensor:
        """``[R, B]`` of bool ``[R, S]``."""
        found = torch.stack([self.reward(self._selection(one)) for one in kept]).to(self.view.values.dtype)
        if found.shape != (len(kept), len(self.view)) or bool(found.isnan().any()):
            raise DataError(f"reward: expected a number for each of the {len(self.view)} rows, got {tuple(found.shape[1:])}")
        return found

    def _selection(self, kept: Tensor) -> RowSelection:
        mask = self.forced.index_copy(0, self.free, kept)
        return RowSelection.of_mask(mask[self.unit], self.view.offsets)


def _check_counts(k: Tensor, offsets: Tensor) -> None:
    lengths = offsets[1:] - offsets[:-1]
    wrong = (k < 0) | (k > lengths)
    if bool(wrong.any()):
        b = int(wrong.long().argmax())
        raise ConfigError(f"k: row {b}: expected 0 to its {int(lengths[b])} free tokens or groups, got {int(k[b])}")


def _chosen(logits: Tensor, kept: Tensor) -> Tensor:
    """``[R, S]``: the log-probability of each choice."""
    return torch.where(kept, F.logsigmoid(logits), F.logsigmoid(-logits))


def _row_sums(x: Tensor, rows: Tensor, count: int) -> Tensor:
    return x.new_zeros(len(x), count).index_add(1, rows, x)
