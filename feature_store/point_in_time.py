# SPDX-License-Identifier: Apache-2.0
"""From a spine to a table of features: what the offline and the online reader share, which differ in where logs come from."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.evaluate import Values, evaluate
from feature_store.log import Log
from feature_store.request import evaluate_request
from feature_store.tiles import Tiles, evaluate_tiles
from recsys.core.errors import SchemaError
from recsys.core.schema import REQUEST_TIME, Column, FeatureSchema, Kind
from recsys.core.status import status_column

LogsOf = Callable[[tuple[CompiledView, ...], pa.Array], Sequence[Log | Tiles]]
"""Gives the logs of views, or their tiles, which must hold all events of the given keys (string, without nulls, distinct)."""


def read_features(views: Sequence[CompiledView], spine: pa.Table, logs_of: LogsOf) -> pa.Table:
    """The spine with every feature of ``views`` and its status.

    Args:
        views: views of one entity.
        spine: R rows with the entity's key and ``request_time``. A row where either is null has every feature MISSING, except that those
            of the request need no key.
        logs_of: see `LogsOf`; asked once, for the views that are stored, if there are any.

    Raises:
        SchemaError: a column of the spine is absent, of another type, or has the name of a feature.
    """
    keys, time, timed = _read_spine(spine, views[0].view.entity)
    known = np.asarray(pc.is_valid(keys)) & timed
    stored = tuple(view for view in views if not view.is_request)
    logs = iter(logs_of(stored, pc.unique(pc.drop_null(keys))) if stored else ())
    fields, columns = list(spine.schema), list(spine.columns)
    for view in views:
        values = [evaluate_request(view, spine, time, timed)] if view.is_request else list(_evaluate(view, next(logs), keys, time, known))
        for place, output in enumerate(view.outputs):
            fields += [output, pa.field(status_column(output.name), pa.uint8())]
            columns.append(pa.chunked_array([piece[place][0] for piece in values], output.type))
            columns.append(pa.chunked_array([piece[place][1] for piece in values], pa.uint8()))
    for field in fields[spine.num_columns :]:
        if field.name in spine.column_names:
            raise SchemaError(f"spine: column {field.name!r} has the name of a feature; rename it")
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, spine.schema.metadata))


def _evaluate(view: CompiledView, log: Log | Tiles, keys: pa.Array, time: np.ndarray, known: np.ndarray) -> Iterator[Values]:
    if view.view.tile is not None:
        return evaluate_tiles(view, log, keys, time, known)
    assert isinstance(log, Log)
    return evaluate(view, log, keys, time, known)


def _read_spine(spine: pa.Table, entity: str) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Keys as strings, times in microseconds, and where there is a time."""
    schema = FeatureSchema(columns=(Column(name=entity, kind=Kind.ID), Column(name=REQUEST_TIME, kind=Kind.TIME)))
    conformed = schema.conform(spine, what="spine").combine_chunks()
    keys, times = (conformed.column(name).combine_chunks() for name in (entity, REQUEST_TIME))
    return keys, np.asarray(times.cast(pa.int64()).fill_null(0)), np.asarray(pc.is_valid(times))
