# SPDX-License-Identifier: Apache-2.0
"""What do the eighteen modules save? A row for each: counters of executed code, wall-clock beside the dense form, and the paper's ratio.

- `indexing`, `attention`: attention over long histories, beside fused dense attention.
- `pruning`: which tokens go on.
- `routing`: which computation a token gets, growing and decoding.

Counters are multiply-adds, gathered bytes and forward passes of `recsys.efficiency.cost.Cost`, the same in every run; the checks look at
these. Wall-clock is measured in alternating pairs and reported.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.frame import Check, Result, threads
from benchmarks.token_efficiency import attention, indexing, pruning, routing
from benchmarks.token_efficiency.rows import Row, table

THREADS = 2
_PARTS: dict[str, Callable[[bool], tuple[list[Row], list[Check]]]] = {
    "indexing": indexing.measure,
    "attention": attention.measure,
    "pruning": pruning.measure,
    "routing": routing.measure,
}


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    with threads(THREADS):
        found = {name: part(quick) for name, part in _PARTS.items()}
    rows: list[dict[str, Any]] = [table(row) for own, _ in found.values() for row in own]
    return Result("token_efficiency", rows, [check for _, own in found.values() for check in own])
