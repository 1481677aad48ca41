# SPDX-License-Identifier: Apache-2.0
"""How many rows a second go from Parquet to what a ranker takes, beside torch-rechub's and FuxiCTR's loaders, and in how much memory?

200,000 and 800,000 rows of Criteo's shape and a column of lists (without ``--quick`` a million and eight), batches of 4,096, files in the
system's cache. Speeds are of the smaller size, memory of both. Every side is a process of its own that may use one core (so that what a
library starts in threads or processes is counted alike) and keeps freed memory, is asked in turns, ours before and after all others, and
gives the same numbers: the sums of labels and of dense columns and the counts of ids over an epoch are compared before anything is timed.

**Encoded** (``loader_over_best``): from integers. Ours is a shuffled epoch of `ParquetLoader` with `EncodedColumns`, to `RankingBatch`:
a `KeyedJaggedTensor` of int64 with lists as they are, dense, labels. torch-rechub's `ParquetIterableDataset` does not shuffle, pads lists
and leaves ids as float32; its `DataGenerator` shuffles in memory, and the time of reading is not counted. FuxiCTR's
``RankDataLoader(data_format="parquet")`` shuffles through Ray. The check takes the fastest of them all, whatever it leaves out;
``loader_over_best_shuffled`` the fastest that shuffles.

**Raw** (``loader_over_best_raw``): from strings and nulls. Ours looks up in an `Encoder` fitted before; peers' preprocessing, fitted before
too, writes integers as Parquet, which their loaders read: both parts are timed, since a new day of rows needs both.

**Two cores**: the first again with two cores for each side, ours with a thread that prepares batches ahead.

**Memory** is the highest resident memory of an epoch above where it stood before, in a fresh process after one epoch of the smaller size;
of FuxiCTR's with Ray's processes (sampled, shared pages once). ``loader_memory_growth`` is ours at the larger size over the smaller, the
worse of raw and encoded, each the median of three processes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.frame import Result


def run(*, quick: bool) -> "Result":
    """Run the benchmark."""
    from benchmarks.loader.rounds import run  # not above: parts of this package run in environments without our libraries

    return run(quick=quick)
