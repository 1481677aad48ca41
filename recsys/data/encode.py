# SPDX-License-Identifier: Apache-2.0
"""The one path from raw values to tensors: Arrow columns with a status beside every value → `RankingBatch`.

The training loader and the server both call `Encoder.transform`, so what a model saw in training is what it sees online.
"""

import operator
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import torch

from recsys.core.errors import DataError, SchemaError
from recsys.data.batch import RankingBatch
from recsys.data.encoded import EncodedRows, KeyedRows, is_wide, matrix
from recsys.data.encoding import fitted as state
from recsys.data.encoding.coders import NO_VALUE, BucketCoder, Coder, NumberCoder, StringCoder, look_up
from recsys.data.encoding.columns import Columns, Lists, Scalars
from recsys.data.encoding.config import (
    Bag,
    Bucket,
    Categorical,
    Dense,
    EncoderConfig,
    Feature,
    Identifiers,
    Sequence,
    SequenceExtra,
    Task,
    item_table,
    pooled_table,
)
from recsys.data.encoding.hashing import HashCoder, RawCoder
from recsys.data.jagged import Jagged
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq}
_Ids = np.ndarray | Jagged  # int64 [B], or a list of them for each row


class Encoder:
    """Encodes rows of features; made by `fit` or `load`.

    Every value that is null, or whose ``<feature>__status`` is not PRESENT, is no value: row 0 of its table. A value that the
    vocabulary does not hold has row 1. Numbers that are NaN or infinite count as null. In particular:

    - a bag that is not there is a bag with row 0 alone; a list that is there and empty is an empty bag;
    - a history that is not there is as empty as an empty one; it keeps its last ``max_length`` elements;
    - a target has exactly one row, which may be 0 or 1.

    Strings may come as string, large_string, string_view or dictionary; numbers as any integer, float or boolean; lists as list,
    large_list or fixed_size_list; a column of the type null stands for any. Columns that the configuration does not name are ignored.
    """

    Config = EncoderConfig

    def __init__(self, config: EncoderConfig, fitted: state.Fitted) -> None:
        self.config = config
        self._fitted = fitted
        self._coders: dict[str, Coder] = {table: StringCoder(values) for table, values in fitted.vocabularies.items()}
        self._coders |= {feature: BucketCoder(edges) for feature, edges in fitted.edges.items()}
        for feature in config.features:
            if isinstance(feature, Identifiers) and feature.rows is not None:
                table = item_table(feature) if isinstance(feature, Sequence) else pooled_table(feature)
                self._coders[table] = HashCoder(feature.rows) if feature.ids == "hashed" else RawCoder(feature.rows)
        for extra in (extra for f in config.features if isinstance(f, Sequence) for extra in f.extra):
            if extra.edges is not None:
                self._coders[extra.feature] = BucketCoder(np.array(extra.edges, dtype=np.float64))
            elif extra.values is not None:
                self._coders[extra.feature] = NumberCoder(np.array(extra.values, dtype=np.float64))

    @classmethod
    def fit(cls, config: EncoderConfig, table: pa.Table) -> Self:
        """Learn vocabularies, bucket edges and scales from the features of the training period.

        Raises:
            SchemaError: a column is absent or of another type than its encoding expects.
        """
        return cls(config, state.fit(config, Columns(table)))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read an encoder that `save` wrote.

        Raises:
            BundleError: a file is absent, cannot be read, or was changed.
        """
        return cls(*state.load(Path(directory)))

    def save(self, directory: Path) -> None:
        """Write ``encoder.json`` and ``vocabularies.arrow`` into ``directory``."""
        state.save(Path(directory), self.config, self._fitted)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of what decides an encoding, the groups left out: equal for equal encoders, on any machine."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return state.fingerprint(self.config, self._fitted)

    @cached_property
    def spec(self) -> InputSpec:
        """What `transform` produces."""
        sequences = [f for f in self.config.features if isinstance(f, Sequence)]
        return InputSpec(
            tables=tuple(self._table_specs()),
            sequences=tuple(SequenceSpec(name=f.name, keys=f.keys, target=f.target) for f in sequences),
            dense=tuple(column for f in self.config.features if isinstance(f, Dense) for column in f.columns),
            tasks=tuple(task.name for task in self.config.tasks),
            groups=self.config.groups,
        )

    def _table_specs(self) -> list[TableSpec]:
        bags: dict[str, list[str]] = {}
        sequences: dict[str, list[str]] = {}
        for feature in self.config.features:
            match feature:
                case Categorical() | Bag():
                    bags.setdefault(pooled_table(feature), []).append(feature.feature)
                case Bucket():
                    bags[feature.feature] = [feature.feature]
                case Sequence():
                    keys = sequences.setdefault(item_table(feature), [])
                    keys += [key for key in (feature.items, feature.target) if key not in keys]
                    sequences |= {extra.feature: [extra.feature] for extra in feature.extra}
        pooled = [self._table_spec(table, bags=tuple(keys)) for table, keys in bags.items()]
        return pooled + [self._table_spec(table, sequences=tuple(keys)) for table, keys in sequences.items()]

    def _table_spec(self, table: str, bags: tuple[str, ...] = (), sequences: tuple[str, ...] = ()) -> TableSpec:
        coder = self._coders[table]
        ids: Literal["rows", "raw"] = "raw" if isinstance(coder, RawCoder) else "rows"
        return TableSpec(name=table, rows=coder.rows, bags=bags, sequences=sequences, ids=ids)

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """The columns that `transform` reads, without their status columns and without labels."""
        names: list[str] = []
        for feature in self.config.features:
            names += [*feature.keys, feature.target] if isinstance(feature, Sequence) else [feature.feature]
        return tuple(dict.fromkeys(names))

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of the labels."""
        return tuple(dict.fromkeys(task.feature for task in self.config.tasks))

    @property
    def weight_column(self) -> str | None:
        """The column of the rows' weights, which is read where there are labels."""
        return self.config.weight

    @property
    def list_keys(self) -> frozenset[str]:
        """The keys that have any number of ids for a row."""
        return frozenset(key for f in self.config.features for key in _keys_of_lists(f))

    def transform(self, table: pa.Table | pa.RecordBatch) -> RankingBatch:
        """Encode B ≥ 1 rows.

        Args:
            table: the features, with status columns where there are any. Labels are all there, or none is (then the batch has none, and no
                weights either).

        Raises:
            SchemaError: a column is absent or of another type than its encoding expects.
            DataError: no rows; a null or infinite label; a null, infinite or negative weight; aligned lists of different lengths.
        """
        return self.rows(table).batch()

    def rows(self, table: pa.Table | pa.RecordBatch) -> EncodedRows:
        """Encode many rows, of which batches are gathered later; see `transform` for arguments and errors.

        Strings that come as a dictionary are looked up once for each of its values.
        """
        columns = Columns(table, dictionaries=True)
        if len(columns) == 0:
            raise DataError("expected at least one row to encode, got none")
        ids: dict[str, _Ids] = {}
        dense: list[np.ndarray] = []
        for feature in self.config.features:
            match feature:
                case Categorical():
                    ids[feature.feature] = _single(columns.strings(feature.feature), self._coders[pooled_table(feature)])
                case Bag():
                    ids[feature.feature] = _bag(columns.string_lists(feature.feature), self._coders[pooled_table(feature)])
                case Bucket():
                    ids[feature.feature] = _single(columns.numbers(feature.feature), self._coders[feature.feature])
                case Dense():
                    dense += self._dense(feature, columns.numbers(feature.feature))
                case Sequence():
                    ids |= self._sequence(feature, columns)
        labels = self._labels(columns)
        wide = is_wide(self.spec)
        return EncodedRows(
            sparse=KeyedRows.make(self.spec.bag_keys, ids, len(columns), wide=wide),
            sequences=KeyedRows.make(self.spec.sequence_keys, ids, len(columns), wide=wide),
            dense=matrix(dense, len(columns), np.float32),
            labels=labels,
            weights=None if labels is None or self.config.weight is None else _weights(self.config.weight, columns),
        )

    def _dense(self, feature: Dense, column: Scalars) -> list[np.ndarray]:
        mean, deviation = self._fitted.scales.get(feature.feature, (0.0, 1.0))
        scaled = (state.transform_dense(feature, np.where(column.present, column.numbers(), 0.0)) - mean) / deviation
        values = np.where(column.present, scaled, 0.0)
        return [values, ~column.present] if feature.indicator else [values]

    def _sequence(self, feature: Sequence, columns: Columns) -> dict[str, _Ids]:
        """The target, the items and what is aligned with them; the lengths of the items are those of every extra."""
        items = columns.string_lists(feature.items)
        kept = items.last(feature.max_length)
        coder = self._coders[item_table(feature)]
        offsets = _offsets(kept.lengths)
        encoded: dict[str, _Ids] = {
            feature.items: Jagged(look_up(coder, kept.flatten()), offsets),
            feature.target: _single(columns.strings(feature.target), coder),
        }
        for extra in feature.extra:
            lists = self._aligned(extra, feature, items, columns)
            rows = np.full(offsets[-1], NO_VALUE, dtype=np.int64)
            rows[np.repeat(lists.present, kept.lengths)] = look_up(self._coders[extra.feature], lists.last(feature.max_length).flatten())
            encoded[extra.feature] = Jagged(rows, offsets)
        return encoded

    def _aligned(self, extra: SequenceExtra, feature: Sequence, items: Lists, columns: Columns) -> Lists:
        """The lists of ``extra`` in the rows that have items; as long as those, or not present at all."""
        is_text = extra.edges is None and extra.values is None
        lists = (columns.string_lists if is_text else columns.number_lists)(extra.feature).where(items.present)
        uneven = np.flatnonzero(lists.present & (lists.lengths != items.lengths))
        if len(uneven):
            row = uneven[0]
            raise DataError(
                f"column {extra.feature!r}, row {row}: {lists.lengths[row]} elements beside the {items.lengths[row]} of {feature.items!r}; "
                "aligned lists have equal lengths"
            )
        return lists

    def _labels(self, columns: Columns) -> torch.Tensor | None:
        absent = [name for name in self.label_columns if name not in columns]
        if len(absent) == len(self.label_columns):
            return None
        if absent:
            raise SchemaError(f"missing label column {absent[0]!r}: expected all of {list(self.label_columns)} or none")
        return matrix([_label(task, columns.numbers(task.feature)) for task in self.config.tasks], len(columns), np.float32)


