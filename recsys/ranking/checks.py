# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a batch: errors that name the field, the row and what was expected.

Looking at every value of every batch would cost more than it is worth. So nothing here runs while all goes well, but for the labels'
range: `explain` is called when a look-up has failed, `problem` when a loss is not finite.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.errors import DataError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec


def explain(batch: RankingBatch, spec: InputSpec, error: Exception) -> None:
    """Raise what is wrong with the batch in the place of an ``error`` that names no field; do nothing where the batch is as declared.

    Raises:
        DataError: names the field.
    """
    found = problem(batch, spec)
    if found is not None:
        raise DataError(found) from error


def problem(batch: RankingBatch, spec: InputSpec) -> str | None:
    """The first thing about a batch that is not as its spec declares; None where there is nothing."""
    checks: tuple[Callable[[RankingBatch, InputSpec], Iterator[str]], ...] = (_keys, _rows_of_tables, _dense, _labels, _weights)
    return next((message for check in checks for message in check(batch, spec)), None)


def check_labels(labels: Tensor, tasks: Sequence[str]) -> None:
    """Hold that every label is 0, 1 or NaN. Skipped while a graph is captured, which cannot hold a choice by values.

    Raises:
        DataError: names the task, the row and the label.
    """
    if torch.compiler.is_compiling():
        return
    wrong = _no_label(labels)
    if bool(wrong.any()):
        raise DataError(_label_message(labels, wrong, tasks))


def _no_label(labels: Tensor) -> Tensor:
    return (labels != 0) & (labels != 1) & ~labels.isnan()


def _label_message(labels: Tensor, wrong: Tensor, tasks: Sequence[str]) -> str:
    row, task = _first(wrong)
    return f"labels: task {tasks[task]!r}, row {row}: expected 0, 1 or NaN, got {float(labels[row, task]):g}"


def _first(wrong: Tensor) -> list[int]:
    """The place of the first true value."""
    place: list[int] = wrong.nonzero()[0].tolist()
    return place


def _keys(batch: RankingBatch, spec: InputSpec) -> Iterator[str]:
    for part, found, expected in (("sparse", batch.sparse, spec.bag_keys), ("sequences", batch.sequences, spec.sequence_keys)):
        keys = found.keys()
        for key in expected:
            if key not in keys:
                yield f"{part}: the batch has no field {key!r}; its fields are {', '.join(keys) or 'none'}"
        if len(set(keys)) < len(keys):
            yield f"{part}: expected every field once, got {', '.join(keys)}"
        if expected and found.stride() != len(batch):
            yield f"{part}: expected {len(batch)} rows, as many as in dense, got {found.stride()}"


def _rows_of_tables(batch: RankingBatch, spec: InputSpec) -> Iterator[str]:
    for table in spec.tables:
        if table.ids == "raw":
            continue
        jagged = batch.sparse if table.bags else batch.sequences
        for key in (*table.bags, *table.sequences):
            yield from _overflow(jagged, key, table.name, table.rows)


def _overflow(jagged: KeyedJaggedTensor, key: str, table: str, rows: int) -> Iterator[str]:
    values = jagged[key].values()
    wrong = (values < 0) | (values >= rows)
    if bool(wrong.any()):
        (place,) = _first(wrong)
        row = int(torch.searchsorted(jagged[key].lengths().cumsum(0), place, right=True))
        yield f"field {key!r}, row {row}: expected a row of table {table!r}, 0 to {rows - 1}, got {int(values[place])}"


def _dense(batch: RankingBatch, spec: InputSpec) -> Iterator[str]:
    if batch.dense.dim() != 2 or batch.dense.shape[1] != len(spec.dense):
        yield f"dense: expected [B, {len(spec.dense)}], got {list(batch.dense.shape)}"
        return
    wrong = ~batch.dense.isfinite()
    if bool(wrong.any()):
        row, column = _first(wrong)
        yield f"dense: column {spec.dense[column]!r}, row {row}: expected a finite number, got {float(batch.dense[row, column]):g}"


def _labels(batch: RankingBatch, spec: InputSpec) -> Iterator[str]:
    if batch.labels is None:
        return
    expected = [len(batch), len(spec.tasks)]
    if list(batch.labels.shape) != expected:
        yield f"labels: expected {expected}, got {list(batch.labels.shape)}"
        return
    wrong = _no_label(batch.labels)
    if bool(wrong.any()):
        yield _label_message(batch.labels, wrong, spec.tasks)


def _weights(batch: RankingBatch, spec: InputSpec) -> Iterator[str]:
    if batch.weights is None:
        return
    if list(batch.weights.shape) != [len(batch)]:
        yield f"weights: expected [{len(batch)}], got {list(batch.weights.shape)}"
        return
    wrong = ~(batch.weights.isfinite() & (batch.weights >= 0))
    if bool(wrong.any()):
        (row,) = _first(wrong)
        yield f"weights: row {row}: expected a finite number of at least 0, got {float(batch.weights[row]):g}"
