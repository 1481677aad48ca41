# SPDX-License-Identifier: Apache-2.0
"""QuoTA: a fixed number of events is shared out among sessions (or days, categories, kinds of behaviour) by their relevance."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.budget import allocate, keep_counts
from recsys.efficiency.scoring import ContextSimilarity, Recency, TokenScorer
from recsys.efficiency.selection import Merge, RowSelection
from recsys.efficiency.selectors import Selector, TopK, needed, ranks
from recsys.efficiency.view import TokenView, free_units, group_means, offsets_of, row_of

Relevance: TypeAlias = Callable[[TokenView], Tensor]
"""From the sessions, each a token: the mean of its events, with the row's context, to float ``[G]``, at least 0, such as a chance."""


class QuotaAllocator(nn.Module):
    """Quotas of events for the sessions of each row, and what fills them.

    §5 of the specification: weights ``(100 p)^exponent`` of the relevances p share out a row's budget. Each session is judged once. Sums
    are exact (the release's truncation loses events), and what a full session cannot take goes to the others by water-filling (the
    release makes one pass, which may exceed a cap). Where no session is relevant at all, the budget is shared out evenly.

    A session's quota is filled by a scorer and a selector (the most recent events, unless configured otherwise) or, with ``fill: merge``,
    by averages of consecutive events. Query decoupling by a language model, bilinear resizing and bipartite merging are left out: events
    lie on no grid.

    Args:
        config: see `Config`.
        relevance: of the sessions, such as a two-tower score's sigmoid; `context_relevance` if None.
    """

    class Config(BaseConfig):
        """How much is kept, and of what.

        Attributes:
            share: of each row's events (units, see `TokenView.units`), in (0, 1].
            events: the number kept, in the place of a share; what is protected counts.
            exponent: of the relevance; 0 shares out evenly.
            floor: events that each session gets where it has them. Where the budget does not reach for all, the most relevant get theirs.
            cap: the most that a session gets; None for all that it has.
            fill: ``select`` events, or ``merge`` consecutive ones.
            scorer: judges the events for ``select``.
            selector: keeps a session's quota of them.
        """

        share: float | None = Field(default=None, gt=0.0, le=1.0)
        events: int | None = Field(default=None, ge=1)
        exponent: float = Field(2.0, ge=0.0)
        floor: int = Field(0, ge=0)
        cap: int | None = Field(default=None, ge=1)
        fill: Literal["select", "merge"] = "select"
        scorer: component_config("token_scorer") = Recency.Config()  # type: ignore[valid-type]
        selector: component_config("selector") = TopK.Config()  # type: ignore[valid-type]

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if (self.share is None) == (self.events is None):
                raise ValueError(f"share, events: expected exactly one of them, got share={self.share!r} and events={self.events!r}")
            if self.cap is not None and self.floor > self.cap:
                raise ValueError(f"floor: expected at most cap={self.cap}, got {self.floor}")
            return self

    def __init__(self, config: Config, relevance: Relevance | None = None) -> None:
        super().__init__()
        self.config = config
        self.relevance: Relevance = relevance or context_relevance
        self.scorer: TokenScorer = components.build("token_scorer", config.scorer)
        self.selector: Selector = components.build("selector", config.selector)

    @torch.no_grad()
    def forward(self, view: TokenView, sessions: Tensor) -> RowSelection:
        """What each row keeps, or merges.

        Args:
            view: the events. ``view.groups``, such as the codes of one item, are kept or dropped whole.
            sessions: int64 ``[S]``, equal and adjacent for the events of a session; none cuts a group in two.

        Raises:
            ConfigError: groups shall be merged, or a relevance is negative, not a number, or not one for each session.
            DataError: the sessions are not one number for each event, or cut a group.
        """
        each, quota = self._each_session(view, sessions), self.quotas(view, sessions)
        if self.config.fill == "merge":
            return merged(view, each, quota)
        chosen = self.selector.select(each, self.scorer.score(view), quota)
        return RowSelection.of_mask(chosen.mask(), view.offsets)

    @torch.no_grad()
    def quotas(self, view: TokenView, sessions: Tensor) -> Tensor:
        """int64 ``[G]``: how many units each session keeps besides its protected ones; for arguments and errors see `forward`."""
        each = self._each_session(view, sessions)
        judged, _ = replace(view, groups=sessions).units()
        caps = free_units(each)
        if self.config.cap is not None:
            caps = caps.clamp(max=self.config.cap)
        totals = keep_counts(view, share=self.config.share, count=self.config.events)
        weights = self._weights(judged)
        fits = (ranks(weights, judged.offsets) + 1) * self.config.floor <= totals[judged.rows]
        floors = torch.where(fits, caps.clamp(max=self.config.floor), 0)
        return allocate(weights, judged.offsets, totals, caps, floors)

    def _weights(self, judged: TokenView) -> Tensor:
        relevance = self.relevance(judged)
        if relevance.shape != (len(judged.values),) or bool((~(relevance >= 0) | relevance.isinf()).any()):
            raise ConfigError(
                f"quota: relevance: expected a number of at least 0 for each of the {len(judged.values)} sessions, "
                f"got {tuple(relevance.shape)}: {relevance}"
            )
        return (100 * relevance.double()) ** self.config.exponent

    def _each_session(self, view: TokenView, sessions: Tensor) -> TokenView:
        """The same events with the sessions as rows."""
        if sessions.shape != (len(view.values),):
            raise DataError(f"quota: sessions: expected one for each of the {len(view.values)} events, got {tuple(sessions.shape)}")
        judged, session = replace(view, groups=sessions).units()
        if view.groups is not None:
            units, unit = view.units()
            first = torch.full((len(units.values),), len(session), device=unit.device).scatter_reduce(0, unit, session, "amin")
            if bool((first[unit] != session).any()):
                raise DataError("quota: sessions: expected all tokens of a group in one session")
        context = None if view.context is None else view.context[judged.rows]
        return replace(view, offsets=offsets_of(torch.bincount(session, minlength=len(judged.values))), context=context)


