# SPDX-License-Identifier: Apache-2.0
"""Our point-in-time join in Feast's terms: which row of a table is an entity's newest as of a time. Asks for nothing of Feast's.

The row's number is the one feature that is read, so that a table's values keep their types, whatever those are.
"""

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.core.errors import ConfigError, SchemaError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, REQUEST_TIME, TIME

_NAME, _KEY, _ROW = "rows", "entity", "row"
_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}


def newest_rows(
    keys: pa.Array,
    request_time: pa.Array,
    row_keys: pa.Array,
    event_time: pa.Array,
    *,
    ttl: timedelta | None,
    created: pa.Array | None,
    created_is_available: bool,
) -> pa.Array:
    """For each of R questions the number of the newest row of its entity, null where there is none or it is older than ``ttl``.

    Args:
        keys: string ``[R]``.
        request_time: timestamps ``[R]``; naive ones are UTC, here and below.
        row_keys: string ``[N]``.
        event_time: timestamps ``[N]``.
        ttl: whole seconds; None, or zero, for no limit. An age of exactly ``ttl`` is not too old.
        created: timestamps ``[N]``: of rows with one event time the one created last counts; without it, the last in the table.
        created_is_available: whether a row counts only from its created time on.

    Returns:
        int64 ``[R]``.

    Raises:
        ConfigError: ``ttl`` is no whole number of seconds.
        DataError: an event time is null, or a created time that rows count from.
        SchemaError: a column of times is of another type.
    """
    event_us = _microseconds(event_time, "event time", up=True)
    created_us = None if created is None else _microseconds(created, "created time", up=True)
    available = created_us if created_us is not None and created_is_available else event_us
    table = {
        _KEY: row_keys,
        EVENT_TIME: event_us.cast(TIME),
        AVAILABLE_TIME: available.cast(TIME),
        INGEST_SEQ: pa.array(_sequence(len(row_keys), created_us)),
        _ROW: pa.array(np.arange(len(row_keys))),
    }
    spine = pa.table({_KEY: keys, REQUEST_TIME: _microseconds(request_time, "event timestamp of the entity rows", up=False).cast(TIME)})
    reader = OfflineReader(_definitions(_seconds(ttl)), {_NAME: pa.table(table)})
    return reader.read(_NAME, spine).column(_ROW).combine_chunks()


def join_key(columns: Sequence[pa.ChunkedArray], rows: int) -> pa.Array:
    """One string for the values of several columns, distinct for distinct values; null where one is null, empty without columns."""
    texts = [column.cast(pa.string()) for column in columns]
    if not texts:
        return pa.repeat(pa.scalar(""), rows)
    if len(texts) > 1:
        escaped = [pc.replace_substring(pc.replace_substring(text, "\\", "\\\\"), "|", "\\|") for text in texts]
        texts = [pc.binary_join_element_wise(*escaped, "|")]
    return texts[0].combine_chunks()


def _definitions(ttl: int | None) -> FeatureRepo:
    feature = {"kind": "attribute", "name": _ROW, "column": _ROW, "type": "dense", "dtype": "int"}
    return FeatureRepo.model_validate(
        {
            "sources": [{"name": _NAME, "kind": "events", "table": _NAME, "keys": [_KEY]}],
            "views": [{"name": _NAME, "source": _NAME, "entity": _KEY, "ttl": ttl, "features": [feature]}],
            "services": [{"name": _NAME, "views": [_NAME]}],
        }
    )


def _seconds(ttl: timedelta | None) -> int | None:
    if not ttl:
        return None
    seconds, rest = divmod(ttl, timedelta(seconds=1))
    if rest or seconds <= 0:
        raise ConfigError(f"ttl: expected a positive whole number of seconds, got {ttl}")
    return seconds


def _sequence(rows: int, created_us: pa.Array | None) -> np.ndarray:
    """int64 ``[N]``: the rows numbered in the order in which they were created, then in which they stand."""
    if created_us is None:
        return np.arange(rows)
    order = np.argsort(np.asarray(created_us.fill_null(np.iinfo(np.int64).min)), kind="stable")
    sequence = np.empty(rows, np.int64)
    sequence[order] = np.arange(rows)
    return sequence


def _microseconds(times: pa.Array, what: str, *, up: bool) -> pa.Array:
    """int64; of nanoseconds an event's are rounded up and a request's down, so that none counts too early."""
    if not pa.types.is_timestamp(times.type):
        raise SchemaError(f"{what}: expected timestamps, got {times.type}")
    ticks = times.cast(pa.int64())
    if times.type.unit != "ns":
        return pc.multiply_checked(ticks, _UNITS[times.type.unit])
    valid, numbers = ticks.is_valid(), np.asarray(ticks.fill_null(0))
    return pa.array(-(-numbers // 1000) if up else numbers // 1000, mask=~np.asarray(valid))
