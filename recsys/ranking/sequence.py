# SPDX-License-Identifier: Apache-2.0
"""Pooling of histories: a jagged history and a candidate become one field vector, which joins the other fields among the tokens."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.data.spec import SequenceSpec
from recsys.ranking.mlp import mlp


def segment_sum(values_n: Tensor, row_n: Tensor, rows: int) -> Tensor:
    """Sum the values of each row: ``[N, …]`` and int64 ``[N]`` to ``[rows, …]``; a row without values gets zero."""
    return values_n.new_zeros(rows, *values_n.shape[1:]).index_add(0, row_n, values_n)


def segment_softmax(scores_nh: Tensor, row_n: Tensor, rows: int) -> Tensor:
    """Softmax over the events of each row, for each column alone: ``[N, H] → [N, H]``."""
    highest_bh = scores_nh.new_full((rows, scores_nh.shape[1]), -torch.inf)
    highest_bh = highest_bh.scatter_reduce(0, row_n[:, None].expand_as(scores_nh), scores_nh.detach(), "amax")
    weights_nh = (scores_nh - highest_bh[row_n]).exp()
    return weights_nh / segment_sum(weights_nh, row_n, rows)[row_n]


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

    def forward(self, target_bd: Tensor, events_nd: Tensor, row_n: Tensor) -> Tensor:
        """Pool the N events of B rows: ``[B, d]``; zero for a row without events."""
        target_nd = target_bd[row_n]
        weights_n1 = self.weigh(torch.cat([events_nd, target_nd, events_nd - target_nd, events_nd * target_nd], dim=1))
        return segment_sum(weights_n1 * events_nd, row_n, target_bd.shape[0])


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

    def forward(self, target_bd: Tensor, events_nd: Tensor, row_n: Tensor) -> Tensor:
        """Pool the N events of B rows: ``[B, d]``; zero for a row without events."""
        query_bhd, key_nhd, value_nhd = (
            project(x).unflatten(1, (self.heads, -1))
            for project, x in ((self.query, target_bd), (self.key, events_nd), (self.value, events_nd))
        )
        scores_nh = (query_bhd[row_n] * key_nhd).sum(dim=2) / key_nhd.shape[2] ** 0.5
        weights_nh = segment_softmax(scores_nh, row_n, target_bd.shape[0])
        pooled_bhd = segment_sum(weights_nh[:, :, None] * value_nhd, row_n, target_bd.shape[0])
        out_bd: Tensor = self.out(pooled_bhd.flatten(1))
        return out_bd


class TargetAttention(nn.Module):
    """One history as seen from the candidate (Deep Interest Network, arXiv 1706.06978).

    An event's vector is its item's embedding plus a learned projection of each aligned extra, so that it stays in the space of the
    candidate's embedding, with which it shares a table. A row without events gets a learned vector, zero at first.

    Args:
        config: see `Config`.
        sequence: which keys hold the events and the candidate.
        dim: d, the width of all embeddings and of the result.
    """

    class Config(BaseConfig):
        """How events are weighed.

        Attributes:
            unit: ``mlp``, DIN's activation unit, or ``dot``, multi-head attention.
            hidden: the activation unit's hidden widths (``mlp`` alone).
            heads: attention heads (``dot`` alone).
        """

        unit: Literal["mlp", "dot"] = "mlp"
        hidden: tuple[int, ...] = (80, 40)
        heads: int = Field(1, ge=1)

    def __init__(self, config: Config, sequence: SequenceSpec, dim: int) -> None:
        super().__init__()
        self.sequence = sequence
        self.extras = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in sequence.keys[1:])
        self.unit = ActivationUnit(dim, config.hidden) if config.unit == "mlp" else DotAttention(dim, config.heads)
        self.empty = nn.Parameter(torch.zeros(dim))

    def forward(self, sequences: Mapping[str, JaggedTensor]) -> Tensor:
        """Pool the history of each row.

        Args:
            sequences: embeddings of the spec's keys and of its target, the latter one per row.

        Returns:
            ``[B, d]``.

        Raises:
            DataError: the keys are not aligned, or a row does not have exactly one target.
        """
        name, target = self.sequence.name, self.sequence.target
        lengths_b = sequences[self.sequence.keys[0]].lengths()
        target_bd = sequences[target].values()
        if target_bd.shape[0] != lengths_b.shape[0]:
            raise DataError(f"{name}: expected one {target!r} for each of {lengths_b.shape[0]} rows, got {target_bd.shape[0]}")
        events_nd = self.events(sequences)
        row_n = torch.repeat_interleave(lengths_b.long(), output_size=events_nd.shape[0])
        return torch.where(lengths_b[:, None] > 0, self.unit(target_bd, events_nd, row_n), self.empty)

    def events(self, sequences: Mapping[str, JaggedTensor]) -> Tensor:
        """The vectors of all events, one history after another: ``[N, d]``."""
        item, *extras = self.sequence.keys
        events_nd: Tensor = sequences[item].values()
        for key, project in zip(extras, self.extras, strict=True):
            values_nd = sequences[key].values()
            if values_nd.shape[0] != events_nd.shape[0]:
                expected = f"as many values of {key!r} as of {item!r} ({events_nd.shape[0]})"
                raise DataError(f"{self.sequence.name}: expected {expected}, got {values_nd.shape[0]}")
            events_nd = events_nd + project(values_nd)
        return events_nd