@register("selector", "quota")
class SessionQuota(Selector):
    """QuoTA's allocation as a selector: sessions are runs of ``session`` units, counted back from a row's last one.

    A session's relevance is the mean of its units' scores, those below 0 counting as 0; its quota is filled with its own best or last ones.
    """

    class Config(BaseConfig):
        """How a budget is shared out and filled.

        Attributes:
            session: units of a session.
            exponent: of the relevance; 0 shares out evenly.
            floor: units that each session gets where it has them; the most relevant first, where the budget does not reach for all.
            within: what fills a quota: the highest scores, or the latest units.
        """

        name: Literal["quota"] = "quota"
        session: int = Field(20, ge=1)
        exponent: float = Field(2.0, ge=0.0)
        floor: int = Field(0, ge=0)
        within: Literal["score", "recent"] = "score"

    def __init__(self, config: Config) -> None:
        self.config = config

    def choose(self, units: TokenView, scores: Tensor, free: Tensor, k: Tensor | None) -> Tensor:
        """See `Selector.choose`."""
        totals, rows = needed(k, "quota"), units.rows
        runs = -(-units.lengths // self.config.session)
        session = offsets_of(runs)[1:][rows] - 1 - (units.from_end - 1) // self.config.session
        offsets, count = offsets_of(runs), int(runs.sum())
        caps = torch.zeros(count, dtype=torch.long, device=rows.device).index_add(0, session, free.long())
        weights = group_means(scores.double().clamp(min=0), session, count) ** self.config.exponent
        fits = (ranks(weights, offsets) + 1) * self.config.floor <= totals[row_of(offsets)]
        quota = allocate(weights, offsets, totals, caps, torch.where(fits, caps.clamp(max=self.config.floor), 0))
        order = scores if self.config.within == "score" else units.positions.to(scores.dtype)
        inside = ranks(order.masked_fill(~free, -torch.inf), offsets_of(torch.bincount(session, minlength=count)))
        return free & (inside < quota[session])


def context_relevance(sessions: TokenView) -> Tensor:
    """The highest cosine of a session's mean with the row's context, ``[G]``; 0 for one that points away from it.

    Raises:
        ConfigError: there is no context.
    """
    return ContextSimilarity(ContextSimilarity.Config()).score(sessions).clamp(min=0)


def merged(view: TokenView, each: TokenView, quota: Tensor) -> RowSelection:
    """Averages of consecutive events: event j of a session of n goes into the ``⌊j quota / n⌋``-th of its averages.

    With n a multiple of the quota that is adaptive average pooling, whose windows overlap otherwise; here every event counts once. An
    average stands in the place of its last event. Protected events stay themselves and are in no average; a session without quota is gone.

    Args:
        view: the events.
        each: the same with the sessions as rows.
        quota: int64 ``[G]``, at most the unprotected events of each session.

    Raises:
        ConfigError: the view has groups, of which an average makes no sense.
    """
    if view.groups is not None:
        raise ConfigError("quota: fill: groups of tokens can be kept or dropped, not merged; expected 'select'")
    protected = torch.zeros(len(view.values), dtype=torch.bool, device=view.offsets.device) if view.protected is None else view.protected
    goes = ~protected & (quota[each.rows] > 0)
    place, session = goes.nonzero()[:, 0], each.rows[goes]
    counts = torch.bincount(session, minlength=len(each))
    inside = torch.arange(len(place), device=place.device) - offsets_of(counts)[session]
    number = offsets_of(quota)[session] + inside * quota[session] // counts[session]
    sizes = torch.bincount(number, minlength=int(quota.sum()))
    last = torch.zeros(len(sizes), dtype=torch.long, device=place.device).scatter_reduce(0, number, place, "amax", include_self=False)
    keep = protected.clone()
    keep[last] = True
    selection = RowSelection.of_mask(keep, view.offsets)
    to = keep.long().cumsum(0) - 1
    into = torch.where(protected, to, -1)
    into[place] = to[last[number]]
    weights = protected.to(view.values.dtype)
    weights[place] = 1 / sizes[number].to(weights.dtype)
    return replace(selection, merge=Merge(into, weights))
