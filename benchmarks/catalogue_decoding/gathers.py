# SPDX-License-Identifier: Apache-2.0
"""All scores of a large catalogue: the embedding bag beside indexed gathers, and lists beside the scores alone."""

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional

from benchmarks.frame import Check, ratio
from recsys.retrieval.catalogue import Catalogue, CatalogueView, GatherIndex
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs
from recsys.training.progress import track

LEVELS, CODES, USERS, K = 4, 256, 64, 100
SIZES = (10**4, 10**5, 10**6, 10**7)


def index_of(items: int) -> tuple[GatherIndex, CatalogueView, SlotLogProbs]:
    """An index over drawn codes, its catalogue, and users with drawn distributions."""
    torch.manual_seed(0)
    table = CodeTable(torch.randint(0, CODES, (items, LEVELS)), (CODES,) * LEVELS, "drawn")
    view = Catalogue([f"{i}" for i in range(items)]).snapshot()
    state = SlotLogProbs((2 * torch.randn(USERS, LEVELS, CODES)).log_softmax(-1), "drawn")
    return GatherIndex.build(GatherIndex.Config(), table, view), view, state


def bag(index: GatherIndex, state: SlotLogProbs) -> Callable[[], Any]:
    """The scores alone, tile after tile as the index takes them, kept nowhere."""
    bags = index.table.codes.to(torch.int32) + (torch.arange(LEVELS) * CODES).to(torch.int32)
    weights, tile = state.values.flatten(1).T.contiguous(), index.config.tile

    def call() -> None:
        for part in bags.split(tile):
            functional.embedding_bag(part, weights, mode="sum")

    return call


def plain(index: GatherIndex, state: SlotLogProbs, users: int) -> Callable[[], Any]:
    """Indexed gathers in numpy, user by user."""
    codes, values = [column.copy() for column in index.table.codes.numpy().T], state.values.numpy()[:users]

    def call() -> None:
        for user in values:
            scores = user[0][codes[0]]
            for slot in range(1, LEVELS):
                scores += user[slot][codes[slot]]

    return call


@torch.inference_mode()
def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """The rows and the checks of this part."""
    pairs, rows, checks = (5 if quick else 9), [], []
    for items in track(SIZES[:3], "gather"):
        index, view, state = index_of(items)
        few = 4  # numpy goes user by user, so a few of them are enough
        seconds = _in_turns(
            {
                "bag": bag(index, state),
                "search": lambda index=index, view=view, state=state: index.search(state, K, view),
                "numpy": plain(index, state, few),
            },
            pairs,
        )
        numpy = [s * USERS / few for s in seconds["numpy"]]
        over_numpy, over_bag = ratio(numpy, seconds["bag"]), ratio(seconds["search"], seconds["bag"])
        per_user = {name: 1e3 * float(np.median(values)) / USERS for name, values in (seconds | {"numpy": numpy}).items()}
        rows.append(
            {
                "items": items,
                "scores, ms/user": per_user["bag"],
                f"top {K}, ms/user": per_user["search"],
                "numpy, ms/user": per_user["numpy"],
                "numpy / scores": over_numpy.estimate,
                f"top {K} / scores": over_bag.estimate,
            }
        )
    checks += [over_numpy.at_least("gather_over_numpy_1e6", 10), over_bag.at_most("gather_topk_over_bag_1e6", 1.3)]
    largest = measure_largest()
    rows.append({"items": SIZES[3], f"top {K}, ms/user": largest["ms_per_user"]} | {"memory, GiB": largest["gib"]})
    checks.append(Check("gather_memory_gib_1e7", largest["gib"], at_most=2.0, note="peak beyond what the process held before"))
    return [{**dict.fromkeys(_columns(rows), ""), **row} for row in rows], checks


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _in_turns(calls: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(pairs + 1):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if turn:
                seconds[name].append(perf_counter() - start)
    return seconds


def measure_largest() -> dict[str, float]:
    """Memory and time of 10⁷ items, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.catalogue_decoding.gathers"], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _largest() -> None:
    """Build and search, and print what it took. The ids of the catalogue are the catalogue's, and not counted."""
    process, items = psutil.Process(), SIZES[3]
    torch.manual_seed(0)
    view = Catalogue([f"{i}" for i in range(items)]).snapshot()
    state = SlotLogProbs((2 * torch.randn(USERS, LEVELS, CODES)).log_softmax(-1), "drawn")
    gc.collect()
    before = process.memory_info().rss
    with _Peak() as peak, torch.inference_mode():
        table = CodeTable(torch.randint(0, CODES, (items, LEVELS)), (CODES,) * LEVELS, "drawn")
        index = GatherIndex.build(GatherIndex.Config(), table, view)
        start = perf_counter()
        index.search(state, K, view)
        seconds = perf_counter() - start
    gib = (peak.bytes - before) / 2**30
    print(json.dumps({"gib": round(gib, 3), "ms_per_user": round(1e3 * seconds / USERS, 2)}))


class _Peak:
    """The largest resident size of this process while it is watched, in bytes."""

    def __enter__(self) -> "_Peak":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, process.memory_info().rss)


if __name__ == "__main__":
    _largest()
