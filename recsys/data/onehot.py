# SPDX-License-Identifier: Apache-2.0
"""The inputs of a ranker as one sparse matrix, for linear baselines."""

import numpy as np
from scipy import sparse
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.errors import DataError
from recsys.data.batch import RankingBatch
from recsys.data.encoding.coders import NO_VALUE
from recsys.data.encoding.hashing import spread
from recsys.data.spec import InputSpec, TableSpec


def one_hot(batch: RankingBatch, spec: InputSpec, *, sequences: bool = False) -> sparse.csr_matrix:
    """Expand a batch of B rows: one column for each row of each table that a key looks up, then the dense columns.

    Args:
        batch: as laid out by ``spec``.
        spec: the blocks of columns follow ``spec.bag_keys``, then the targets of sequences, then, where asked for, the other
            sequence keys, then ``spec.dense``. A block has as many columns as its table has rows.
        sequences: add the histories: column r holds the share of row r among the elements, 0 for all r where there are none.

    Raw ids, which have no rows yet, are spread over the rows of their table by what is left of a division; they are hashes.

    Returns:
        float32 ``[B, columns]``. Bags and targets are 0 or 1: a value that a bag holds twice counts once.

    Raises:
        DataError: a value is beyond its table; the error names the key.
    """
    table_of = {key: table for table in spec.tables for key in (*table.bags, *table.sequences)}
    targets = tuple(dict.fromkeys(s.target for s in spec.sequences))
    pooled, unpooled = batch.sparse.to_dict(), batch.sequences.to_dict()
    blocks = [_counts(key, pooled[key], table_of[key]).sign() for key in spec.bag_keys]
    blocks += [_counts(key, unpooled[key], table_of[key]) for key in targets]
    if sequences:
        for key in (k for k in spec.sequence_keys if k not in targets):
            lengths = unpooled[key].lengths()
            share = sparse.diags((1.0 / lengths.clamp(min=1).double()).numpy())
            blocks.append(share @ _counts(key, unpooled[key], table_of[key]))
    blocks.append(sparse.csr_matrix(batch.dense.numpy()))
    return sparse.csr_matrix(sparse.hstack(blocks, format="csr", dtype=np.float32))


def _counts(key: str, jagged: JaggedTensor, table: TableSpec) -> sparse.csr_matrix:
    """``[B, rows of the table]``: how often each value occurs in each row."""
    values, lengths = jagged.values().numpy(), jagged.lengths().numpy()
    if table.ids == "raw":
        values = np.where(values == NO_VALUE, NO_VALUE, spread(values, table.rows))
    if len(values) and not 0 <= values.min() <= values.max() < table.rows:
        raise DataError(
            f"field {key!r}: expected rows of table {table.name!r}, 0 to {table.rows - 1}, got {values.min()} to {values.max()}"
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # A copy, because summing duplicates sorts in place what is the batch's own memory.
    matrix = sparse.csr_matrix((np.ones(len(values)), values, offsets), shape=(len(lengths), table.rows), copy=True)
    matrix.sum_duplicates()
    return matrix
