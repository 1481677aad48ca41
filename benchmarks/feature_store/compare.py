# SPDX-License-Identifier: Apache-2.0
"""Whether two sides found the same values: of the rows that both gave back, before anything is timed."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def same_values(ours: pa.Table, theirs: pa.Table, row: str, names: Sequence[str]) -> int:
    """How many rows of theirs were compared with ours and were equal, nulls (or NaN) included.

    Args:
        ours: all rows.
        theirs: all or some of them, in any order.
        row: the column that tells rows apart.
        names: the columns to compare, of numbers.

    Raises:
        ValueError: theirs has a row that ours has not, or a value differs; names the column and the first such row.
    """
    place = pc.index_in(theirs.column(row).combine_chunks().cast(ours.schema.field(row).type), value_set=ours.column(row).combine_chunks())
    if place.null_count:
        raise ValueError(f"{place.null_count} rows of theirs are none of ours")
    for name in names:
        mine, other = (_numbers(values) for values in (ours.column(name).take(place), theirs.column(name)))
        wrong = np.flatnonzero(~((mine == other) | (np.isnan(mine) & np.isnan(other))))
        if len(wrong):
            where = theirs.column(row)[int(wrong[0])].as_py()
            raise ValueError(
                f"column {name!r}: {len(wrong)} values differ; at {row}={where!r} ours is {mine[wrong[0]]}, theirs {other[wrong[0]]}"
            )
    return theirs.num_rows


def _numbers(values: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(values.cast(pa.float64()).combine_chunks().fill_null(np.nan), np.float64)
