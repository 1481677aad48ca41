# SPDX-License-Identifier: Apache-2.0
"""Pruning a history before a model reads it: which events are worth the places that there are."""

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import nn

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config as BaseConfig
from recsys.efficiency.budget import keep_counts
from recsys.efficiency.scoring import TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import Selector
from recsys.efficiency.view import TokenView


class HistoryPruning(nn.Module):
    """Keeps a share or a number of each history's events, in their order; the last ones always.

    What the others are judged for, a scorer's context, is the last events of the history where the caller gives no other.

    Args:
        config: see `Config`.
        scorer: in the place of the configured one, for what no recipe can say, such as counts of the training data.
    """

    class Config(BaseConfig):
        """How much is kept, and of what.

        Attributes:
            share: of each history's events, in (0, 1].
            events: the number kept, in the place of a share; shorter histories stay whole.
            scorer: judges the events.
            selector: keeps them by their scores.
            recent: the last events that are always kept; they count as kept.
            context: how many last events the others are judged for.
            min_length: histories of at most so many events stay whole.
            reach: the last events that are looked at; whoever hands histories over need not hand over more.
        """

        share: float | None = Field(default=None, gt=0.0, le=1.0)
        events: int | None = Field(default=None, ge=1)
        scorer: component_config("token_scorer")  # type: ignore[valid-type]
        selector: component_config("selector")  # type: ignore[valid-type]
        recent: int = Field(default=1, ge=0)
        context: int = Field(default=1, ge=1)
        min_length: int = Field(default=0, ge=0)
        reach: int = Field(default=2500, ge=1)

        @model_validator(mode="after")
        def _one_budget(self) -> Self:
            if (self.share is None) == (self.events is None):
                raise ValueError(f"share, events: expected exactly one of them, got share={self.share!r} and events={self.events!r}")
            if self.events is not None and self.recent > self.events:
                raise ValueError(f"recent: expected at most events={self.events}, got {self.recent}")
            return self

    def __init__(self, config: Config, scorer: TokenScorer | None = None) -> None:
        super().__init__()
        self.config = config
        self.scorer: TokenScorer = scorer or components.build("token_scorer", config.scorer)
        self.selector: Selector = components.build("selector", config.selector)

    @torch.no_grad()
    def forward(self, view: TokenView) -> RowSelection:
        """What each history keeps; ``view.groups`` are kept or dropped whole."""
        seen = RowSelection.of_mask(view.from_end <= self.config.reach, view.offsets)
        return seen.compose(self._choose(self._judged(seen.view(view))))

    def _choose(self, view: TokenView) -> RowSelection:
        kept = keep_counts(view, share=self.config.share, count=self.config.events)
        chosen = self.selector.select(view, self.scorer.score(view), kept)
        short = view.lengths <= max(self.config.min_length, self.config.events or 0)
        return RowSelection.of_mask(chosen.mask() | short[view.rows], view.offsets) if bool(short.any()) else chosen

    def _judged(self, view: TokenView) -> TokenView:
        """The view with what is protected and, where there is none, a context."""
        recent = view.from_end <= self.config.recent
        protected = recent if view.protected is None else recent | view.protected
        context = last_events(view, self.config.context) if view.context is None else view.context
        return replace(view, protected=protected, context=context)


def last_events(view: TokenView, count: int) -> torch.Tensor:
    """``[B, count, d]``: the last events of each row, the very last one again where there are fewer; zeros for an empty row."""
    back = torch.minimum(torch.arange(count, 0, -1, device=view.offsets.device), view.lengths[:, None]).clamp(min=1)
    places = (view.offsets[1:, None] - back).clamp(min=0)
    if not len(view.values):
        return view.values.new_zeros(*places.shape, view.values.shape[1])
    return view.values[places] * (view.lengths > 0)[:, None, None]
