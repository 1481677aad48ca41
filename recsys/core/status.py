# SPDX-License-Identifier: Apache-2.0
"""Value status: what is known about a feature value, carried from the store through the model input to the response."""

from enum import IntEnum

STATUS_SUFFIX = "__status"


class ValueStatus(IntEnum):
    """Why a feature value is there, or is not.

    ``PRESENT``: a value was read. ``NULL``: the entity is known and its value is null. ``MISSING``: the entity has no row.
    ``EXPIRED``: the newest row is older than its time to live. ``ERROR``: the store could not answer.
    """

    PRESENT = 0
    NULL = 1
    MISSING = 2
    EXPIRED = 3
    ERROR = 4


def status_column(feature: str) -> str:
    """The name of the uint8 column that carries the status of ``feature``."""
    return feature + STATUS_SUFFIX
