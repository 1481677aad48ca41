# SPDX-License-Identifier: Apache-2.0
"""Adaptive Sparse ViT: a learned threshold for each stage on how much the class token attends to a token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.transprune import context_attention_by_head
from recsys.efficiency.scoring import TokenScorer, probe_of
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.view import TokenView, free_tokens, group_means, held, row_sums, to_padded


def head_weighted(attention: Tensor, outputs: Tensor) -> Tensor:
    """``Σ_h a_hj w_hj``: a class token's attention to each token j, the heads weighted by how much they make of that token.

    Args:
        attention: ``[…, H]``, the attention of the class token to the token in each head.
        outputs: ``[…, H, e]``, what each head made of the token: its own row of the attention's output.

    Returns:
        ``[…]``. The weights ``w_hj = ||o_hj|| / (Σ_h ||o_hj|| + 1e-8)`` sum to 1 over the heads; equal norms give the mean attention.
    """
    norms = outputs.norm(dim=-1)
    score: Tensor = (attention * norms / (norms.sum(-1, keepdim=True) + 1e-8)).sum(-1)
    return score


@register("token_scorer", "adaptive_sparse")
class ClassAttention(TokenScorer):
    """The context's attention to each token, its heads weighted as in `head_weighted`; goes with the selector ``threshold``.

    §13 of the specification, for models that are pruned by a `PruneSchedule`. A probe holds no outputs of single heads, so the norms here
    are those of the token's values. The attention is over the row's tokens, a mean over the context's.
    """

    class Config(BaseConfig):
        """Nothing to set."""

        name: Literal["adaptive_sparse"] = "adaptive_sparse"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """At least 0; the scores of a row sum to at most 1."""
        who = "token_scorer 'adaptive_sparse'"
        probe = probe_of(probe, who)
        query, key, value = (probe.require(field, who) for field in ("query", "key", "value"))
        repeated = replace(probe, key=key.repeat_interleave(query.shape[1] // key.shape[1], 1))
        attention = context_attention_by_head(view, repeated, who)
        return head_weighted(attention, value.repeat_interleave(query.shape[1] // value.shape[1], 1))


class LearnedThreshold(nn.Module):
    """Keeps what scores above a scalar that is learned through a straight-through sigmoid.

    The published temperature, 1e-4, passes a gradient only within a thousandth of the threshold, and scores shrink with the number of
    tokens: `fit` sets the threshold to a quantile of the scores seen, and the temperature to a share of their spread.

    Args:
        threshold: θ to begin with; minus infinity keeps everything.
        temperature: T of the sigmoid.
    """

    temperature: Tensor

    def __init__(self, threshold: float = 0.001, temperature: float = 1e-4) -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"temperature: expected above 0, got {temperature!r}")
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, scores: Tensor) -> Tensor:
        """``[S]``, 1 for what is kept and 0 else, with the gradient of ``sigmoid((score − θ) / T)``."""
        hard = (scores > self.threshold).to(scores.dtype)
        if not self.training or not torch.isfinite(self.threshold):
            return hard
        soft = ((scores - self.threshold) / self.temperature).sigmoid()
        return hard + (soft - soft.detach())

    @torch.no_grad()
    def fit(self, scores: Tensor, keep: float, spread: float | None = 0.05) -> None:
        """Keep a share of these scores.

        Args:
            scores: ``[S]``, at least one.
            keep: the share, in (0, 1]; at least one, and what scores the same together.
            spread: T as a share of the scores' standard deviation; None leaves T as it is.
        """
        if not len(scores) or not 0.0 < keep <= 1.0:
            raise ConfigError(f"fit: keep: expected scores, and a share above 0 and at most 1, got {len(scores)} scores and {keep!r}")
        kept, deviation = max(round(keep * len(scores)), 1), scores.std(correction=0).clamp(min=1e-6)
        lowest = scores.sort(descending=True).values[kept - 1]
        below = torch.cat((scores[scores < lowest], scores.min()[None] - deviation)).max()
        self.threshold.fill_((lowest + below) / 2)
        if spread is not None:
            self.temperature.fill_(spread * deviation)


def masked_softmax(logits: Tensor, keep: Tensor, eps: float = 0.0, present: Tensor | None = None) -> Tensor:
    """Softmax over the kept keys and, for every query, itself: ``e_ij = exp(a_ij − max) G_ij``, ``(e + eps/N) / (Σ e + eps)``.

    Args:
        logits: ``[B, H, N, N]``.
        keep: float ``[B, N]``, the straight-through decisions; the result has a gradient to them.
        eps: the release's 1e-6 lets dropped keys through a little. Every query reads itself, so 0 is safe, and exact.
        present: bool ``[B, N]``, the keys that are no padding: only these share eps, and N counts them. None where all are.
    """
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    gate = torch.where(itself, torch.ones_like(keep[:, None, None]), keep[:, None, None])
    highest = logits.detach().masked_fill(gate.detach() == 0, -torch.inf).amax(-1, keepdim=True)
    weights = (logits - highest).clamp(max=0).exp() * gate
    share = torch.ones_like(keep) if present is None else present.to(keep.dtype)
    share = (eps * share / share.sum(-1, keepdim=True))[:, None, None]
    return (weights + share) / (weights.sum(-1, keepdim=True) + eps)


def layer_macs(tokens: Tensor, dim: int, hidden: int, scoring: int = 0) -> Tensor:
    """Multiply-adds of an encoder layer: ``4 D² n + 2 D n² + 2 D D_mlp n``; differentiable.

    Args:
        tokens: n, the class tokens among them.
        dim: D.
        hidden: D_mlp.
        scoring: class tokens whose attention is computed once more for scores (fused attention does not hand it out).
    """
    return (4 * dim + 2 * hidden + scoring) * dim * tokens + 2 * dim * tokens.square()


def distillation_loss(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """``KL(teacher || student)`` of logits ``[…, C]``, the mean over the rest, or weighted: by what is kept for the logits of tokens.

    This is the direction of the release. The teacher, the same model unpruned, gets no gradient.
    """
    divergence = F.kl_div(student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    if weights is None:
        return divergence.sum() / max(divergence.numel(), 1)
    return (divergence * weights).sum() / weights.sum().clamp(min=1)


@dataclass(frozen=True)
class Encoded:
    """What an `AdaptiveSparseEncoder` makes of B rows.

    Attributes:
        context: ``[B, M, d]``, the class tokens.
        tokens: ``[S', d]``, the tokens that were kept.
        selection: which these are.
        costs: ``[L]``, multiply-adds of each layer as shares of a dense layer's, for `BudgetLoss`: their mean is the share of the dense
            model's. With a gradient to the thresholds in training.
    """

    context: Tensor
    tokens: Tensor
    selection: RowSelection
    costs: Tensor


class _Block(nn.Module):
    """A pre-norm layer over class tokens ``[B, M, d]`` and jagged tokens ``[S, d]``."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self, context: Tensor, tokens: Tensor, offsets: Tensor, keep: Tensor | None, scored: bool, eps: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The new vectors, and the tokens' scores; with ``keep`` float ``[S]`` in the masked form of training."""
        classes = context.shape[1]
        x = torch.cat((context.flatten(0, 1), tokens))
        inside = F.pad(held(offsets[1:] - offsets[:-1], _width(offsets)), (classes, 0), value=True)
        qkv = (_padded(part, offsets, classes) for part in self.qkv(self.norm_attention(x)).chunk(3, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        if keep is None:
            made, attention = _attend_gathered(q, k, v, inside, classes if scored else 0)
        else:
            gate = torch.cat((keep.new_ones(context.shape[:2]), to_padded(keep, offsets)), 1)
            weights = masked_softmax(q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5, gate, eps, inside)
            made, attention = weights @ v, weights[:, :, :classes]
        made_bnhe, place = made.transpose(1, 2), inside[:, classes:]
        scores = head_weighted(attention.mean(2).transpose(1, 2), made_bnhe)[:, classes:][place] if scored else None
        mixed = made_bnhe.flatten(2)
        x = x + self.out(torch.cat((mixed[:, :classes].flatten(0, 1), mixed[:, classes:][place])))
        x = x + self.ffn(self.norm_ffn(x))
        front = len(x) - len(tokens)
        return x[:front].view_as(context), x[front:], scores


class AdaptiveSparseEncoder(nn.Module):
    """A pre-norm encoder that drops tokens on the way: how many depends on the request.

    §13 of the specification. The class tokens are the view's context (the target item) or, without one, a learned vector; they and the
    protected tokens always stay, and a group goes whole, by the mean of its scores. In training nothing is removed, and attention is
    masked by straight-through decisions; in evaluation the kept tokens are gathered, each row by its own scores. Both give the same. Unlike
    in the release, a token that was dropped never returns in a later stage of training, and a row keeps what its own scores say instead
    of the mean number of its batch. Attention is in both directions: for histories that are complete.
    """

    class Config(BaseConfig):
        """The encoder and its stages.

        Attributes:
            dim: d.
            heads: of the attention; divides ``dim``.
            layers: how many.
            hidden: width of the feed-forward networks; 4 d if null.
            stages: layers, counted from 0, before which tokens are dropped; by the scores of the layer before.
            thresholds: θ of each stage to begin with; see `AdaptiveSparseEncoder.calibrate`.
            temperature: T of the straight-through sigmoid.
            eps: of the masked softmax in training; above 0 (the release has 1e-6) the two forms differ a little.
        """

        dim: int = Field(ge=1)
        heads: int = Field(4, ge=1)
        layers: int = Field(12, ge=1)
        hidden: int | None = Field(None, ge=1)
        stages: tuple[int, ...] = (4, 7, 10)
        thresholds: tuple[float, ...] = (0.001, 0.002, 0.003)
        temperature: float = Field(1e-4, gt=0.0)
        eps: float = Field(0.0, ge=0.0)

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.dim % self.heads:
                raise ValueError(f"heads: expected a divisor of dim={self.dim}, got {self.heads}")
            if list(self.stages) != sorted(set(self.stages)) or any(not 1 <= stage < self.layers for stage in self.stages):
                raise ValueError(f"stages: expected rising layers from 1 to {self.layers - 1}, got {self.stages}")
            if len(self.thresholds) != len(self.stages):
                raise ValueError(f"thresholds: expected {len(self.stages)}, one for each stage, got {len(self.thresholds)}")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.hidden = config, config.hidden or 4 * config.dim
        self.class_token = nn.Parameter(torch.randn(1, config.dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(config.dim, config.heads, self.hidden) for _ in range(config.layers))
        self.thresholds = nn.ModuleList(LearnedThreshold(theta, config.temperature) for theta in config.thresholds)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, view: TokenView) -> Encoded:
        """Masked in training, gathered in evaluation.

        Raises:
            DataError: the tokens or the context are not of width ``dim``.
        """
        return self._masked(view) if self.training else self._gathered(view, None)

    @torch.no_grad()
    def calibrate(self, view: TokenView, keep: Sequence[float]) -> None:
        """Set each threshold, one after another, to the quantile that keeps a share of the free tokens of a view, and its temperature.

        Args:
            view: tokens as they will come.
            keep: for each stage, the share of the tokens there were at first; must not rise.
        """
        if len(keep) != len(self.thresholds) or list(keep) != sorted(keep, reverse=True) or any(not 0.0 < share <= 1.0 for share in keep):
            raise ConfigError(f"keep: expected {len(self.thresholds)} shares above 0 and at most 1 that do not rise, got {tuple(keep)}")
        training = self.training
        self.eval()._gathered(view, keep)
        self.train(training)

    def _gathered(self, view: TokenView, fit: Sequence[float] | None) -> Encoded:
        """Drops for good; with ``fit``, after each threshold was set to keep that share."""
        context, whole, chosen = self._context(view), view, RowSelection.all(view)
        counts, scores, before = [], None, 1.0
        for number, block in enumerate(self.blocks):
            if number in self.config.stages:
                stage = self.config.stages.index(number)
                threshold, scores = self._threshold(stage), _unit_scores(view, cast(Tensor, scores))
                if fit is not None:
                    threshold.fit(scores[free_tokens(view)], fit[stage] / before)
                    before = fit[stage]
                selection = RowSelection.of_mask((threshold(scores) > 0) | ~free_tokens(view), view.offsets)
                view, chosen = selection.view(view), chosen.compose(selection)
            counts.append(view.lengths.to(view.values.dtype))
            context, values, scores = block(context, view.values, view.offsets, None, self._scored(number))
            view = view.with_values(values)
        return Encoded(self.norm(context), self.norm(view.values), chosen, self._costs(torch.stack(counts), whole, context.shape[1]))

    def _masked(self, view: TokenView) -> Encoded:
        """Drops nothing: what stays is a factor of the attention."""
        context, values, keep = self._context(view), view.values, view.values.new_ones(len(view.values))
        counts, scores = [], None
        for number, block in enumerate(self.blocks):
            if number in self.config.stages:
                decided = self._threshold(self.config.stages.index(number))(_unit_scores(view, cast(Tensor, scores)))
                keep = keep * torch.where(free_tokens(view), decided, torch.ones_like(decided))
            counts.append(row_sums(keep, view.offsets))
            context, values, scores = block(context, values, view.offsets, keep, self._scored(number), self.config.eps)
        selection = RowSelection.of_mask(keep.detach() > 0.5, view.offsets)
        costs = self._costs(torch.stack(counts), view, context.shape[1])
        return Encoded(self.norm(context), self.norm(selection.gather(values)), selection, costs)

    def _costs(self, counts_lb: Tensor, view: TokenView, classes: int) -> Tensor:
        dense = layer_macs(view.lengths.to(counts_lb.dtype) + classes, self.config.dim, self.hidden).sum().clamp(min=1)
        macs = [
            layer_macs(count + classes, self.config.dim, self.hidden, classes * self._scored(number)).sum()
            for number, count in enumerate(counts_lb)
        ]
        return torch.stack(macs) / dense

    def _scored(self, number: int) -> bool:
        return number + 1 in self.config.stages

    def _threshold(self, stage: int) -> LearnedThreshold:
        return cast(LearnedThreshold, self.thresholds[stage])

    def _context(self, view: TokenView) -> Tensor:
        context = self.class_token.expand(len(view), 1, -1) if view.context is None else view.context
        if view.values.shape[1] != self.config.dim or context.shape[2] != self.config.dim:
            raise DataError(f"values: expected tokens and context of {self.config.dim}, got {view.values.shape[1]} and {context.shape[2]}")
        return context


def _attend_gathered(q: Tensor, k: Tensor, v: Tensor, inside: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Attention of all to the keys ``inside``, and its first ``classes`` rows ``[B, H, M, N]``, which fused attention does not hand out."""
    mask = None if bool(inside.all()) else inside[:, None, None]
    made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = q[:, :, :classes] @ k.transpose(-1, -2) * k.shape[-1] ** -0.5
    return made, logits.masked_fill(~inside[:, None, None], -torch.inf).softmax(-1)


def _padded(x: Tensor, offsets: Tensor, classes: int) -> Tensor:
    """``[B M + S, d]`` to ``[B, M + L, d]``."""
    front = (len(offsets) - 1) * classes
    return torch.cat((x[:front].view(len(offsets) - 1, classes, x.shape[1]), to_padded(x[front:], offsets)), 1)


def _width(offsets: Tensor) -> int:
    return int((offsets[1:] - offsets[:-1]).max()) if len(offsets) > 1 else 0


def _unit_scores(view: TokenView, scores: Tensor) -> Tensor:
    """A group's tokens share the mean of their scores."""
    if view.groups is None:
        return scores
    units, unit = view.units()
    means: Tensor = group_means(scores, unit, len(units.values))[unit]
    return means
