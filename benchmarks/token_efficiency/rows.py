# SPDX-License-Identifier: Apache-2.0
"""A row of the table, and how wall-clock is taken beside the dense form."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from benchmarks.frame import Ratio, ratio


@dataclass(frozen=True)
class Row:
    """One module at one setting.

    Attributes:
        module: its name.
        setting: sizes and budget.
        saved: what the counters say: dense over ours, of ``counter``.
        counter: which one: MACs, bytes, forwards, or another that is named.
        wall: dense time over our time, where it was taken.
        paper: the published ratio, and of what.
        quality: what stands for quality at this setting, or nothing.
    """

    module: str
    setting: str
    saved: float
    counter: str
    wall: Ratio | None = None
    paper: str = ""
    quality: str = ""


def table(row: Row) -> dict[str, Any]:
    """The row as it is printed."""
    wall = "" if row.wall is None else f"{row.wall.estimate:.2f} [{row.wall.low:.2f}, {row.wall.high:.2f}]"
    saved = f"{row.saved:.3g} of {row.counter}"
    return {"module": row.module, "setting": row.setting, "saved": saved, "wall": wall, "paper": row.paper, "quality": row.quality}


@torch.no_grad()
def beside(dense: Callable[[], object], ours: Callable[[], object], pairs: int = 5) -> Ratio:
    """Dense time over our time in alternating pairs; one round of warm-up is not kept."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs + 1):
        for own, call in zip(times, (dense, ours), strict=True):
            started = perf_counter()
            call()
            if turn:
                own.append(perf_counter() - started)
    return ratio(*times)
