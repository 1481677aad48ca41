# SPDX-License-Identifier: Apache-2.0
"""From scores to what a row keeps. Each selector keeps whole groups, every protected token, and the original order."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.scoring import row_extreme, unit_scaled
from recsys.efficiency.selection import BlockSelection, RowSelection
from recsys.efficiency.view import TokenView, group_means, held, offsets_of, row_of, to_padded


class Selector(ABC):
    """Chooses units (groups, or tokens where there are none). Registered with ``@register("selector", name)``, built as ``cls(config)``."""

    def select(self, view: TokenView, scores: Tensor, k: Tensor | None = None) -> RowSelection:
        """What each row keeps.

        Args:
            view: the tokens.
            scores: float ``[S]``; a group's is the mean of its tokens'.
            k: int64 ``[B]``, units that each row keeps besides its protected ones; more than there are is an error. A selector that
                chooses their number itself takes it as the most, and None as no bound.

        Raises:
            ConfigError: a score is not a finite number, or ``k`` is out of its range, or not given to a selector that needs it.
        """
        if scores.shape != (len(view.values),) or not bool(scores.isfinite().all()):
            raise ConfigError(f"select: scores: expected a finite number for each of {len(view.values)} tokens, got {_bad(scores)}")
        if k is not None and k.shape != (len(view),):
            raise ConfigError(f"select: k: expected one for each of the {len(view)} rows, got {tuple(k.shape)}")
        units, unit = view.units()
        scores = scores if view.groups is None else group_means(scores, unit, len(units.values))
        free = torch.ones_like(unit[: len(units.values)], dtype=torch.bool) if units.protected is None else ~units.protected
        counts = torch.zeros(len(view), dtype=torch.long, device=unit.device).index_add(0, units.rows[free], free[free].long())
        if k is not None and bool(((k < 0) | (k > counts)).any()):
            b = int(((k < 0) | (k > counts)).long().argmax())
            raise ConfigError(f"select: k: row {b}: expected 0 to its {int(counts[b])} units, got {int(k[b])}")
        chosen = RowSelection.of_mask(self.choose(units, scores, free, k) | ~free, units.offsets)
        return chosen if view.groups is None else chosen.expanded(unit, view.offsets)

    @abstractmethod
    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """bool ``[U]``: the ``free`` units that are kept; ``k`` of each row where that is given and the selector keeps a given number."""


@register("selector", "top_k")
class TopK(Selector):
    """The k highest; of equal ones the later."""

    class Config(BaseConfig):
        """Nothing to set."""

        name: Literal["top_k"] = "top_k"

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """See `Selector.choose`."""
        return free & (ranks(scores.masked_fill(~free, -torch.inf), units.offsets) < needed(k, "top_k")[units.rows])


@register("selector", "mmr")
class MMR(Selector):
    """Greedy trade-off of importance and difference: ``argmax λ Imp(v) − (1 − λ) max over the kept c of s(v, c)``.

    The maximal marginal relevance of Carbonell and Goldstein (1998) in the form of IDPruner (§2 of the specification): importance
    scaled to [0, 1] in each row, cosines of the tokens' vectors, first the most important token. λ = 1 is top-k; λ = 0 is the
    farthest-first traversal (k-center) that begins there. O(N K d), in K steps over all rows of a batch at once.
    """

    class Config(BaseConfig):
        """The trade-off.

        Attributes:
            importance: λ.
            parallel: units taken in each step, by the similarities known before it; 1 is exact.
            similarity: ``nearest`` is MMR's; ``total`` takes the sum of the cosines with all that is kept (ToDRE's second version), and
                piles up at the extremes.
        """

        name: Literal["mmr"] = "mmr"
        importance: float = Field(0.5, ge=0.0, le=1.0)
        parallel: int = Field(1, ge=1)
        similarity: Literal["nearest", "total"] = "nearest"

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """See `Selector.choose`. What is protected counts as kept from the start."""
        wanted, importance = needed(k, "mmr"), _unit_scaled_free(scores, free, units)
        kept = torch.zeros_like(free)
        size = units.lengths.clamp(min=1).double().log2().ceil().long()  # rows of alike length together: few places are padded
        for own in size.unique():
            tokens = (size == own)[units.rows]
            lengths = units.lengths[size == own]
            vectors = nn.functional.normalize(to_padded(units.values[tokens], offsets_of(lengths)), dim=-1)
            padded, open_ = (to_padded(x[tokens], offsets_of(lengths)) for x in (importance, free))
            inside = held(lengths, open_.shape[1])
            taken = self._greedy(vectors, padded, open_, inside & ~open_, wanted[size == own])
            kept = kept.masked_scatter(tokens, taken[inside])
        return kept

    def _greedy(self, vectors: Tensor, importance: Tensor, open_: Tensor, kept: Tensor, left: Tensor) -> Tensor:
        """bool ``[B, N]``: the ``left`` units that padded rows take of the open ones, given what is kept already."""
        weight = self.config.importance
        free, similarity = open_, self._begin(vectors, kept)
        while bool((left > 0).any()):
            first = ~kept.any(1, keepdim=True)
            value = weight * importance - (1 - weight) * similarity
            value = torch.where(first, importance, value).masked_fill(~open_, -torch.inf)
            step = min(self.config.parallel, int(left.max()))
            taken, valid = self._best(value, step)
            valid &= torch.arange(step, device=valid.device) < torch.where(first[:, 0], left.clamp(max=1), left.clamp(max=step))[:, None]
            chosen = torch.zeros_like(kept).scatter_(1, taken, valid)
            kept, open_ = kept | chosen, open_ & ~chosen
            left = left - chosen.sum(1)
            similarity = self._with(similarity, vectors, taken, valid)
        return kept & free

    @staticmethod
    def _best(value: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The places of the ``step`` highest of each row, of equal ones the later, and whether they are above -inf."""
        if step == 1:
            taken = value.shape[1] - 1 - value.flip(1).argmax(1, keepdim=True)
        else:
            taken = value.shape[1] - 1 - value.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :step]
        return taken, value.gather(1, taken) > -torch.inf

    def _begin(self, vectors: Tensor, kept: Tensor) -> Tensor:
        nearest = self.config.similarity == "nearest"
        similarity = vectors.new_full(kept.shape, -1.0 if nearest else 0.0)
        most = int(kept.sum(1).max()) if kept.numel() else 0
        if not most:
            return similarity
        taken = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        return self._with(similarity, vectors, taken, kept.gather(1, taken))

    def _with(self, similarity: Tensor, vectors: Tensor, taken: Tensor, valid: Tensor) -> Tensor:
        """The similarity of each unit with what is kept, after ``taken`` int64 ``[B, P]`` were kept too."""
        own = vectors.gather(1, taken[..., None].expand(-1, -1, vectors.shape[2]))
        cosines = vectors @ own.transpose(1, 2)
        if self.config.similarity == "total":
            return similarity + (cosines * valid[:, None]).sum(2)
        return torch.maximum(similarity, cosines.masked_fill(~valid[:, None], -1.0).amax(2))


