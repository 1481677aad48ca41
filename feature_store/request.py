# SPDX-License-Identifier: Apache-2.0
"""Features of the request itself: functions of its row alone, computed when they are asked for, by the same code offline and online."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.evaluate import Values
from feature_store.features import Attribute, Clock
from feature_store.log import without_nan
from recsys.core.schema import FeatureSchema
from recsys.core.status import ValueStatus

_UNITS = {"hour": pc.hour, "weekday": pc.day_of_week, "month": pc.month}


def evaluate_request(view: CompiledView, spine: pa.Table, time: np.ndarray, timed: np.ndarray) -> Values:
    """Every feature of ``view``, whose source is the request, for the R rows of ``spine``.

    Args:
        view: what to evaluate.
        spine: ``[R]``, with some or all of the view's columns. Who asks does not matter: the entity's key may be null.
        time: int64 ``[R]``, microseconds.
        timed: bool ``[R]``, False where ``request_time`` is null, and every feature MISSING.

    Raises:
        SchemaError: a column is there with another type, or twice.
    """
    carried = FeatureSchema(columns=tuple(column for column in view.columns.columns if column.name in spine.column_names))
    columns = without_nan(carried.conform(spine, what=f"spine of view {view.view.name!r}"))
    return [_value(feature, columns, time, timed) for feature in view.view.features if isinstance(feature, Attribute | Clock)]


def _value(feature: Attribute | Clock, columns: pa.Table, time: np.ndarray, timed: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Values, and uint8 statuses."""
    status = np.where(timed, np.uint8(ValueStatus.PRESENT), np.uint8(ValueStatus.MISSING))
    if isinstance(feature, Clock):
        return _UNITS[feature.unit](pa.array(time, pa.timestamp("us"), mask=~timed)), status
    if feature.column not in columns.column_names:
        return pa.nulls(len(time), feature.output.arrow), np.full(len(time), ValueStatus.MISSING, np.uint8)
    values = columns.column(feature.column).combine_chunks()
    values = pc.if_else(pa.array(timed), values, pa.scalar(None, values.type))
    return values, np.where(timed & np.asarray(pc.is_null(values)), np.uint8(ValueStatus.NULL), status)
