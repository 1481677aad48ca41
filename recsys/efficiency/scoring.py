# SPDX-License-Identifier: Apache-2.0
"""How much each token, or each key to each query, matters: the two protocols, how they combine, and the baselines."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.view import TokenView, held, row_of, row_sums, to_padded


class TokenScorer(nn.Module, ABC):
    """Judges the tokens of a view. Registered with ``@register("token_scorer", name)`` and built as ``cls(config)``.

    A row's scores do not depend on its batch mates; only their order within a row means something, unless a subclass says more.
    """

    @abstractmethod
    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """float ``[S]``: higher is kept.

        Args:
            view: the tokens.
            probe: what the layer before saw and made, for scorers that read it.

        Raises:
            ConfigError: the scorer needs a probe or a context, and there is none.
        """

    def carry(self, view: TokenView, probe: LayerProbe) -> Tensor | None:
        """What the scorer wants to remember of a layer, float ``[S]``, given what it carried so far (``probe.carried``); None for nothing.

        Called after every layer; what was carried is cut down with the tokens, and stands in the next layer's probe.
        """
        return None


class PairScorer(nn.Module, ABC):
    """Judges keys for queries."""

    @abstractmethod
    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """float ``[B, G, Q, N]`` of queries ``[B, H, T, e]`` and keys ``[B, H_kv, N, e]``: higher is read."""


@register("token_scorer", "recency")
class Recency(TokenScorer):
    """The later, the higher: with top-k the *last K* baseline, which is strong wherever tastes drift."""

    class Config(BaseConfig):
        """Nothing to set."""

        name: Literal["recency"] = "recency"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """The positions."""
        return view.positions.to(view.values.dtype)


@register("token_scorer", "random")
class Random(TokenScorer):
    """Scores drawn from the seed and a token's position: the *random K* baseline, the same in every run and for every row of a length."""

    class Config(BaseConfig):
        """What is drawn.

        Attributes:
            seed: of the draw.
        """

        name: Literal["random"] = "random"
        seed: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """Uniform in [0, 1)."""
        count = int(view.positions.max()) + 1 if len(view.positions) else 0
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(self.config.seed))
        return drawn.to(view.values)[view.positions]


class Table(TokenScorer):
    """A score for each thing that a token can be: with the counts of the training events and top-k the *most popular K* baseline.

    Args:
        scores: float ``[N]``, for ``view.ids`` 0 to N - 1.
    """

    scores: Tensor

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.register_buffer("scores", scores, persistent=False)

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """Look the tokens up.

        Raises:
            ConfigError: the view does not say what its tokens are.
        """
        if view.ids is None:
            raise ConfigError("token_scorer of a table: expected a view with ids, got None")
        return self.scores[view.ids].to(torch.promote_types(view.values.dtype, torch.float32))  # counts that differ stay apart


@register("token_scorer", "norm")
class Norm(TokenScorer):
    """The length of a token's vector."""

    class Config(BaseConfig):
        """Nothing to set."""

        name: Literal["norm"] = "norm"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """Euclidean norms."""
        norms: Tensor = torch.linalg.vector_norm(view.values, dim=-1)
        return norms


@register("token_scorer", "context")
class ContextSimilarity(TokenScorer):
    """The highest cosine of a token with its row's context: target, query, candidates, or the last events."""

    class Config(BaseConfig):
        """Nothing to set."""

        name: Literal["context"] = "context"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """In [-1, 1]."""
        context = context_of(view, "token_scorer 'context'")
        if context.shape[1:] != (max(context.shape[1], 1), view.values.shape[1]):
            raise ConfigError(f"context: expected [B, M, {view.values.shape[1]}] with M of at least 1, got {tuple(context.shape)}")
        tokens, context = (nn.functional.normalize(x, dim=-1) for x in (view.values, context))
        padded = to_padded(tokens, view.offsets)
        cosines: Tensor = (padded @ context.transpose(1, 2)).amax(-1)[held(view.lengths, padded.shape[1])]
        return cosines


@register("token_scorer", "sum")
class WeightedSum(TokenScorer):
    """A weighted sum of other scorers, each scaled to [0, 1] within its row first (see `unit_scaled`)."""

    class Config(BaseConfig):
        """What is added.

        Attributes:
            scorers: the parts.
            weights: one for each.
        """

        name: Literal["sum"] = "sum"
        scorers: tuple[component_config("token_scorer"), ...] = Field(min_length=1)  # type: ignore[valid-type]
        weights: tuple[float, ...]

    def __init__(self, config: Config) -> None:
        super().__init__()
        if len(config.weights) != len(config.scorers):
            raise ConfigError(
                f"token_scorer 'sum': weights: expected {len(config.scorers)}, one for each scorer, got {len(config.weights)}"
            )
        self.config = config
        self.scorers = nn.ModuleList(components.build("token_scorer", part) for part in config.scorers)

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """The sum."""
        scorers = cast(Sequence[TokenScorer], self.scorers)
        parts = [w * unit_scaled(s.score(view, probe), view.offsets) for w, s in zip(self.config.weights, scorers, strict=True)]
        return torch.stack(parts).sum(0)


def unit_scaled(scores: Tensor, offsets: Tensor) -> Tensor:
    """Scores ``[S]`` scaled to [0, 1] within each row; 0 where a row's are all the same."""
    rows = row_of(offsets)
    low, high = (row_extreme(scores, offsets, kind) for kind in ("amin", "amax"))
    return (scores - low[rows]) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)[rows]


def row_extreme(scores: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """``[B, …]``: the lowest (``amin``) or highest (``amax``) of each row's scores ``[S, …]``; 0 for an empty row."""
    rows = row_of(offsets).view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    return scores.new_zeros(len(offsets) - 1, *scores.shape[1:]).scatter_reduce(0, rows, scores, kind, include_self=False)


def row_softmax(scores: Tensor, offsets: Tensor) -> Tensor:
    """Softmax of ``[S, …]`` over each row's tokens."""
    rows = row_of(offsets)
    weights = (scores - row_extreme(scores.detach(), offsets, "amax")[rows]).exp()
    return (weights / row_sums(weights, offsets)[rows]).to(scores.dtype)


def context_of(view: TokenView, who: str) -> Tensor:
    """The context of a view.

    Raises:
        ConfigError: there is none.
    """
    if view.context is None:
        raise ConfigError(f"{who}: expected a context (target, query or candidate tokens), got None")
    return view.context


def probe_of(probe: LayerProbe | None, who: str) -> LayerProbe:
    """The probe.

    Raises:
        ConfigError: there is none.
    """
    if probe is None:
        raise ConfigError(f"{who}: expected a probe of a layer: it scores inside a model, not in front of it")
    return probe
