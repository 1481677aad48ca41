# SPDX-License-Identifier: Apache-2.0
"""Lists of S parts put together: how long `recsys.retrieval.catalogue.shards.merge` takes."""

from typing import Any

import numpy as np

from benchmarks.catalogue_shards.timing import core_ms
from recsys.retrieval.catalogue.shards import merge

PARTS, USERS, K = (2, 4, 8, 16, 32, 64), (1, 64), 100


def drawn(parts: int, users: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sorted lists of drawn scores."""
    random = np.random.default_rng(0)
    scores = -np.sort(-random.standard_normal((parts, users, K)).astype(np.float32), axis=2)
    return [(random.integers(0, 10**6, (users, K)), scores[part]) for part in range(parts)]


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row for each number of parts."""
    rows = []
    for parts in PARTS:
        row: dict[str, Any] = {"parts": parts}
        for users in USERS:
            lists, firsts = drawn(parts, users), [part * 10**6 for part in range(parts)]
            times = 51 if quick else 301
            row[f"{users} users, core-ms"] = core_ms(lambda lists=lists, firsts=firsts: merge(lists, firsts, K), times)
        # What a list weighs on its way: rows of the part in 32 bits, scores in 32.
        row["KB received, a user"] = parts * K * 8 / 1e3
        rows.append(row)
    return rows
