# SPDX-License-Identifier: Apache-2.0
"""Arrow tables as Polars frames."""

import polars as pl
import pyarrow as pa


def from_arrow(table: pa.Table) -> pl.DataFrame:
    """The table as a frame, without a copy where the types allow."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)  # a table gives no series
    return frame
