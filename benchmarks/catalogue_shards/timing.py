# SPDX-License-Identifier: Apache-2.0
"""How much of a core a call takes. With one thread that is its time on a machine where nothing else runs, also on one where much does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def core_ms(call: Callable[[], Any], times: int = 7) -> float:
    """Milliseconds of a core: the median over some calls after a first one."""
    seconds = []
    for turn in range(times + 1):
        start = process_time()
        call()
        if turn:
            seconds.append(process_time() - start)
    return 1e3 * median(seconds)


def in_a_process(module: str, *arguments: object) -> dict[str, Any]:
    """What a module of this benchmark prints as its last line, in a process of its own with one thread."""
    command = [sys.executable, "-m", f"benchmarks.catalogue_shards.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ONE_THREAD)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
