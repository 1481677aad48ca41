# SPDX-License-Identifier: Apache-2.0
"""ToDRE: a diverse part of a history goes in, and late in the model nothing of it goes on once nobody looks at it."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.transprune import context_attention
from recsys.efficiency.scoring import Random
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import MMR
from recsys.efficiency.view import TokenView, free_tokens, held, row_sums, to_padded


class DiverseRetention(HistoryPruning):
    """The first stage, in front of a model: events that are as different as can be.

    §1 of the specification. The first version of the paper takes the event farthest from all that is kept (k-center), the second the one of
    the lowest sum of cosines (max-sum). The first is the default here: max-sum piles up at the extremes and misses clusters.

    Both begin at the pivot, the event of the highest score: a random one as configured, the most important one by any other scorer. The
    paper's pivot by attention needs a probe: inside a model, use `PruneSchedule` with the scorer ``transprune`` (``alpha: 0``) and this
    selector. Events that are always kept (``recent``) are kept from the start and take the pivot's place.

    K-center loves outliers. Blend importance in by the selector's ``importance`` where clicks may be a bot's.
    """

    class Config(HistoryPruning.Config):
        """How much is kept; see `HistoryPruning.Config` for the other keys.

        Attributes:
            scorer: whose highest score is the pivot.
            selector: ``similarity: nearest`` is k-center, ``total`` is max-sum.
        """

        scorer: component_config("token_scorer") = Random.Config()  # type: ignore[valid-type]
        selector: MMR.Config = MMR.Config(importance=0.0)


@register("stop_test", "todre")
class InformationMigration:
    """The second stage: whether the context has stopped looking at what can be dropped.

    §1 of the specification: a row stops where ``α_{t→v} < τ``, the share of the context's attention that falls on prunable tokens, the mean
    over heads and context tokens. The paper asks the same of ``α_{v→t}``; with the history before the target under a causal mask that is
    always 0, so it is left out here. The attention of the context is counted over the tokens of the row, of which the protected ones are
    the others: a row without any never stops, unless τ is above 1.
    """

    class Config(BaseConfig):
        """The threshold.

        Attributes:
            threshold: τ. 0 never stops, above 1 always.
        """

        name: Literal["todre"] = "todre"
        threshold: float = Field(0.1, ge=0.0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def stop(self, view: TokenView, probe: LayerProbe) -> Tensor:
        """See `StopTest.stop`.

        Raises:
            ConfigError: the probe has no queries of the context, or no keys.
        """
        return self.share(view, probe) < self.config.threshold

    def share(self, view: TokenView, probe: LayerProbe) -> Tensor:
        """``α_{t→v}`` of each row, ``[B]``; 0 for a row without prunable tokens."""
        attention = torch.where(free_tokens(view), context_attention(view, probe, "stop_test 'todre'"), 0.0)
        return row_sums(attention, view.offsets)


def late_layer(depth: int) -> int:
    """The layer, counted from 0, after which the paper tests: the ⌊7 depth / 8⌋-th.

    Raises:
        ConfigError: there are fewer than 2 layers.
    """
    if depth < 2:
        raise ConfigError(f"late_layer: depth: expected at least 2 layers, got {depth}")
    return 7 * depth // 8 - 1


def coverage_radius(view: TokenView, selection: RowSelection) -> Tensor:
    """The largest distance of a token to the nearest kept one of its row, ``[B]``; 0 for an empty row, infinite where nothing is kept.

    The distance is the chord between vectors on the unit sphere, ``√(2 − 2 cos)``: a metric, by which the farthest-first traversal is
    within twice the optimum.
    """
    units = nn.functional.normalize(view.values, dim=-1)
    width = int(selection.lengths.max()) if len(view) else 0
    all_bld, kept_bkd = to_padded(units, view.offsets), to_padded(units[selection.index], selection.offsets)
    squares = (2 - 2 * all_bld @ kept_bkd.transpose(1, 2)).clamp(min=0).masked_fill(~held(selection.lengths, width)[:, None], torch.inf)
    if not width:
        return torch.where(view.lengths > 0, torch.inf, 0.0).to(units.dtype)
    nearest = squares.amin(2).masked_fill(~held(view.lengths, all_bld.shape[1]), 0.0)
    return nearest.amax(1).sqrt()
