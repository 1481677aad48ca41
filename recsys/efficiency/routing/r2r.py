# SPDX-License-Identifier: Apache-2.0
"""R2R: a small model generates, and a router hands the steps at which it would leave the large model's road to the large model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.routing.dispatch import Route, dispatch

SmallStep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From prefixes int64 ``[n, l]`` to logits ``[n, V]`` of the next code and the last hidden states ``[n, h]``."""

LargeStep = Callable[[Tensor], Tensor]
"""From prefixes int64 ``[n, l]`` to logits ``[n, V]`` of the next code, over the same V codes. A prefix begins with what tells whose it
is, be it the codes of a history or the number of a row; a model with a cache extends it by all codes that it has not seen."""


class StepScorer(Protocol):
    """Scores how much a small model's step needs the large model."""

    def __call__(self, hidden: Tensor, code: Tensor, logits: Tensor, level: Tensor) -> Tensor:
        """Scores ``[n]`` of states ``[n, h]``, proposed codes int64 ``[n]``, logits ``[n, V]`` and levels int64 ``[n]``."""
        ...


class _Block(nn.Module):
    def __init__(self, width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        inner = expansion * width
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.network(x)
        return added


class DivergenceRouter(nn.Module):
    """The probability that a step of the small model leads elsewhere than the large model would go.

    Pre-norm residual networks on ``[h ; E[y] ; W top-k logits]``: the state, the embedding of the code that was actually taken, and the
    largest logits in their order. A code that cannot follow has a logit of minus infinity; it counts as the least finite one.

    The paper has one vocabulary; item codes mean something else at each level, so the embeddings are looked up by level. W maps to the
    width of the state.

    Args:
        hidden: h, width of the small model's states.
        embedding: ``[levels, V, e]``, the small model's; kept as it is. ``[1, V, e]`` where all levels share it.
        config: size.
    """

    class Config(BaseConfig):
        """Size.

        Attributes:
            top: k of the logits; V where there are fewer.
            width: of the blocks.
            blocks: how many.
            expansion: of their hidden layer.
            dropout: in them.
        """

        name: Literal["r2r"] = "r2r"
        top: int = Field(100, ge=1)
        width: int = Field(1024, ge=1)
        blocks: int = Field(6, ge=1)
        expansion: int = Field(4, ge=1)
        dropout: float = Field(0.1, ge=0.0, lt=1.0)

    embedding: Tensor

    def __init__(self, hidden: int, embedding: Tensor, config: Config) -> None:
        super().__init__()
        if embedding.dim() != 3:
            raise ConfigError(f"embedding: expected [levels, V, e], got {tuple(embedding.shape)}")
        self.register_buffer("embedding", embedding.detach().clone())
        self.top = min(config.top, embedding.shape[1])
        self.project = nn.Linear(self.top, hidden)
        self.network = nn.Sequential(
            nn.Linear(2 * hidden + embedding.shape[2], config.width),
            *(_Block(config.width, config.expansion, config.dropout) for _ in range(config.blocks)),
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 1),
        )

    def forward(self, hidden: Tensor, code: Tensor, logits: Tensor, level: Tensor) -> Tensor:
        """Logits ``[n]`` of the probability, see `StepScorer`; for training. Of the step's logits, the k largest are enough."""
        largest = logits.topk(self.top, -1).values
        finite = largest.isfinite()
        least = largest.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
        largest = torch.where(finite, largest, torch.where(least.isfinite(), least, 0.0))
        embedded = self.embedding[level.clamp(max=len(self.embedding) - 1), code]
        decided: Tensor = self.network(torch.cat((hidden, embedded, self.project(largest)), -1))
        return decided[:, 0]

    @torch.no_grad()
    def score(self, hidden: Tensor, code: Tensor, logits: Tensor, level: Tensor) -> Tensor:
        """Probabilities, see `StepScorer`.

        Raises:
            ConfigError: the router is in training mode, where dropout would make decoding random.
        """
        if self.training:
            raise ConfigError("router: expected evaluation mode, got training mode")
        return self.forward(hidden, code, logits, level).sigmoid()


