# SPDX-License-Identifier: Apache-2.0
"""The contestant's side: an epoch timed, its sums, or the memory that it takes. Imports nothing beyond numpy and pyarrow.

A contestant is a process that may use so many processor cores, whatever its libraries' threads and processes are.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.feature_store.measure import peak_bytes, timed
from benchmarks.loader.data import CATEGORICAL, TAGS
from recsys.core.memory import keep_freed_memory


def use_cores(count: int) -> None:
    """Keep this process, and what it starts, to so many cores, and freed memory in it, as trainings do; called before libraries count."""
    keep_freed_memory()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])


@dataclass(frozen=True)
class Seen:
    """What a batch of B rows holds.

    Attributes:
        ids: for each column, its ids, padding included.
        dense: ``[B, 13]``.
        labels: ``[B]``.
    """

    ids: dict[str, np.ndarray]
    dense: np.ndarray
    labels: np.ndarray


class Contestant:
    """A library's way from Parquet files to what its models take.

    Args:
        ways: by name, from a folder of rows (see `benchmarks.loader.data`) to the batches of an epoch.
        see: what a batch holds.
        prepare: learns what raw rows need before they can be read: called once for a folder, and not timed.
    """

    def __init__(
        self,
        ways: dict[str, Callable[[Path], Iterator[Any]]],
        see: Callable[[Any], Seen],
        prepare: Callable[[Path], None],
    ) -> None:
        self._ways, self._see, self._prepare = ways, see, prepare

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; ``batches`` limits it to so many, and of these the first is not timed, before which data may be read."""
        folder = Path(request["folder"])
        match request["do"]:
            case "prepare":
                self._prepare(folder)
                return {}
            case "time":
                epoch, batches = self._ways[request["way"]], request.get("batches")
                if batches is None:
                    rows, seconds = timed(lambda: _rows(epoch(folder)))
                else:
                    started = epoch(folder)
                    next(started)
                    rows, seconds = timed(lambda: _rows(itertools.islice(started, batches)))
                return {"rows": rows, "seconds": seconds}
            case "memory":
                epoch = self._ways[request["way"]]
                return {"bytes": peak_bytes(lambda: _rows(itertools.islice(epoch(folder), request.get("batches"))))}
            case "sums":
                return self._sums(request["way"], folder)
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _sums(self, way: str, folder: Path) -> dict[str, Any]:
        """Sums of an epoch, and for each column a digest of how often each id occurs, and of how often ids occur whatever they are."""
        counts: dict[str, np.ndarray] = {name: np.zeros(0, dtype=np.int64) for name in (*CATEGORICAL, TAGS)}
        dense, labels, rows = np.zeros(0), 0.0, 0
        for batch in self._ways[way](folder):
            seen = self._see(batch)
            rows += len(seen.labels)
            labels += float(seen.labels.sum(dtype=np.float64))
            dense = seen.dense.sum(axis=0, dtype=np.float64) + (dense if len(dense) else 0.0)
            for name, ids in seen.ids.items():
                counts[name] = _add(counts[name], np.bincount(ids.astype(np.int64).ravel()))
        counts[TAGS][:1] = 0  # which fills lists up
        return {
            "rows": rows,
            "labels": labels,
            "dense": dense.tolist(),
            "ids": {name: _digest(np.trim_zeros(found, "b")) for name, found in counts.items()},
            "frequencies": {name: _digest(np.sort(found[found > 0])) for name, found in counts.items()},
        }


def _rows(batches: Iterable[Any]) -> int:
    """How many rows they have; a batch is looked at for its size alone."""
    return sum(_size(batch) for batch in batches)


def _size(batch: Any) -> int:
    """The rows of a batch: a dictionary of tensors, inputs beside labels, or one of our batches."""
    if isinstance(batch, dict):
        return len(batch["label"])
    return len(batch[1]) if isinstance(batch, (tuple, list)) else len(batch)


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(a), len(b)), dtype=np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _digest(counts: np.ndarray) -> str:
    return hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()[:16]
