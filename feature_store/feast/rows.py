# SPDX-License-Identifier: Apache-2.0
"""The newest row of an entity as Feast gives it, as bytes: what the online store keeps for each entity of a Feast view.

A value begins with three little-endian integers: the event time and the created time in microseconds (int64; the least one where there is
none) and how many bytes the names take (uint32). The names of the features follow, then their values as one ``RepeatedValue``.
"""

import struct
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from feast.protos.feast.types.Value_pb2 import RepeatedValue
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from feature_store.online.base import FeatureStoreError

_HEAD = struct.Struct("<qqI")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NEVER = -(2**63)
_SEPARATOR = "\0"


def pack_row(values: Mapping[str, ValueProto], event: datetime, created: datetime | None) -> bytes:
    """A row as bytes; naive times are taken as UTC."""
    names = _SEPARATOR.join(values).encode()
    head = _HEAD.pack(_microseconds(event), _NEVER if created is None else _microseconds(created), len(names))
    content: bytes = RepeatedValue(val=values.values()).SerializeToString()
    return head + names + content


def unpack_row(value: bytes) -> tuple[datetime, dict[str, ValueProto]]:
    """The event time (UTC) of a row, and its values by the names of the features.

    Raises:
        FeatureStoreError: the bytes are no such row.
    """
    try:
        event, _, length = _HEAD.unpack_from(value)
        start = _HEAD.size + length
        names = value[_HEAD.size : start].decode()
        values = RepeatedValue.FromString(value[start:]).val
        return _EPOCH + timedelta(microseconds=event), dict(zip(names.split(_SEPARATOR) if names else (), values, strict=True))
    except Exception as error:  # protobuf's own error stands in a module that differs between its versions
        raise FeatureStoreError(f"a stored value is not a row of a Feast view ({error}); materialize it again") from error


def newest(rows: Iterable[bytes]) -> bytes:
    """The row of the latest event, of equal ones the one created last, of equal ones the last in order."""
    best = b""
    for row in rows:
        if not best or _HEAD.unpack_from(row)[:2] >= _HEAD.unpack_from(best)[:2]:
            best = row
    return best


def _microseconds(time: datetime) -> int:
    return ((time if time.tzinfo is not None else time.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)
