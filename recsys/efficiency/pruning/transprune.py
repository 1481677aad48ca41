# SPDX-License-Identifier: Apache-2.0
"""TransPrune: how much a token changes on its way through the layers, and who looks at it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import TokenScorer, probe_of, row_softmax
from recsys.efficiency.view import TokenView, free_tokens, held, row_sums, to_padded

_SHARES = ((7, 0.875), (9, 0.625), (12, 0.125))  # of 32 layers: after so many, the share of the original tokens that goes on
_DEPTH = 32


@register("token_scorer", "transprune")
class TransPrune(TokenScorer):
    """Token transition variation, added up over some layers, and the attention of the context to a token.

    §3 of the specification. For attention and for the feed-forward network of a layer, with input u and output o (before the residual sum):
    magnitude ``m = ‖o‖ / ‖u‖``, direction ``δ = 1 − |cos(o, u)|``, variation ``softmax(δ) · m``. Variation and attention are each divided
    by their sum over the prunable tokens of the row; the score is ``α variation + (1 − α) attention``.

    A layer without a feed-forward network (HSTU's) varies by its attention alone.

    The softmax and the sums run over the prunable tokens of one row (the release's run over the batch and all tokens). A token whose input
    is zero has no variation, where the quotient would be infinite. The release takes the attention from the next layer's queries and keys;
    here the layer's probe says which: one that fills ``query`` and ``key`` by the next layer's projections gives the release's score.
    """

    class Config(BaseConfig):
        """What is added.

        Attributes:
            layers: over which the variation is added up, counted from 0; see `plan`.
            alpha: weight of the variation. 1 needs no context and no attention: scores that all candidates of a user share.
            direction: ``absolute`` is the paper's ``1 − |cos|``, ``signed`` the release's ``1 − cos``.
        """

        name: Literal["transprune"] = "transprune"
        layers: tuple[int, ...] = Field(min_length=1)
        alpha: float = Field(0.5, ge=0.0, le=1.0)
        direction: Literal["absolute", "signed"] = "absolute"

    def __init__(self, config: Config) -> None:
        super().__init__()
        if min(config.layers) < 0:
            raise ConfigError(f"token_scorer 'transprune': layers: expected layers from 0, got {config.layers}")
        self.config = config

    def carry(self, view: TokenView, probe: LayerProbe) -> Tensor | None:
        """The variation so far, ``[S]``; 0 for what is not prunable."""
        if probe.layer not in self.config.layers or self.config.alpha == 0:
            return probe.carried
        who, signed = "token_scorer 'transprune'", self.config.direction == "signed"
        modules = ("attention",) if probe.ffn_in is None else ("attention", "ffn")
        parts = [
            transition_variation(probe.require(f"{module}_in", who), probe.require(f"{module}_out", who), view, signed=signed)
            for module in modules
        ]
        added = torch.stack(parts).sum(0)
        return added if probe.carried is None else probe.carried + added

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """The weighted sum; 0 for what is not prunable.

        Raises:
            ConfigError: there is no probe, no layer so far was one of ``layers``, or the probe lacks the context's queries or the keys.
        """
        probe = probe_of(probe, "token_scorer 'transprune'")
        free, alpha, total = free_tokens(view), self.config.alpha, view.values.new_zeros(len(view.values))
        if alpha > 0:
            if probe.carried is None:
                raise ConfigError(
                    f"token_scorer 'transprune': layers: expected one up to layer {probe.layer}, the first that drops tokens (and the "
                    f"scorer as the schedule's own, not as a part of a sum), got {self.config.layers}"
                )
            total = total + alpha * _shared(probe.carried, free, view)
        if alpha < 1:
            total = total + (1 - alpha) * _shared(context_attention(view, probe, "token_scorer 'transprune'"), free, view)
        return total


def transition_variation(u: Tensor, o: Tensor, view: TokenView, *, signed: bool = False) -> Tensor:
    """``softmax(δ) · m`` over the prunable tokens of each row, ``[S]``; 0 for the other tokens.

    Args:
        u: ``[S, d]``, what a module read.
        o: ``[S, d]``, what it made of it.
        view: the tokens.
        signed: whether a turn by more than a right angle counts as more change.
    """
    free, before = free_tokens(view), u.norm(dim=-1)
    cosine = nn.functional.cosine_similarity(o, u, dim=-1, eps=torch.finfo(u.dtype).tiny)
    direction = 1 - (cosine if signed else cosine.abs())
    magnitude = torch.where(before > 0, o.norm(dim=-1) / torch.where(before > 0, before, 1.0), 0.0)
    return _shared(direction.exp(), free, view) * magnitude  # the direction lies in [0, 2]: a softmax without a shift


def context_attention(view: TokenView, probe: LayerProbe, who: str) -> Tensor:
    """How much of the context's attention each token gets, ``[S]``: the mean over heads and context tokens; a row's sum is 1.

    See `context_attention_by_head` for arguments and errors.
    """
    return context_attention_by_head(view, probe, who).mean(1)


def context_attention_by_head(view: TokenView, probe: LayerProbe, who: str) -> Tensor:
    """How much of the context's attention each token gets in each head, ``[S, H]``, the mean over context tokens; a row's sums are 1.

    Only the products of the M context tokens and the row's own N tokens are made. Each context token reads the whole row.

    Args:
        view: the tokens.
        probe: with ``query`` ``[B, H, M, e]`` and ``key`` ``[S, H, e]``.
        who: asks, for errors.

    Raises:
        ConfigError: the probe lacks one of them, or they do not fit each other.
    """
    query, key = probe.require("query", who), probe.require("key", who)
    if query.dim() != 4 or key.shape != (len(view.values), query.shape[1], query.shape[3]) or len(query) != len(view) or not query.shape[2]:
        raise ConfigError(
            f"{who}: expected query [B, H, M, e] and key [S, H, e] with B={len(view)}, M >= 1 and S={len(view.values)}, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    keys_blhe = to_padded(key, view.offsets)
    logits_bhml = torch.einsum("bhme,blhe->bhml", query, keys_blhe) / math.sqrt(query.shape[3])
    logits_smh = logits_bhml.permute(0, 3, 2, 1)[held(view.lengths, keys_blhe.shape[1])]
    return row_softmax(logits_smh, view.offsets).mean(1)


def _shared(values: Tensor, free: Tensor, view: TokenView) -> Tensor:
    """Values over their row's sum among the free tokens; 0 for the other tokens, and in a row whose sum is 0."""
    values = torch.where(free, values, 0.0)
    whole = row_sums(values, view.offsets)[view.rows]
    return (values / torch.where(whole > 0, whole, 1.0)).to(values.dtype)


@dataclass(frozen=True)
class Plan:
    """Where variation is added up and tokens are dropped; layers counted from 0, as `PruneSchedule` and `TransPrune` take them.

    Attributes:
        layers: over which variation is added up.
        keep: the share of the original tokens that goes on after a layer.
        depth: of the model.
    """

    layers: tuple[int, ...]
    keep: dict[int, float]
    depth: int

    def token_layers(self) -> float:
        """The mean over the layers of the share of the original tokens that a layer computes for."""
        shares, share = [], 1.0
        for layer in range(self.depth):
            shares.append(share)
            share = self.keep.get(layer, share)
        return sum(shares) / self.depth


def plan(depth: int) -> Plan:
    """The paper's plan for 32 layers, scaled to another depth and rounded up.

    Of 32 layers the first 7 see all tokens; after the 7th, 9th and 12th, 0.875, 0.625 and 0.125 of them go on: 0.41 of the token-layers.
    Where two of these layers fall together in a shallow model, the smaller share holds.

    Args:
        depth: layers, at least 2: tokens dropped behind the last layer save nothing.

    Raises:
        ConfigError: there are fewer.
    """
    if depth < 2:
        raise ConfigError(f"plan: depth: expected at least 2 layers, got {depth}")
    keep = {-(-layer * depth // _DEPTH) - 1: share for layer, share in _SHARES}
    return Plan(tuple(range(min(keep), max(keep) + 1)), keep, depth)