def entropy_scorer(hidden: Tensor, code: Tensor, logits: Tensor, level: Tensor) -> Tensor:
    """The entropy of the step's distribution in nats, a baseline `StepScorer`; the release routes above 0.45."""
    entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropy


def aleatoric_scorer(hidden: Tensor, code: Tensor, logits: Tensor, level: Tensor) -> Tensor:
    """LogU's aleatoric uncertainty with ten logits, a baseline `StepScorer`; the release routes above 2.275."""
    return logit_uncertainty(logits)[0]


def logit_uncertainty(logits: Tensor, top: int = 10) -> tuple[Tensor, Tensor]:
    """LogU's aleatoric and epistemic uncertainty, ``[n]`` each, with the K largest logits x taken as evidence of sum S.

    ``AU = -Σ (x / S) (ψ(x + 1) - ψ(S + 1))`` and ``EU = K / (S + K)``. Evidence below zero counts as none; without any, AU is 0 and EU 1.
    """
    evidence = logits.topk(min(top, logits.shape[-1]), -1).values.clamp(min=0.0)
    total = evidence.sum(-1, keepdim=True)
    share = evidence / total.masked_fill(total == 0, 1.0)
    aleatoric = -(share * (torch.digamma(evidence + 1) - torch.digamma(total + 1))).sum(-1)
    return aleatoric, evidence.shape[-1] / (total[:, 0] + evidence.shape[-1])


@dataclass
class Usage:
    """What decoding took, counted as codes.

    Attributes:
        steps: of the small model, which takes every one.
        routed: of them, those that the large model decided.
        switches: of those, the ones whose predecessor it had not decided: there it reads more than one code.
        read: codes of the prefixes that the large model read for the first time, as one with a cache does.
        calls: of the large model, each for all routed rows of a level.
    """

    steps: int = 0
    routed: int = 0
    switches: int = 0
    read: int = 0
    calls: int = 0

    @property
    def share(self) -> float:
        """Of the steps that were routed; 0 without steps."""
        return self.routed / max(self.steps, 1)

    def active(self, small: float, large: float) -> float:
        """Parameters that a step activates on average, from those of the two models."""
        return small + large * self.share


