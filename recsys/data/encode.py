# SPDX-License-Identifier: Apache-2.0
"""The one path from raw values to tensors: Arrow columns with a status beside every value → `RankingBatch`.

The training loader and the server both call `Encoder.transform`, so what a model saw in training is what it sees online.
"""

import math
import operator
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch

from recsys.core.errors import DataError, SchemaError, unknown
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
from recsys.data.tiles import Part, TiledRows

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
    def load(cls, directory: Path, *, mmap: bool = False) -> Self:
        """Read an encoder that `save` wrote; with ``mmap`` its vocabularies are the file's own pages.

        Raises:
            BundleError: a file is absent, cannot be read, or was changed.
        """
        return cls(*state.load(Path(directory), mmap=mmap))

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
        columns = _columns(table)
        ids, dense = self._encode(columns, self.feature_columns)
        labels = self._labels(columns)
        weights = None if labels is None or self.config.weight is None else _weights(self.config.weight, columns)
        return self._rows(ids, dense, len(columns), labels, weights)

    def tiled(self, users: pa.Table, user_of_row: np.ndarray, items: pa.Table, item_of_row: np.ndarray | None = None) -> TiledRows:
        """Encode R ≥ 1 candidates of users, each user and each item once.

        Put together by rows it equals `rows` of the join, ``users[user_of_row[r]]`` beside ``items[item_of_row[r]]``, without labels.

        Args:
            users: the columns of some features. A user without a candidate is left out.
            user_of_row: int64 ``[R]``.
            items: the columns of all other features; R rows, or M.
            item_of_row: int64 ``[R]``; None where row r is item r.

        Raises:
            SchemaError: a column is in both tables or in none, or of another type than its encoding expects; or of lists that are aligned
                with each other some are in one table and some in the other.
            DataError: no candidate; aligned lists of different lengths.
        """
        asked, user_of_row = np.unique(user_of_row, return_inverse=True)
        users = users if len(asked) == users.num_rows else users.take(pa.array(asked))
        of_users = {names: _is_of_first(names, users, items) for names in self._units}
        user_part, item_part = (
            self._part(table, [name for names, first in of_users.items() if first is wanted for name in names])
            for table, wanted in ((users, True), (items, False))
        )
        return TiledRows(self.spec, user_part, item_part, user_of_row, item_of_row)

    @cached_property
    def _units(self) -> tuple[tuple[str, ...], ...]:
        """What is encoded by itself: columns, and lists that are aligned with each other."""
        units = [unit for f in self.config.features for unit in ((f.keys, (f.target,)) if isinstance(f, Sequence) else ((f.feature,),))]
        return tuple(dict.fromkeys(units))

    def _part(self, table: pa.Table, names: Collection[str]) -> Part:
        columns = _columns(table)
        ids, dense = self._encode(columns, names)
        return Part(self._rows(ids, dense, len(columns)), tuple(name for name in self.spec.dense if name in dense))

    def _rows(
        self,
        ids: dict[str, _Ids],
        dense: dict[str, np.ndarray],
        count: int,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> EncodedRows:
        """Rows of the keys and dense columns that there are, in the order of the spec."""
        wide = is_wide(self.spec)
        sparse, sequences = (
            KeyedRows.make(tuple(key for key in keys if key in ids), ids, count, wide=wide)
            for keys in (self.spec.bag_keys, self.spec.sequence_keys)
        )
        columns = matrix([dense[name] for name in self.spec.dense if name in dense], count, np.float32)
        return EncodedRows(sparse, sequences, columns, labels, weights)

    def _encode(self, columns: Columns, names: Collection[str]) -> tuple[dict[str, _Ids], dict[str, np.ndarray]]:
        """The ids by key and the dense columns of the features that read the columns ``names``."""
        ids: dict[str, _Ids] = {}
        dense: dict[str, np.ndarray] = {}
        for feature in self.config.features:
            match feature:
                case Sequence():
                    if feature.items in names:
                        ids |= self._histories(feature, columns)
                    if feature.target in names:
                        ids[feature.target] = _single(columns.strings(feature.target), self._coders[item_table(feature)])
                case _ if feature.feature not in names:
                    continue
                case Categorical():
                    ids[feature.feature] = _single(columns.strings(feature.feature), self._coders[pooled_table(feature)])
                case Bag():
                    ids[feature.feature] = _bag(columns.string_lists(feature.feature), self._coders[pooled_table(feature)])
                case Bucket():
                    ids[feature.feature] = _single(columns.numbers(feature.feature), self._coders[feature.feature])
                case Dense():
                    dense |= zip(feature.columns, self._dense(feature, columns.numbers(feature.feature)), strict=True)
        return ids, dense

    def _dense(self, feature: Dense, column: Scalars) -> list[np.ndarray]:
        mean, deviation = self._fitted.scales.get(feature.feature, (0.0, 1.0))
        scaled = (state.transform_dense(feature, np.where(column.present, column.numbers(), 0.0)) - mean) / deviation
        values = np.where(column.present, scaled, 0.0)
        return [values, ~column.present] if feature.indicator else [values]

    def _histories(self, feature: Sequence, columns: Columns) -> dict[str, _Ids]:
        """The items and what is aligned with them; the lengths of the items are those of every extra."""
        items = columns.string_lists(feature.items)
        kept = items.last(feature.max_length)
        offsets = _offsets(kept.lengths)
        encoded: dict[str, _Ids] = {feature.items: Jagged(look_up(self._coders[item_table(feature)], kept.flatten()), offsets)}
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


def _columns(table: pa.Table | pa.RecordBatch) -> Columns:
    columns = Columns(table, dictionaries=True)
    if len(columns) == 0:
        raise DataError("expected at least one row to encode, got none")
    return columns


def _is_of_first(names: tuple[str, ...], first: pa.Table, second: pa.Table) -> bool:
    """Whether columns that are encoded together are those of the first of two tables, and not of the second."""
    of_first, of_second = ([name for name in names if name in table.column_names] for table in (first, second))
    if both := [name for name in of_first if name in of_second]:
        raise SchemaError(f"column {both[0]!r}: expected once, but the table of users and the table of items have it")
    if absent := [name for name in names if name not in of_first and name not in of_second]:
        raise SchemaError(f"missing column: {unknown('column', absent[0], (*first.column_names, *second.column_names))}")
    if of_first and of_second:
        raise SchemaError(f"columns {of_first[0]!r} and {of_second[0]!r}: aligned lists, expected in one table, got users' and items'")
    return bool(of_first)


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
    return _compared(task, column.numbers())


def label_of(task: Task, values: Mapping[str, Any]) -> float | None:
    """The label that the values of one event have, as training has it; None where they do not hold the task's column as a finite number."""
    value = values.get(task.feature)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(_compared(task, np.array([value], np.float64))[0])


def _compared(task: Task, numbers: np.ndarray) -> np.ndarray:
    """The labels that numbers of the task's column have."""
    if task.threshold is None:
        return numbers
    text = task.threshold.strip()
    sign = next(s for s in _COMPARE if text.startswith(s))
    return np.asarray(_COMPARE[sign](numbers, float(text.removeprefix(sign))))


def _weights(name: str, columns: Columns) -> torch.Tensor:
    """float32 ``[B]``."""
    column = columns.numbers(name)
    wrong = ~column.present | (column.numbers() < 0)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        found = f"{column.numbers()[row]:g}" if column.present[row] else "null, not PRESENT or not finite"
        raise DataError(f"weight {name!r}: row {row} is {found}; expected a finite number of at least 0")
    return torch.from_numpy(column.numbers().astype(np.float32))
