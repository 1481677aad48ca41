# SPDX-License-Identifier: Apache-2.0
"""How good are the rankers on real data, beside each other and beside peers?

``python -m benchmarks ranking_quality`` trains every cell of the grid that ``docs/results/raw/ranking_quality.jsonl`` lacks, which takes
hours, and compares the models; ``--quick`` trains two models on Frappe for a few minutes and leaves that file alone. The data is read from
the folder in the environment variable RECSYS_DATA. For some cells only: ``python -m benchmarks.ranking_quality.grid --help``. Peers import
this package in their own environments, so nothing is imported before `run`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.frame import Result


def run(*, quick: bool) -> "Result":
    """Fill what is missing, then compare."""
    from benchmarks.ranking_quality.grid import PLAN, QUICK_PLAN, RAW, Grid
    from benchmarks.ranking_quality.summary import result

    grid = Grid.quick() if quick else Grid(RAW)
    grid.fill(QUICK_PLAN if quick else PLAN)
    return result(grid.records())