@register("selector", "threshold")
class Threshold(Selector):
    """What scores above a threshold, at least ``at_least`` of a row's highest."""

    class Config(BaseConfig):
        """The threshold.

        Attributes:
            threshold: a score above it is kept.
            at_least: units kept of each row that has them.
        """

        name: Literal["threshold"] = "threshold"
        threshold: float
        at_least: int = Field(1, ge=0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """See `Selector.choose`."""
        rank = ranks(scores.masked_fill(~free, -torch.inf), units.offsets)
        return free & ((scores > self.config.threshold) | (rank < self.config.at_least)) & bounded(rank, units, k)


@register("selector", "elbow")
class Elbow(Selector):
    """What scores above the elbow of a row's descending scores: the point farthest from the chord between the first and the last one.

    CoreMatching's rule (§9 of the specification). Scores on a straight line have no elbow, and rows of fewer than ``at_least`` units none
    that means anything: they are kept whole.
    """

    class Config(BaseConfig):
        """The bound.

        Attributes:
            at_least: units kept of each row that has them.
        """

        name: Literal["elbow"] = "elbow"
        at_least: int = Field(8, ge=1)

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """See `Selector.choose`."""
        masked = scores.masked_fill(~free, -torch.inf)
        rank, rows = ranks(masked, units.offsets), units.rows
        counts = torch.zeros(len(units), dtype=torch.long, device=rows.device).index_add(0, rows, free.long())
        low, high = (
            row_extreme(torch.where(free, scores, float(sign)), units.offsets, kind) for kind, sign in (("amin", "inf"), ("amax", "-inf"))
        )
        span = (high - low)[rows]
        line = high[rows] - span * rank / (counts[rows] - 1).clamp(min=1)
        below = torch.where(free, line - scores, -torch.inf)
        farthest = row_extreme(below, units.offsets, "amax")[rows]
        straight = farthest <= 1e-6 * span.clamp(min=torch.finfo(scores.dtype).tiny)
        at = torch.where(free & (below == farthest), rank, len(scores))
        elbow = torch.full_like(counts, len(scores)).scatter_reduce(0, rows, at, "amin")[rows]
        kept = straight | (rank < torch.maximum(elbow, torch.full_like(elbow, self.config.at_least)))
        return free & kept & bounded(rank, units, k)


@register("selector", "coverage")
class Coverage(Selector):
    """The highest units without the tail whose scores sum to less than a share τ of the row's.

    Token Sparse Attention's dynamic token coverage (§5 of the specification). Scores must be at least 0.
    """

    class Config(BaseConfig):
        """The tail.

        Attributes:
            tail: τ, in [0, 1).
            at_least: units kept of each row that has them.
        """

        name: Literal["coverage"] = "coverage"
        tail: float = Field(0.005, ge=0.0, lt=1.0)
        at_least: int = Field(1, ge=0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """See `Selector.choose`."""
        if bool((scores[free] < 0).any()):
            raise ConfigError("selector 'coverage': expected scores of at least 0")
        rank = ranks(scores.masked_fill(~free, -torch.inf), units.offsets)
        mass = to_padded(torch.where(free, scores.double(), 0.0), units.offsets)
        ascending = mass.sort(dim=1, stable=True).indices
        upto = torch.empty_like(mass).scatter_(1, ascending, mass.gather(1, ascending).cumsum(1))
        tail = upto < self.config.tail * mass.sum(1, keepdim=True)
        dropped = tail[held(units.lengths, mass.shape[1])]
        return free & (~dropped | (rank < self.config.at_least)) & bounded(rank, units, k)


def ranks(scores: Tensor, offsets: Tensor) -> Tensor:
    """int64 ``[S]``: 0 for the highest score of a row, 1 for the next; of equal ones the later comes first."""
    rows = row_of(offsets)
    order = torch.arange(len(scores), device=scores.device).flip(0)
    order = order[scores[order].argsort(stable=True, descending=True)]
    order = order[rows[order].argsort(stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place - offsets[rows]


def top_keys(scores: Tensor, k: int, allowed: Tensor | None = None, forced: Tensor | None = None) -> BlockSelection:
    """The k highest keys of each block of queries, in ascending order.

    Args:
        scores: ``[B, G, Q, N]``.
        k: keys that are read, where so many are allowed; forced ones count. Of equal scores the later keys are read.
        allowed: bool, broadcastable to ``scores``: what may be read.
        forced: bool, broadcastable: read in any case, where allowed.

    Raises:
        ConfigError: ``k`` is below 1, or below the number of forced keys.
    """
    if k < 1:
        raise ConfigError(f"top_keys: k: expected at least 1, got {k}")
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if forced is not None and int((scores == torch.inf).sum(-1).max() if scores.numel() else 0) > k:
        raise ConfigError(f"top_keys: k: expected at least the {int((scores == torch.inf).sum(-1).max())} forced keys, got {k}")
    return top_recent(scores, k)


def top_recent(scores: Tensor, k: int) -> BlockSelection:
    """The k highest of the scores ``[B, G, Q, N]`` above -inf, in ascending order; of equal ones the later.

    Where many scores are the same, as those behind a relu, what wins among equals must not depend on how the keys are laid out.
    """
    k = min(k, scores.shape[-1])
    if k == 0 or not scores.numel():
        index = torch.zeros(*scores.shape[:-1], k, dtype=torch.int32, device=scores.device)
        return BlockSelection(index, torch.zeros_like(index, dtype=torch.bool))
    found = scores.topk(min(k + 1, scores.shape[-1]))
    values, index = found.values[..., :k], found.indices[..., :k]
    lowest = values[..., -1:]
    if k == scores.shape[-1] or not bool(((found.values[..., k:] == lowest) & (lowest > -torch.inf)).any()):
        return BlockSelection(index.int(), values > -torch.inf).sorted()
    equal, wanted = scores == lowest, (values == lowest).sum(-1, keepdim=True)
    from_right = equal.flip(-1).cumsum(-1).flip(-1)
    kept = (scores > lowest) | (equal & (from_right <= wanted) & (scores > -torch.inf))
    place = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    index = torch.where(kept, place, -1).topk(k, sorted=False).values
    return BlockSelection(index.clamp(min=0), index >= 0).sorted()


def _unit_scaled_free(scores: Tensor, free: Tensor, units: TokenView) -> Tensor:
    """Scores scaled to [0, 1] by the ``free`` units of each row; 0 for the others."""
    rows = units.rows[free]
    lengths = torch.zeros(len(units), dtype=torch.long, device=rows.device).index_add(0, rows, torch.ones_like(rows))
    return torch.zeros_like(scores).masked_scatter(free, unit_scaled(scores[free], offsets_of(lengths)))


def _bad(scores: Tensor) -> str:
    wrong = scores[~scores.isfinite()]
    return f"{float(wrong.flatten()[0])}" if wrong.numel() else f"{tuple(scores.shape)}"


def needed(k: Tensor | None, who: str) -> Tensor:
    """The number of units, which this selector cannot do without."""
    if k is None:
        raise ConfigError(f"selector {who!r}: expected k, the number of units that each row keeps; got None")
    return k


def bounded(rank: Tensor, units: TokenView, k: Tensor | None) -> Tensor:
    """bool ``[U]``: within the first ``k`` of each row."""
    return torch.ones_like(rank, dtype=torch.bool) if k is None else rank < k[units.rows]
