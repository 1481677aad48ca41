# SPDX-License-Identifier: Apache-2.0
"""Indexes of vectors when few items are live: recall and queries per second, exact search beside inverted lists and a graph."""

from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.frame import Check
from recsys.retrieval.catalogue import Catalogue, CatalogueView, DenseIndex, HNSWIndex, IVFIndex
from recsys.retrieval.catalogue.approximate import ApproximateIndex, recall_of
from recsys.retrieval.state import SlotVectors
from recsys.training.progress import track

DIM, CLUSTERS, USERS, K = 128, 500, 256, 10
SHARES = (1.0, 0.1, 0.01, 0.001)


def vectors(count: int, seed: int) -> np.ndarray:
    """float32 ``[count, DIM]`` around the same centres for every seed, as item vectors and states lie after training."""
    centres = np.random.default_rng(0).normal(size=(CLUSTERS, DIM))
    random = np.random.default_rng(seed)
    found: np.ndarray = (centres[random.integers(0, CLUSTERS, count)] + 0.7 * random.normal(size=(count, DIM))).astype(np.float32)
    return found


def live_view(items: int, share: float) -> CatalogueView:
    """A catalogue of which a share, drawn by lot, is live."""
    ids = [str(i) for i in range(items)]
    catalogue = Catalogue(ids)
    dead = np.random.default_rng(1).permutation(items)[round(share * items) :]
    catalogue.set_live([ids[i] for i in dead], False)
    return catalogue.snapshot()


def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """The rows and the checks of this part."""
    items = 20_000 if quick else 100_000
    content, view = vectors(items, 1), live_view(items, 1.0)
    states, others = (SlotVectors(torch.from_numpy(vectors(USERS, seed))[:, None]) for seed in (2, 3))
    exact = DenseIndex.build(DenseIndex.Config(), content, view, content_hash="drawn")
    indexes: dict[str, DenseIndex] = {"exact": exact}
    kinds: tuple[type[ApproximateIndex], ...] = (IVFIndex, HNSWIndex)
    for kind in track(kinds, "building"):
        built = kind.build(kind.Config(), content, view, content_hash="drawn")
        indexes[built.config.name] = built.calibrated(others, view, recall=0.995, k=K)
    rows, worst = [], 1.0
    for share in track(SHARES, "live shares"):
        view = live_view(items, share)
        wanted, _ = exact.search(states, K, view)
        for name, index in indexes.items():
            index.search(states, K, view)
            start = perf_counter()
            found, _ = index.search(states, K, view)
            seconds, recall = perf_counter() - start, recall_of(found, wanted)
            worst = min(worst, recall)
            rows.append({"live": f"{100 * share:g}%", "index": name, f"recall@{K}": recall, "queries/s": USERS / seconds})
    note = "lowest of all indexes and live shares; efforts chosen on other users"
    return rows, [Check("faiss_recall", round(worst, 4), at_least=0.99, note=note)]
