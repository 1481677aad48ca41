# SPDX-License-Identifier: Apache-2.0
"""Arrow tables as Polars frames, and back."""

import polars as pl
import pyarrow as pa

from recsys.core.schema import FeatureSchema

# An Arrow array of type string holds at most 2 GB.
_CHUNK_ROWS = 1 << 20


def from_arrow(table: pa.Table) -> pl.DataFrame:
    """The table as a frame, without a copy where the types allow."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)  # a table gives no series
    return frame


def to_arrow(frame: pl.DataFrame, features: FeatureSchema) -> pa.Table:
    """The canonical columns of a frame as Arrow."""
    table = frame.select(features.names()).to_arrow(compat_level=pl.CompatLevel.oldest())
    return features.conform(pa.Table.from_batches(table.to_batches(max_chunksize=_CHUNK_ROWS), schema=table.schema))
