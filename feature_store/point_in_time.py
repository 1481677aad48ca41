# SPDX-License-Identifier: Apache-2.0
"""From a spine to a table of features: what the offline and the online reader share, which differ in where logs come from."""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.evaluate import evaluate
from feature_store.log import Log
from recsys.core.errors import SchemaError
from recsys.core.schema import REQUEST_TIME, Column, FeatureSchema, Kind
from recsys.core.status import status_column


def read_features(views: Sequence[CompiledView], spine: pa.Table, logs_of: Callable[[pa.Array], Sequence[Log]]) -> pa.Table:
    """The spine with every feature of ``views`` and its status.

    Args:
        views: views of one entity.
        spine: R rows with the entity's key and ``request_time``. A row where either is null has every feature MISSING.
        logs_of: gives the logs of the views, which must hold all events of the given keys (string, without nulls, distinct).

    Raises:
        SchemaError: a column of the spine is absent, of another type, or has the name of a feature.
    """
    keys, time, known = _read_spine(spine, views[0].view.entity)
    wanted = pc.unique(pc.drop_null(keys))
    fields, columns = list(spine.schema), list(spine.columns)
    for view, log in zip(views, logs_of(wanted), strict=True):
        values = list(evaluate(view, log, keys, time, known))
        for place, output in enumerate(view.outputs):
            fields += [pa.field(output.name, output.arrow), pa.field(status_column(output.name), pa.uint8())]
            columns.append(pa.chunked_array([piece[place][0] for piece in values], output.arrow))
            columns.append(pa.chunked_array([piece[place][1] for piece in values], pa.uint8()))
    for field in fields[spine.num_columns :]:
        if field.name in spine.column_names:
            raise SchemaError(f"spine: column {field.name!r} has the name of a feature; rename it")
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, spine.schema.metadata))


def _read_spine(spine: pa.Table, entity: str) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Keys as strings, times in microseconds, and where both are known."""
    schema = FeatureSchema(columns=(Column(name=entity, kind=Kind.ID), Column(name=REQUEST_TIME, kind=Kind.TIME)))
    conformed = schema.conform(spine, what="spine").combine_chunks()
    keys, times = (conformed.column(name).combine_chunks() for name in (entity, REQUEST_TIME))
    known = np.asarray(pc.and_(pc.is_valid(keys), pc.is_valid(times)))
    return keys, np.asarray(times.cast(pa.int64()).fill_null(0)), known
