# SPDX-License-Identifier: Apache-2.0
"""How fast is our feature store beside Feast's, for training (a point-in-time join) and for serving (a request's features)?

**Join.** 200,000 rows of 8 features, ten for each entity, and 50,000 questions (without ``--quick`` also ten times both), each side from
its Parquet file in no order to an Arrow table. Feast by the faster of its two documented offline stores for files, ``file`` and ``duckdb``.
Bare Polars is `join_asof`, sorted first as it needs, without statuses, ttl, available times or the order of the questions; it and ours
beside it begin with tables in memory, ours with nothing kept from a join before. Libraries that can be told so use one thread. Memory is
the highest resident memory during a join in a fresh process, less where it stood before and less the table itself; Arrow asks the system
for memory on both sides, since its own allocator keeps what was freed.

**Online.** Requests of one user and 500 items, 8 features each, up to the values: an Arrow table for each on ours, `to_dict` on Feast's,
which is asked in the faster of two ways. Blocks of requests alternate between the two processes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.frame import Result


def run(*, quick: bool) -> "Result":
    """Run the benchmark."""
    from benchmarks.feature_store.contest import run  # not above: Feast's environment, where a part of this package runs, has no torch

    return run(quick=quick)
