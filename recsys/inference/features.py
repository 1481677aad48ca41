# SPDX-License-Identifier: Apache-2.0
"""What the one recommendation path asks of a feature store: a Protocol, so that this package does not import one."""

from typing import Protocol

import pyarrow as pa


class FeatureReader(Protocol):
    """Feature values as of a point in time, offline and online alike."""

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """The features of ``service`` for each row of ``spine``.

        Args:
            service: the name of a feature service, such as ``user`` or ``item``.
            spine: the columns of the service's entity key (``user_id`` or ``item_id``, string) and ``request_time``
                (timestamp[us, UTC]); further columns are kept.

        Returns:
            The rows of ``spine``, in the same order, with two more columns for each feature f: ``f`` and ``f__status`` (uint8, a
            `ValueStatus`). A value whose status is not PRESENT is null. Only events with ``event_time <= request_time`` and
            ``available_time <= request_time`` count.
        """
        ...
