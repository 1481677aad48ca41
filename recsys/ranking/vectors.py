# SPDX-License-Identifier: Apache-2.0
"""What a ranker reads of its tables: plain tensors, from which everything up to the logits is computed without looking anything up."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from recsys.data.batch import RankingBatch, TiledBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import Embedded
from recsys.ranking.history import Reads


@dataclass(frozen=True)
class Vectors:
    """The inputs of R rows.

    Attributes:
        pooled: ``[R, W]``: the vectors of the pooled keys, one after another.
        values: vectors by key: of each sequence's keys ``[N, width]``, of its target ``[R, width]``.
        reads: by sequence, which of its N events each row reads.
        dense: float32 ``[R, D]``.
    """

    pooled: Tensor
    values: Mapping[str, Tensor]
    reads: Mapping[str, Reads]
    dense: Tensor


def vectors(embedded: Embedded, batch: RankingBatch | TiledBatch, spec: InputSpec) -> Vectors:
    """What was looked up for a batch. Of a `TiledBatch`, users' vectors are repeated for their rows; their histories are not.

    Args:
        embedded: of ``batch``.
        batch: the inputs.
        spec: of the inputs.
    """
    if isinstance(batch, TiledBatch):
        return _tiled(embedded, batch, spec)
    values = {key: jagged.values() for key, jagged in embedded.sequences.items()}
    reads = {s.name: Reads.own(embedded.sequences[s.keys[0]].lengths(), values[s.keys[0]].shape[0]) for s in spec.sequences}
    return Vectors(embedded.pooled.values(), values, reads, batch.dense)


def _tiled(embedded: Embedded, batch: TiledBatch, spec: InputSpec) -> Vectors:
    values = {key: jagged.values() for key, jagged in embedded.sequences.items()}
    reads: dict[str, Reads] = {}
    for sequence in spec.sequences:
        item = sequence.keys[0]
        lengths = embedded.sequences[item].lengths()
        if item in batch.once:
            reads[sequence.name] = Reads.shared(lengths[: batch.users], batch.user_of_row)
        else:
            reads[sequence.name] = Reads.own(lengths, values[item].shape[0])
    for target in {sequence.target for sequence in spec.sequences} & batch.once:
        values[target] = values[target].index_select(0, batch.user_of_row)
    return Vectors(_repeated(embedded.pooled, batch), values, reads, batch.batch.dense)


def _repeated(pooled: KeyedTensor, batch: TiledBatch) -> Tensor:
    """``[R, W]``: users' vectors repeated for their rows, by runs of keys that stand side by side."""
    widths = zip(pooled.keys(), pooled.length_per_key(), strict=True)
    runs = [(once, sum(width for _, width in run)) for once, run in groupby(widths, lambda key: key[0] in batch.once)]
    parts = pooled.values().split([width for _, width in runs], dim=1) if runs else ()
    rows = [part[: batch.users].index_select(0, batch.user_of_row) if once else part for (once, _), part in zip(runs, parts, strict=True)]
    return torch.cat(rows, dim=1) if rows else pooled.values()