def _keys_of_lists(feature: Feature) -> tuple[str, ...]:
    match feature:
        case Bag():
            return (feature.feature,)
        case Sequence():
            return feature.keys
        case _:
            return ()


def _single(column: Scalars, coder: Coder) -> np.ndarray:
    """One row per value."""
    return np.where(column.present, look_up(coder, column.values), NO_VALUE)


def _bag(lists: Lists, coder: Coder) -> Jagged:
    """The rows of every element; row 0 alone where there is no list."""
    lengths = np.where(lists.present, lists.lengths, 1)
    rows = np.full(lengths.sum(), NO_VALUE, dtype=np.int64)
    rows[np.repeat(lists.present, lengths)] = look_up(coder, lists.flatten())
    return Jagged(rows, _offsets(lengths))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _label(task: Task, column: Scalars) -> np.ndarray:
    if not column.present.all():
        row = int(np.flatnonzero(~column.present)[0])
        raise DataError(f"label {task.feature!r} of task {task.name!r}: row {row} is null, not PRESENT or not finite")
    if task.threshold is None:
        return column.numbers()
    text = task.threshold.strip()
    sign = next(s for s in _COMPARE if text.startswith(s))
    return np.asarray(_COMPARE[sign](column.numbers(), float(text.removeprefix(sign))))


def _weights(name: str, columns: Columns) -> torch.Tensor:
    """float32 ``[B]``."""
    column = columns.numbers(name)
    wrong = ~column.present | (column.numbers() < 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        found = f"{column.numbers()[row]:g}" if column.present[row] else "null, not PRESENT or not finite"
        raise DataError(f"weight {name!r}: row {row} is {found}; expected a finite number of at least 0")
    return torch.from_numpy(column.numbers().astype(np.float32))
