# SPDX-License-Identifier: Apache-2.0
"""How long a call takes."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any


def milliseconds(call: Callable[[], Any], times: int = 7) -> float:
    """The median over some calls after a first one."""
    seconds = []
    for turn in range(times + 1):
        start = perf_counter()
        call()
        if turn:
            seconds.append(perf_counter() - start)
    return 1e3 * median(seconds)
