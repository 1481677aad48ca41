# SPDX-License-Identifier: Apache-2.0
"""The catalogue of one part: bytes of an item's id and bit, and how long it takes to build it and to change one bit."""

import json
import sys
from itertools import cycle
from time import process_time
from typing import Any

import psutil

from benchmarks.catalogue_shards.timing import core_ms, in_a_process
from recsys.core.memory import give_back_memory
from recsys.retrieval.catalogue import Catalogue
from recsys.training.progress import track


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row for each length."""
    sizes = (10**6, 4 * 10**6) if quick else (10**6, 10**7)
    return [in_a_process("liveness", items) for items in track(sizes, "liveness")]


def measured(items: int) -> dict[str, Any]:
    """What a catalogue of so many items with ids of about ten characters costs in this process."""
    process = psutil.Process()
    ids = [f"item{row}" for row in range(items)]
    give_back_memory()
    before, began = process.memory_info().rss, process_time()
    catalogue = Catalogue(ids)
    row: dict[str, Any] = {"items": items, "build, core-s": process_time() - began}
    give_back_memory()
    row["bytes/item"] = (process.memory_info().rss - before) / items
    live = cycle((False, True))
    row["one bit, core-ms"] = core_ms(lambda: catalogue.set_live([ids[items // 2]], next(live)))
    row["bytes/item, bits alone"] = (catalogue.snapshot().live.nbytes + catalogue.snapshot().bitmap.nbytes) / items
    return row


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]))))
