# SPDX-License-Identifier: Apache-2.0
"""The rows that an `Encoder` sees: features of the user beside features of the item, in training and in serving alike."""

import numpy as np
import pyarrow as pa

from recsys.core.schema import ITEM, REQUEST_TIME, TIME, USER
from recsys.inference.features import FeatureReader

USER_SERVICE, ITEM_SERVICE, SEEN_SERVICE = "user", "item", "seen"


def spine(key: str, ids: pa.Array, request_time: pa.Array) -> pa.Table:
    """A table of one entity's ids, each with the time for which its features are asked."""
    return pa.table({key: ids.cast(pa.string()), REQUEST_TIME: request_time.cast(TIME)})


def read_users(reader: FeatureReader, user_ids: pa.Array, request_time: pa.Array) -> pa.Table:
    """User features, one row for each request."""
    return reader.read(USER_SERVICE, spine(USER, user_ids, request_time))


def read_seen(reader: FeatureReader, user_ids: pa.Array, request_time: pa.Array) -> pa.Table:
    """What each user is not to be shown again. A service of its own: its lists are long, and no model reads them."""
    return reader.read(SEEN_SERVICE, spine(USER, user_ids, request_time))


def read_items(reader: FeatureReader, item_ids: pa.Array, request_time: pa.Array) -> pa.Table:
    """Item features, one row for each pair of item and time."""
    return reader.read(ITEM_SERVICE, spine(ITEM, item_ids, request_time))


def join(users: pa.Table, user_of_row: np.ndarray, items: pa.Table) -> pa.Table:
    """Put ``users[user_of_row[r]]`` beside ``items[r]``: the R candidate rows of B requests, as one table.

    Args:
        users: B rows.
        user_of_row: int64 ``[R]``.
        items: R rows.
    """
    table = users.take(pa.array(user_of_row))
    for name in items.column_names:
        if name != REQUEST_TIME:
            table = table.append_column(items.schema.field(name), items.column(name))
    return table


def ranking_frame(reader: FeatureReader, impressions: pa.Table) -> pa.Table:
    """The feature rows of impressions (``user_id``, ``item_id``, ``request_time``, then labels, which are kept)."""
    users = read_users(reader, impressions.column(USER), impressions.column(REQUEST_TIME))
    items = read_items(reader, impressions.column(ITEM), impressions.column(REQUEST_TIME))
    table = join(users, np.arange(impressions.num_rows), items)
    for name in impressions.column_names:
        if name not in (USER, ITEM, REQUEST_TIME):
            table = table.append_column(name, impressions.column(name))
    return table
