# SPDX-License-Identifier: Apache-2.0
"""Which tokens go on: seven modules on planted histories, with quality before and after."""

from benchmarks.frame import Check
from benchmarks.token_efficiency import pruning_choices, pruning_inside
from benchmarks.token_efficiency.pruning_needles import Sizes
from benchmarks.token_efficiency.rows import Row

FIRST_SEED = 100


def measure(quick: bool) -> tuple[list[Row], list[Check]]:
    """The rows and the checks of this part; models are trained for 2 seeds, or 5."""
    models, policies = (2, 3) if quick else (5, 10)
    sizes = Sizes(tuning=60, tested=512) if quick else Sizes()
    found = pruning_inside.measure(range(FIRST_SEED, FIRST_SEED + models), sizes)
    found += pruning_choices.measure(range(FIRST_SEED, FIRST_SEED + 5), range(FIRST_SEED, FIRST_SEED + policies))
    return [row for row, _ in found], [check for _, check in found]
