# SPDX-License-Identifier: Apache-2.0
"""What a sweep trains rankers on: a Protocol, and planted impressions behind it.

A source is a class ``cls(config)`` registered with ``@register("scaling_data", name)``; a recipe says ``data: {name: ..., ...}``.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.components import register
from recsys.core.errors import DataError
from recsys.data.batch import RankingBatch
from recsys.data.cursor import Resumable
from recsys.data.loader import Loader
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.scaling.bounds import bounds
from recsys.scaling.planted import BLOCK, Impressions, Planted, Rows

_TRAIN_ROWS = 1 << 32  # each seed's own; held-out rows lie beyond those of every seed
_VALID, _TEST, _REFERENCE = 1 << 60, (1 << 60) + (1 << 40), (1 << 60) + (1 << 41)
_FIRST_ROW = 2  # rows 0 and 1 of a table stand for no value and for an unknown one


class ScalingData(Protocol):
    """Impressions of one task, of which any number can be trained on."""

    @property
    def spec(self) -> InputSpec:
        """The inputs of all batches; the first task is measured."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the content of every batch, fit for JSON."""
        ...

    def train(self, rows: int, seed: int, batch_size: int) -> Loader[RankingBatch]:
        """``rows`` rows in an order of ``seed``'s own, resumable; fewer rows of one seed are among its more rows.

        Raises:
            DataError: there are not so many.
        """
        ...

    def valid(self, batch_size: int) -> Iterator[RankingBatch]:
        """Held-out rows, for early stopping."""
        ...

    def test(self, batch_size: int) -> Iterator[RankingBatch]:
        """Other held-out rows, which a finished model is measured on once."""
        ...

    def references(self) -> Mapping[str, float]:
        """Values to compare with by name. ``auc`` and ``log_loss`` are bounds that no model can pass; empty where none are known."""
        ...


