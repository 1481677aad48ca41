# SPDX-License-Identifier: Apache-2.0
"""Which retriever finds what a user takes next? Leave-one-out in the order of the files, ranked among the whole catalogue.

Cells are filled by `benchmarks.retrieval_quality.grid`, which takes hours; this prints what the finished ones say.
"""

from benchmarks.frame import Result


def run(*, quick: bool) -> Result:
    """See `benchmarks.retrieval_quality.summary.run`."""
    from benchmarks.retrieval_quality import summary

    return summary.run(quick=quick)
