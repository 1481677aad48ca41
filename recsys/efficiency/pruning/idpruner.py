# SPDX-License-Identifier: Apache-2.0
"""IDPruner: importance and diversity of a history's events in one greedy choice, and how to look at the trade-off."""

from typing import Literal

import torch
from torch import Tensor, nn

from recsys.core.components import component_config
from recsys.core.errors import ConfigError
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import ContextSimilarity, Random, TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import MMR, ranks
from recsys.efficiency.view import TokenView, group_means, held, row_of, row_sums, to_padded


class IDPruner(HistoryPruning):
    """A scorer with `MMR` at λ = 0.5, in front of a model and without a look at its attention.

    §2 of the specification. The paper's importance is a scorer learned through a differentiable top-k; any scorer works, and here the
    similarity with the last events (or the context that the caller gives) is the default. The similarity is that of the events' embeddings.

    One huge score squashes all others when they are scaled to [0, 1]; ``scaling: quantile`` takes a score's place among the row's instead.
    """

    class Config(HistoryPruning.Config):
        """How much is kept; see `HistoryPruning.Config` for the other keys.

        Attributes:
            scorer: the importance.
            selector: λ, and how many events are taken in each step.
            scaling: ``min_max`` is the paper's.
        """

        scorer: component_config("token_scorer") = ContextSimilarity.Config()  # type: ignore[valid-type]
        selector: MMR.Config = MMR.Config(importance=0.5)
        scaling: Literal["min_max", "quantile"] = "min_max"

    def __init__(self, config: Config, scorer: TokenScorer | None = None) -> None:
        super().__init__(config, scorer)
        if config.scaling == "quantile":
            self.scorer = QuantileScaled(self.scorer)


class QuantileScaled(TokenScorer):
    """Another scorer's scores, each as its quantile within the row.

    Args:
        scorer: the other one.
    """

    def __init__(self, scorer: TokenScorer) -> None:
        super().__init__()
        self.scorer = scorer

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """In [0, 1]."""
        return quantile_scaled(self.scorer.score(view, probe), view.offsets)

    def carry(self, view: TokenView, probe: LayerProbe) -> Tensor | None:
        """What the other one carries."""
        return self.scorer.carry(view, probe)


def quantile_scaled(scores: Tensor, offsets: Tensor) -> Tensor:
    """Each score's place in its row, from 0 for the lowest to 1 for the highest, ``[S]``; equal scores share the mean of their places.

    Args:
        scores: float ``[S]``.
        offsets: int64 ``[B + 1]``.
    """
    rows, rank = row_of(offsets), ranks(scores, offsets)
    lengths = (offsets[1:] - offsets[:-1])[rows]
    order = torch.empty_like(rank)
    order[offsets[rows] + rank] = torch.arange(len(rank), device=rank.device)
    begins = torch.ones_like(rank, dtype=torch.bool)
    begins[1:] = (scores[order][1:] != scores[order][:-1]) | (rows[order][1:] != rows[order][:-1])
    alike = torch.empty_like(rank)
    alike[order] = begins.long().cumsum(0) - 1
    places = ((lengths - 1 - rank).double() / (lengths - 1).clamp(min=1)).to(scores.dtype)
    return group_means(places, alike, int(begins.sum()))[alike]


def importance_retention(selection: RowSelection, importance: Tensor) -> Tensor:
    """``I(S)``: the importance that is kept over that of the same number of most important tokens, ``[B]``; 1 where that is 0.

    Args:
        selection: what is kept.
        importance: float ``[S]``, at least 0.

    Raises:
        ConfigError: a value is negative or not a number.
    """
    if importance.shape != (selection.size,) or bool((~(importance >= 0)).any()):
        raise ConfigError(f"importance_retention: importance: expected {selection.size} numbers of at least 0, got {importance}")
    rows = row_of(selection.source)
    best = ranks(importance, selection.source) < selection.lengths[rows]
    kept, most = (row_sums(importance.double() * mask, selection.source) for mask in (selection.mask(), best))
    return torch.where(most > 0, kept / torch.where(most > 0, most, 1.0), 1.0)


def hopkins(view: TokenView, selection: RowSelection, seed: int = 0) -> Tensor:
    """The Hopkins statistic of what is kept, ``[B]``: near 1 where it is clustered, near 0 where it is spread out.

    ``H(S) = Σ_{r∈R} d(r, S) / (Σ_{r∈R} d(r, S) + Σ_{v∈S} d(v, S∖v))`` with the cosine distance to the nearest one. The specification
    says no more of R than that it is |S| random points: here they are drawn, without replacement, from the row's tokens.
    Half where fewer than two tokens are kept, or all distances are 0.

    Args:
        view: the tokens.
        selection: what is kept of them.
        seed: of R.
    """
    drawn = ranks(Random(Random.Config(seed=seed)).score(view), view.offsets) < selection.lengths[view.rows]
    reference = RowSelection.of_mask(drawn, view.offsets)
    units = nn.functional.normalize(view.values, dim=-1)
    kept_bkd, reference_brd = (to_padded(units[s.index], s.offsets) for s in (selection, reference))
    width = kept_bkd.shape[1]
    if not width:
        return view.values.new_full((len(view),), 0.5)
    inside = held(selection.lengths, width)
    own = torch.eye(width, dtype=torch.bool, device=inside.device)
    to_reference = _nearest(reference_brd, kept_bkd, inside[:, None])
    to_kept = _nearest(kept_bkd, kept_bkd, inside[:, None] & ~own)
    far, near = (d.masked_fill(~inside, 0.0).sum(1) for d in (to_reference, to_kept))
    whole = far + near
    sensible = (selection.lengths > 1) & (whole > 0)
    return torch.where(sensible, far / torch.where(sensible, whole, 1.0), 0.5)


def _nearest(points_bnd: Tensor, kept_bkd: Tensor, allowed: Tensor) -> Tensor:
    """Cosine distances ``[B, n]`` to the nearest of the allowed vectors."""
    distance = (1 - points_bnd @ kept_bkd.transpose(1, 2)).clamp(min=0)
    return distance.masked_fill(~allowed, torch.inf).amin(2)
