# SPDX-License-Identifier: Apache-2.0
"""Pruning inside a model: after some layers only a part of the tokens goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import TokenScorer
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import Selector
from recsys.efficiency.view import TokenView, free_units

ProbedLayer: TypeAlias = Callable[[TokenView], tuple[Tensor, LayerProbe]]
"""A layer over jagged tokens: its new vectors ``[S, d]``, and what it saw and made."""


class StopTest(Protocol):
    """Whether the tokens that are left have said all they can say."""

    def stop(self, view: TokenView, probe: LayerProbe) -> Tensor:
        """bool ``[B]``: rows that go on with their protected tokens alone."""
        ...


class PruneSchedule(nn.Module):
    """After the layers of ``keep`` a share of the original tokens goes on: the best by a scorer that has seen those layers.

    The last token of every row always goes on where nothing is protected: it holds the state that a causal model is read from.
    """

    class Config(BaseConfig):
        """When, by what, and how much.

        Attributes:
            keep: for each layer after which tokens are dropped, counted from 0, the share of the original unprotected units that goes on.
            scorer: judges the tokens.
            selector: keeps the share.
            stop: after ``stop_layer``, whether all unprotected tokens are dropped; see `StopTest`. Null for no such test.
            stop_layer: see ``stop``.
        """

        keep: Mapping[int, float] = Field(default_factory=dict)
        scorer: component_config("token_scorer")  # type: ignore[valid-type]
        selector: component_config("selector")  # type: ignore[valid-type]
        stop: component_config("stop_test", optional=True) = None  # type: ignore[valid-type]
        stop_layer: int | None = Field(default=None, ge=0)

        @model_validator(mode="after")
        def _shares_fall(self) -> Self:
            shares = [share for _, share in sorted(self.keep.items())]
            if any(layer < 0 for layer in self.keep) or any(not 0.0 < share <= 1.0 for share in shares):
                raise ValueError(f"keep: expected layers from 0 with shares above 0 and at most 1, got {dict(self.keep)}")
            if shares != sorted(shares, reverse=True):
                raise ValueError(f"keep: expected shares of the original tokens that do not rise with the layers, got {dict(self.keep)}")
            if (self.stop is None) != (self.stop_layer is None):
                raise ValueError(f"stop_layer: expected one exactly where there is a stop test, got {self.stop_layer!r}")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.scorer: TokenScorer = components.build("token_scorer", config.scorer)
        self.selector: Selector = components.build("selector", config.selector)
        self.stop: StopTest | None = None if config.stop is None else components.build("stop_test", config.stop)

    def require(self, layers: int) -> None:
        """Check that it drops tokens after some of the first ``layers`` layers only.

        Raises:
            ConfigError: it does not.
        """
        used = [*self.config.keep, *([] if self.config.stop_layer is None else [self.config.stop_layer])]
        if used and max(used) >= layers:
            raise ConfigError(f"keep, stop_layer: expected some of the first {layers} layers, counted from 0, got {max(used)}")

    def forward(self, layers: Sequence[ProbedLayer], view: TokenView) -> tuple[Tensor, RowSelection]:
        """The vectors ``[S', d]`` after all layers of the tokens that went through, and which these are.

        Raises:
            ConfigError: a layer of the schedule is not among ``layers``.
        """
        self.require(len(layers))
        view = view if view.protected is not None else replace(view, protected=view.from_end == 1)
        original, chosen, carried = free_units(view), RowSelection.all(view), None
        for number, layer in enumerate(layers):
            values, probe = layer(view)
            view, probe = view.with_values(values), replace(probe, layer=number, carried=carried)
            carried = self.scorer.carry(view, probe)
            selection = self._select(view, replace(probe, carried=carried), original)
            if selection is not None:
                view, chosen = selection.view(view), chosen.compose(selection)
                carried = None if carried is None else selection.gather(carried)
        return view.values, chosen

    def _select(self, view: TokenView, probe: LayerProbe, original: Tensor) -> RowSelection | None:
        selection = None
        if probe.layer in self.config.keep:
            wanted = (original.double() * self.config.keep[probe.layer]).round().long().clamp(min=1)
            scores = self.scorer.score(view, probe)
            selection = self.selector.select(view, scores, torch.minimum(wanted, free_units(view)))
        if self.stop is not None and probe.layer == self.config.stop_layer:
            units, unit = view.units()
            assert units.protected is not None
            stays = units.protected[unit] | ~self.stop.stop(view, probe)[view.rows]
            stays = stays if selection is None else stays & selection.mask()
            selection = RowSelection.of_mask(stays, view.offsets)
        return selection
