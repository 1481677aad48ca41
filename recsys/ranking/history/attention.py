# SPDX-License-Identifier: Apache-2.0
"""Target attention: a jagged history and a candidate become one vector."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.errors import ConfigError
from recsys.data.spec import SequenceSpec
from recsys.ranking.history.base import Events, HistoryConfig, HistoryEncoder
from recsys.ranking.history.segments import segment_softmax, segment_sum
from recsys.ranking.mlp import mlp


class ActivationUnit(nn.Module):
    """DIN's activation unit: event j weighs ``MLP([e_j, e_t, e_j − e_t, e_j ⊙ e_t])``, and the weighted events are summed.

    The weights are not normalised, so that the sum keeps the intensity of an interest (Zhou et al., arXiv 1706.06978, §4.3). PReLU is
    the paper's simpler choice beside Dice, which would make a row's result depend on its batch.

    Args:
        dim: d.
        hidden: widths of the hidden layers.
    """

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.weigh = mlp((4 * dim, *hidden, 1), activation=nn.PReLU)

    def forward(self, target_bd: Tensor, events_nd: Tensor, row_p: Tensor, event_p: Tensor | None = None) -> Tensor:
        """Pool the events of B rows, which may share them (`Events`): ``[B, d]``; zero for a row without events."""
        events_pd = events_nd if event_p is None else events_nd[event_p]
        target_pd = target_bd[row_p]
        weights_p1 = self.weigh(torch.cat([events_pd, target_pd, events_pd - target_pd, events_pd * target_pd], dim=1))
        return segment_sum(weights_p1 * events_pd, row_p, target_bd.shape[0])


class DotAttention(nn.Module):
    """Multi-head scaled dot-product attention with the candidate as the one query: ``[B, d]``.

    Args:
        dim: d.
        heads: a divisor of d.

    Raises:
        ConfigError: it is not one.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"sequence: expected heads that divide the embedding's dim, got dim={dim} and heads={heads}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, target_bd: Tensor, events_nd: Tensor, row_p: Tensor, event_p: Tensor | None = None) -> Tensor:
        """Pool the events of B rows, which may share them (`Events`): ``[B, d]``; zero for a row without events."""
        query_bhd, key_nhd, value_nhd = (
            project(x).unflatten(1, (self.heads, -1))
            for project, x in ((self.query, target_bd), (self.key, events_nd), (self.value, events_nd))
        )
        key_phd, value_phd = (key_nhd, value_nhd) if event_p is None else (key_nhd[event_p], value_nhd[event_p])
        scores_ph = (query_bhd[row_p] * key_phd).sum(dim=2) / key_phd.shape[2] ** 0.5
        weights_ph = segment_softmax(scores_ph, row_p, target_bd.shape[0])
        pooled_bhd = segment_sum(weights_ph[:, :, None] * value_phd, row_p, target_bd.shape[0])
        out_bd: Tensor = self.out(pooled_bhd.flatten(1))
        return out_bd


@register("history", "target_attention")
class TargetAttention(HistoryEncoder):
    """One history as seen from the candidate (Deep Interest Network, arXiv 1706.06978).

    A row without events gets a learned vector, zero at first.
    """

    class Config(HistoryConfig):
        """Besides the `HistoryConfig`, how events are weighed.

        Attributes:
            unit: ``mlp``, DIN's activation unit, or ``dot``, multi-head attention.
            hidden: the activation unit's hidden widths (``mlp`` alone).
            heads: attention heads (``dot`` alone).
        """

        name: Literal["target_attention"] = "target_attention"
        unit: Literal["mlp", "dot"] = "mlp"
        hidden: tuple[int, ...] = (80, 40)
        heads: int = Field(1, ge=1)

    def __init__(self, config: Config, sequence: SequenceSpec, dim: int, extra_widths: Sequence[int] | None = None) -> None:
        super().__init__(sequence, dim, extra_widths, config.pruning)
        self.unit = ActivationUnit(dim, config.hidden) if config.unit == "mlp" else DotAttention(dim, config.heads)
        self.empty = nn.Parameter(torch.zeros(dim))

    def encode(self, events: Events) -> Tensor:
        """``[B, 1, d]``."""
        pooled_bd = self.unit(events.target, events.vectors, events.row, events.event)
        return torch.where(events.lengths[:, None] > 0, pooled_bd, self.empty)[:, None]
