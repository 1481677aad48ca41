# SPDX-License-Identifier: Apache-2.0
"""What every contestant measures in its own process: seconds of a call, the memory that it took, times of online requests."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recsys.core.memory import give_back_memory


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and how many seconds it took."""
    gc.collect()
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def peak_bytes(call: Callable[[], Any]) -> int:
    """How far the resident memory rose above where it stood before a call (Linux), with nothing held that was free."""
    gc.collect()
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark begins anew
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


def milliseconds(read: Callable[[dict[str, list[str]]], Any], requests: Sequence[dict[str, list[str]]]) -> list[float]:
    """How long each request took."""
    found = []
    for request in requests:
        started = time.perf_counter()
        read(request)
        found.append((time.perf_counter() - started) * 1e3)
    return found


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not say {name}")