@register("scaling_data", "planted")
class PlantedData:
    """`Planted` impressions as a source. Each seed trains on rows of its own; held-out rows are the same for all."""

    class Config(Impressions):
        """Impressions, and how many are held out.

        Attributes:
            valid: rows for early stopping.
            test: rows that finished models are measured on.
            reference: rows from which the bounds are computed.
        """

        name: Literal["planted"] = "planted"
        valid: int = Field(50_000, ge=1)
        test: int = Field(200_000, ge=1)
        reference: int = Field(500_000, ge=1000)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.planted = Planted(config)

    @cached_property
    def spec(self) -> InputSpec:
        """See `ScalingData.spec`. The candidate and the history share a table; every event has its age beside it.

        Its groups are the planted ones, one more for the candidate and its history, and one for the dense columns.
        """
        config = self.config
        tables = [
            TableSpec(name=name, rows=int(rows) + _FIRST_ROW, bags=(name,))
            for name, rows in zip(self._fields, self.planted.cardinalities, strict=True)
        ]
        groups = {f"group{i}": tuple(self._fields[f] for f in group) for i, group in enumerate(self.planted.groups)}
        sequences: tuple[SequenceSpec, ...] = ()
        if config.history:
            tables.append(TableSpec(name="catalogue", rows=config.items + _FIRST_ROW, sequences=("history_item", "item")))
            tables.append(TableSpec(name="age", rows=config.history + _FIRST_ROW, sequences=("history_age",)))
            sequences = (SequenceSpec(name="history", keys=("history_item", "history_age"), target="item"),)
            groups["item"] = ("item", "history")
        if self._dense:
            groups["dense"] = self._dense
        return InputSpec(tables=tuple(tables), sequences=sequences, dense=self._dense, tasks=("click",), groups=groups)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The configuration; ``reference`` decides no batch."""
        return self.config.model_dump(mode="json", exclude={"reference"})

    def train(self, rows: int, seed: int, batch_size: int) -> "PlantedLoader":
        """See `ScalingData.train`."""
        if rows > _TRAIN_ROWS:
            raise DataError(f"rows: expected at most {_TRAIN_ROWS}, got {rows}")
        return PlantedLoader(self, seed * _TRAIN_ROWS, rows, seed=seed, batch_size=batch_size)

    def valid(self, batch_size: int) -> Iterator[RankingBatch]:
        """See `ScalingData.valid`."""
        return (self.batch(rows) for rows in self.planted.blocks(_VALID, self.config.valid, batch_size))

    def test(self, batch_size: int) -> Iterator[RankingBatch]:
        """See `ScalingData.test`."""
        return (self.batch(rows) for rows in self.planted.blocks(_TEST, self.config.test, batch_size))

    def references(self) -> dict[str, float]:
        """The values of `bounds`, and ``<name>_error`` for the standard error of each."""
        found = bounds(self.planted, _REFERENCE, self.config.reference)
        values = {name: estimate.value for name, estimate in found.items()}
        return values | {f"{name}_error": estimate.error for name, estimate in found.items()}

    def batch(self, rows: Rows) -> RankingBatch:
        """Rows as a ranker takes them."""
        values = torch.from_numpy(np.ascontiguousarray(rows.values.T)).flatten() + _FIRST_ROW
        sparse = KeyedJaggedTensor(keys=list(self._fields), values=values, lengths=torch.ones(len(values), dtype=torch.int64))
        return RankingBatch(
            sparse, self._sequences(rows), torch.from_numpy(rows.dense.copy()), torch.from_numpy(rows.labels[:, None].copy())
        )

    def _sequences(self, rows: Rows) -> KeyedJaggedTensor:
        if not self.config.history:
            return KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64))
        ages = np.arange(self.config.history)[::-1]  # oldest first
        there = ages < rows.lengths[:, None]
        items, age = rows.events[:, ::-1][there], np.broadcast_to(ages, there.shape)[there]
        values = np.concatenate([items, rows.candidate, age]) + _FIRST_ROW
        lengths = np.concatenate([rows.lengths, np.ones_like(rows.lengths), rows.lengths])
        keys = ["history_item", "item", "history_age"]
        return KeyedJaggedTensor(keys=keys, values=torch.from_numpy(values), lengths=torch.from_numpy(lengths))

    @property
    def _fields(self) -> tuple[str, ...]:
        return tuple(f"field{i:02}" for i in range(self.config.fields))

    @property
    def _dense(self) -> tuple[str, ...]:
        return tuple(f"dense{i}" for i in range(self.config.dense))


class PlantedLoader(Resumable):
    """Batches of rows ``start`` to ``start + rows - 1``: blocks of 4096 rows permuted by (seed, epoch), and the rows of each block.

    Args:
        data: the source.
        start: the first row, a multiple of 4096.
        rows: how many.
        seed: of the order.
        batch_size: rows per batch; the last batch of an epoch may have fewer.
    """

    def __init__(self, data: PlantedData, start: int, rows: int, *, seed: int, batch_size: int) -> None:
        if rows < 1 or batch_size < 1:
            raise DataError(f"rows and batch_size: expected at least 1, got {rows} and {batch_size}")
        super().__init__(rows)
        self.rows, self.batch_size = rows, batch_size
        self._data, self._start, self._seed = data, start, seed

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[RankingBatch]:
        """The batches of the current epoch, from its beginning, or right after `load_state_dict` from the loaded cursor."""
        kept: Rows | None = None
        for block in self._blocks(self._epoch, self._begin()):
            kept = block if kept is None else Rows.concatenate([kept, block])
            while len(kept.labels) >= self.batch_size:
                yield self._hand_out(kept[: self.batch_size])
                kept = kept[self.batch_size :]
        if kept is not None and len(kept.labels):
            yield self._hand_out(kept)

    def _hand_out(self, rows: Rows) -> RankingBatch:
        self._samples += len(rows.labels)
        return self._data.batch(rows)

    def _blocks(self, epoch: int, done: int) -> Iterator[Rows]:
        """The rows of the epoch in order, without the first ``done``."""
        for number in np.random.default_rng([self._seed, epoch]).permutation(-(-self.rows // BLOCK)):
            size = min(BLOCK, self.rows - int(number) * BLOCK)
            if done < size:
                rows = self._data.planted.rows(self._start + int(number) * BLOCK, size)
                yield rows[np.random.default_rng([self._seed, epoch, int(number)]).permutation(size)[done:]]
            done = max(0, done - size)
