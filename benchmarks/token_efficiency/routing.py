# SPDX-License-Identifier: Apache-2.0
"""Which computation a token gets, growing, and decoding: five modules, with quality before and after."""

from benchmarks.frame import Check
from benchmarks.token_efficiency.routing_cascade import r2r
from benchmarks.token_efficiency.routing_decoding import token_recycling
from benchmarks.token_efficiency.routing_experts import duo, informed
from benchmarks.token_efficiency.routing_growth import tokenformer
from benchmarks.token_efficiency.rows import Row

FIRST_SEED = 100


def measure(quick: bool) -> tuple[list[Row], list[Check]]:
    """The rows and the checks of this part; models are trained for 2 seeds, or 5 (1 or 5 where no bound is about them)."""
    bound, free = (range(FIRST_SEED, FIRST_SEED + count) for count in ((2, 1) if quick else (5, 5)))
    tuned, cascaded, grown = (50, 250, 120) if quick else (120, 250, 200)  # steps of training
    found = [informed(free, tuned), duo(free, tuned), r2r(bound, cascaded), token_recycling(bound)]
    row, checks = tokenformer(bound, grown)
    return [*(own for own, _ in found), row], [*(check for _, check in found), *checks]