class _RoutedStep:
    """One step of all rows, and the count of what the large model did and has read."""

    def __init__(self, small: SmallStep, large: LargeStep, scorer: StepScorer, theta: float, rows: Tensor) -> None:
        self.small, self.large, self.scorer, self.theta = small, large, scorer, theta
        self.usage = Usage()
        self.seen, self.before = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)

    def __call__(self, prefixes: Tensor, level: int, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[n, V]`` and bool ``[n]``, whose are the large model's; rows that are not ``alive`` are never routed."""
        logits, hidden = self.small(prefixes)
        scores = self.scorer(hidden, logits.argmax(-1), logits, torch.full_like(prefixes[:, 0], level))
        routed = scores >= self.theta if alive is None else (scores >= self.theta) & alive
        found = dispatch(Route.of(routed.long(), 2), [lambda i: logits[i], lambda i: self._large(prefixes[i], logits)])
        self._count(routed, prefixes.shape[1], len(routed) if alive is None else int(alive.sum()))
        return found, routed

    def follow(self, parents: Tensor) -> None:
        """Rows go on from other rows, int64 ``[n]``."""
        self.seen, self.before = self.seen[parents], self.before[parents]

    def _large(self, prefixes: Tensor, logits: Tensor) -> Tensor:
        found = self.large(prefixes)
        self.usage.calls += 1
        if found.shape[-1] != logits.shape[-1]:
            raise ConfigError(f"large: expected the small model's {logits.shape[-1]} codes, got {found.shape[-1]}")
        return found.to(logits.dtype)

    def _count(self, routed: Tensor, length: int, steps: int) -> None:
        self.usage.steps += steps
        self.usage.routed += int(routed.sum())
        self.usage.switches += int((routed & ~self.before).sum())
        self.usage.read += int((length - self.seen)[routed].sum())
        self.seen, self.before = self.seen.masked_fill(routed, length), routed


@dataclass(frozen=True)
class RoutedCodes:
    """What `routed_greedy` generated.

    Attributes:
        codes: int64 ``[n, levels]``.
        routed: bool ``[n, levels]``: decided by the large model.
        usage: what it took.
    """

    codes: Tensor
    routed: Tensor
    usage: Usage


@torch.no_grad()
def routed_greedy(small: SmallStep, large: LargeStep, scorer: StepScorer, theta: float, levels: int, start: Tensor) -> RoutedCodes:
    """The likeliest code of each level, the large model's where ``score >= theta``, else the small one's.

    Nothing is verified: the result may be neither model's. The large model is asked with the whole prefix, whoever generated it. With
    scores from 0 to 1, a theta of 0 gives the large model's codes and one above 1 the small model's.

    Args:
        small: the model that takes every step.
        large: the model that takes the routed ones.
        scorer: of steps, such as `DivergenceRouter.score`.
        theta: threshold.
        levels: codes to generate.
        start: int64 ``[n, p]``, p of at least 1: what each prefix begins with.
    """
    prefixes, step, routed = _checked(start), _RoutedStep(small, large, scorer, theta, start[:, 0]), []
    for level in range(levels):
        logits, by_large = step(prefixes, level)
        prefixes = torch.cat((prefixes, logits.argmax(-1, keepdim=True)), 1)
        routed.append(by_large)
    decided = torch.stack(routed, 1) if routed else prefixes.new_zeros(len(start), 0, dtype=torch.bool)
    return RoutedCodes(prefixes[:, start.shape[1] :], decided, step.usage)


@dataclass(frozen=True)
class RoutedBeams:
    """What `routed_beam` generated.

    Attributes:
        codes: int64 ``[n, W, levels]``, the best first.
        scores: ``[n, W]``, sums of log-probabilities; minus infinity where there is none.
        usage: what it took, counting each live beam's steps.
    """

    codes: Tensor
    scores: Tensor
    usage: Usage


@torch.no_grad()
def routed_beam(
    small: SmallStep, large: LargeStep, scorer: StepScorer, theta: float, levels: int, start: Tensor, width: int
) -> RoutedBeams:
    """Beams of which each is routed by itself at each level; the routed ones go through the large model together.

    A routed beam is extended by the large model's log-probabilities. The router judges the code that the small model would take first.
    The paper has no beams.

    Args:
        small: see `routed_greedy`.
        large: see `routed_greedy`.
        scorer: see `routed_greedy`.
        theta: see `routed_greedy`.
        levels: see `routed_greedy`.
        start: see `routed_greedy`.
        width: beams of each row; W is fewer where there are not as many sequences.

    Raises:
        ConfigError: ``width`` is below 1.
    """
    if width < 1:
        raise ConfigError(f"width: expected at least 1, got {width!r}")
    prefixes, step, count = _checked(start), _RoutedStep(small, large, scorer, theta, start[:, 0]), len(start)
    scores_nw: Tensor | None = None
    beams = 1
    for level in range(levels):
        alive = None if scores_nw is None else (scores_nw > -torch.inf).flatten()
        logits, _ = step(prefixes, level, alive)
        extended = logits.log_softmax(-1).view(count, beams, logits.shape[-1])
        if scores_nw is not None:
            extended = (extended + scores_nw[..., None]).masked_fill(scores_nw[..., None] == -torch.inf, -torch.inf)
        scores_nw, place = extended.flatten(1).topk(min(width, extended[0].numel() if count else width), 1)
        parents = (place // extended.shape[2] + torch.arange(count, device=place.device)[:, None] * beams).flatten()
        prefixes = torch.cat((prefixes[parents], (place % extended.shape[2]).reshape(-1, 1)), 1)
        step.follow(parents)
        beams = scores_nw.shape[1]
    scores = torch.zeros(count, 1, device=start.device) if scores_nw is None else scores_nw
    return RoutedBeams(prefixes[:, start.shape[1] :].view(count, beams, levels), scores, step.usage)


def _checked(start: Tensor) -> Tensor:
    if start.dim() != 2 or start.shape[1] < 1:
        raise ConfigError(f"start: expected int64 [n, p] with p of at least 1, got {tuple(start.shape)}")
    return start


@dataclass(frozen=True)
class LabelledSteps:
    """Steps of the small model on the large one's items, one level after another, each with the n rows in their order.

    Attributes:
        hidden: ``[levels n, h]``, its states.
        code: int64 ``[levels n]``, what it would take.
        logits: ``[levels n, k]``, its largest.
        level: int64 ``[levels n]``.
        label: bool ``[levels n]``: taking that code would make the large model end in another cluster.
    """

    hidden: Tensor
    code: Tensor
    logits: Tensor
    level: Tensor
    label: Tensor


@torch.no_grad()
def label_steps(
    small: SmallStep, large: LargeStep, levels: int, start: Tensor, same: Callable[[Tensor, Tensor], Tensor], top: int = 100
) -> LabelledSteps:
    """Where the small model's greedy code would change what the large model recommends.

    The large model generates an item. Where the small model, given the item's codes before, would take the same code, the label is 0.
    Where not, its code is taken and the large model goes on to the end of the item, which is the paper's end of the sentence: the label is
    1 unless that item is the ``same`` as the first. The paper asks a language model whether both texts say the same; here the
    caller's cluster or category decides.

    Args:
        small: the small model.
        large: the large model.
        levels: codes of an item.
        start: int64 ``[n, p]``: what each prefix begins with.
        same: from two times int64 ``[m, levels]`` codes to bool ``[m]``: one item, or items of one cluster.
        top: logits that are kept.
    """
    item = _greedy(large, _checked(start), levels)
    steps = [_label_level(small, large, level, levels, item, start.shape[1], same, top) for level in range(levels)]
    return LabelledSteps(*(torch.cat(parts) for parts in zip(*steps, strict=True)))


def _label_level(
    small: SmallStep, large: LargeStep, level: int, levels: int, item: Tensor, skip: int, same: Callable[[Tensor, Tensor], Tensor], top: int
) -> tuple[Tensor, ...]:
    logits, hidden = small(item[:, : skip + level])
    code = logits.argmax(-1)
    label = code != item[:, skip + level]
    at = label.nonzero()[:, 0]
    if len(at):
        other = _greedy(large, torch.cat((item[at, : skip + level], code[at, None]), 1), levels - level - 1)
        label = label.index_put((at,), ~same(other[:, skip:], item[at, skip:]))
    return hidden, code, logits.topk(min(top, logits.shape[-1]), -1).values, torch.full_like(code, level), label


def _greedy(model: LargeStep, prefixes: Tensor, levels: int) -> Tensor:
    for _ in range(levels):
        prefixes = torch.cat((prefixes, model(prefixes).argmax(-1, keepdim=True)), 1)
    return prefixes


def positive_weight(label: Tensor, recall_factor: float = 1.0) -> Tensor:
    """``recall_factor`` negatives / positives: what a positive weighs in `router_loss`; ``recall_factor`` where either is missing."""
    positives = int(label.sum())
    balanced = bool(positives) and positives < len(label)
    return torch.tensor(recall_factor * ((len(label) - positives) / positives if balanced else 1.0))


def router_loss(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy of the router's logits ``[n]`` with labels bool ``[n]``, positives weighed by `positive_weight`."""
    return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), pos_weight=weight.to(logits.dtype))
