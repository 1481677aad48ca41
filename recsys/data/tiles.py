# SPDX-License-Identifier: Apache-2.0
"""Encoded rows of a join, each side once: R candidates of B users, of which batches are made without writing the join out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from recsys.data.batch import RankingBatch, TiledBatch
from recsys.data.encoded import EncodedRows
from recsys.data.spec import InputSpec


@dataclass(frozen=True)
class Part:
    """N rows of some of a ranker's inputs.

    Attributes:
        rows: with the keys of these inputs alone, in the order of the spec.
        dense: the names of their dense columns.
    """

    rows: EncodedRows
    dense: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> frozenset[str]:
        """The keys that it has."""
        return frozenset((*self.rows.sparse.keys, *self.rows.sequences.keys))

    def take(self, rows: np.ndarray) -> Self:
        """Only these rows, copied."""
        return type(self)(self.rows.take(rows), self.dense)


@dataclass(frozen=True)
class TiledRows:
    """R candidates: row r is user ``user_of_row[r]`` beside item ``item_of_row[r]``.

    Attributes:
        spec: of all inputs; each is in exactly one of the two parts.
        users: B ≤ R rows.
        items: M rows.
        user_of_row: int64 ``[R]``.
        item_of_row: int64 ``[R]``; None where row r is item r.
    """

    spec: InputSpec
    users: Part
    items: Part
    user_of_row: np.ndarray
    item_of_row: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_of_row)

    def rows(self) -> EncodedRows:
        """The join, written out."""
        users, items = self.users.take(self.user_of_row).rows, self._items()
        return EncodedRows(
            users.sparse.beside(items.sparse, self.spec.bag_keys),
            users.sequences.beside(items.sequences, self.spec.sequence_keys),
            self._dense(users.dense, items.dense),
        )

    def batch(self) -> TiledBatch:
        """The join as a batch in which what is a user's is there once."""
        users, items, rows = self.users.rows, self._items(), torch.from_numpy(self.user_of_row)
        sparse, sequences = users.sparse.extended(len(self)), users.sequences.extended(len(self))
        batch = RankingBatch(
            sparse.beside(items.sparse, self.spec.bag_keys).keyed(),
            sequences.beside(items.sequences, self.spec.sequence_keys).keyed(),
            self._dense(users.dense.index_select(0, rows), items.dense),
        )
        return TiledBatch(batch, len(users), rows, self.users.keys)

    def _items(self) -> EncodedRows:
        return self.items.rows if self.item_of_row is None else self.items.take(self.item_of_row).rows

    def _dense(self, users: Tensor, items: Tensor) -> Tensor:
        dense = torch.empty(len(self), len(self.spec.dense))
        for part, values in ((self.users, users), (self.items, items)):
            dense[:, _places(part.dense, self.spec.dense)] = values
        return dense


def _places(names: Sequence[str], among: Sequence[str]) -> list[int]:
    return [among.index(name) for name in names]
