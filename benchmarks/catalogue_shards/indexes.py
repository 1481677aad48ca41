# SPDX-License-Identifier: Apache-2.0
"""One part's index: seconds to build, bytes of an item, milliseconds for a user, with all items live and with one in a hundred retired.

Seconds are of one core. Each index is measured in a process of its own, since what a process has given back to the allocator counts for it
all the same.
"""

import json
import sys
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.catalogue_shards.timing import core_ms, in_a_process
from recsys.core.memory import give_back_memory
from recsys.retrieval.catalogue import BeamIndex, Catalogue, CatalogueView, DenseIndex, GatherIndex, HNSWIndex, Index, IVFIndex
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs, SlotVectors
from recsys.training.progress import track

DIM, LEVELS, CODES = 64, 4, 256
BATCHES, K = (1, 64), 100
RETIRED = 0.01
QUICK = {"dense": 10**6, "ivf": 10**5, "hnsw": 10**5, "gather": 4 * 10**6, "beam": 10**6}
FULL = {"dense": 4 * 10**6, "ivf": 10**6, "hnsw": 10**6, "gather": 10**7, "beam": 10**7}


def vectors(count: int, seed: int) -> np.ndarray:
    """float32 ``[count, DIM]`` around centres, as vectors lie after training."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(500, DIM)).astype(np.float32)
    found: np.ndarray = random.standard_normal((count, DIM), np.float32)
    found *= 0.7
    found += centres[random.integers(0, len(centres), count)]
    return found


def _vector_index(kind: Any) -> Callable[[CatalogueView], Index]:
    return lambda view: kind.build(kind.Config(), vectors(view.count, 1), view, content_hash="drawn")


def _code_index(kind: Any) -> Callable[[CatalogueView], Index]:
    def build(view: CatalogueView) -> Index:
        codes = torch.randint(0, CODES, (view.count, LEVELS), generator=torch.Generator().manual_seed(0))
        index: Index = kind.build(kind.Config(), CodeTable(codes, (CODES,) * LEVELS, "drawn"), view)
        return index

    return build


KINDS: dict[str, Callable[[CatalogueView], Index]] = {
    "dense": _vector_index(DenseIndex),
    "ivf": _vector_index(IVFIndex),
    "hnsw": _vector_index(HNSWIndex),
    "gather": _code_index(GatherIndex),
    "beam": _code_index(BeamIndex),
}


def state_for(kind: str, users: int) -> SlotVectors | SlotLogProbs:
    """Users of the kind that an index takes."""
    if kind in ("gather", "beam"):
        values = 2 * torch.randn(users, LEVELS, CODES, generator=torch.Generator().manual_seed(1))
        return SlotLogProbs(values.log_softmax(-1), "drawn")
    return SlotVectors(torch.from_numpy(vectors(users, 2))[:, None])


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row for each kind."""
    sizes = QUICK if quick else FULL
    return [in_a_process("indexes", kind, items) for kind, items in track(list(sizes.items()), "indexes")]


@torch.inference_mode()
def measured(kind: str, items: int) -> dict[str, Any]:
    """What an index over so many drawn items costs in this process. Ids are the catalogue's, and not counted."""
    catalogue = Catalogue([str(row) for row in range(items)])
    view = catalogue.snapshot()
    catalogue.set_live([str(row) for row in np.random.default_rng(3).permutation(items)[: round(RETIRED * items)]], False)
    fewer, states = catalogue.snapshot(), {users: state_for(kind, users) for users in BATCHES}
    process = psutil.Process()
    give_back_memory()
    before = process.memory_info().rss
    began = process_time()
    index = KINDS[kind](view)
    index.search(states[1], K, view)  # what is made at the first search belongs to the index
    row: dict[str, Any] = {"index": kind, "items": items, "build, core-s": process_time() - began}
    give_back_memory()
    row["bytes/item"] = (process.memory_info().rss - before) / items
    for users, state in states.items():
        row[f"{users} users, core-ms/user"] = core_ms(lambda state=state: index.search(state, K, view)) / users
    users = BATCHES[-1]
    row[f"{users} users, 1% retired, core-ms/user"] = core_ms(lambda: index.search(states[users], K, fewer)) / users
    return row


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
