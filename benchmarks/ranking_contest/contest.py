# SPDX-License-Identifier: Apache-2.0
"""The contestant's side: time training steps, or train on many rows and measure on held-out ones. Imports nothing beyond numpy."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.ranking_contest.data import HELD_OUT, Planted, Rows, quality

BATCH = 4096
_TIMED = 1 << 39  # the first row of those that speed is measured on
HELD_OUT_ROWS = 100_000


class Contestant:
    """A model with its optimizer, as a user of its library would set it up.

    Args:
        prepare: from rows to the batch that the model takes; for timing it is called beforehand, as a loader would.
        step: one training step on a batch.
        predict: probabilities of a batch.
        tables: what the embedding tables alone do in a step (for `bound`); None where it is not asked.
    """

    def __init__(
        self,
        prepare: Callable[[Rows], Any],
        step: Callable[[Any], None],
        predict: Callable[[Any], np.ndarray],
        tables: Callable[[Any], None] | None = None,
    ) -> None:
        self._prepare, self._step, self._predict, self._tables = prepare, step, predict, tables
        self._data, self._drawn = Planted(), 0

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        match request["do"]:
            case "time":
                return self._time(request["steps"])
            case "train":
                return self._train(request["rows"])
            case "bound":
                return self._bound(request["steps"])
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _time(self, steps: int) -> dict[str, Any]:
        """Samples a second over ``steps`` steps on batches in memory, after one step of warm-up."""
        first, *batches = self._batches(steps + 1)
        self._step(first)
        started = time.perf_counter()
        for batch in batches:
            self._step(batch)
        return {"samples_per_second": steps * BATCH / (time.perf_counter() - started)}

    def _batches(self, count: int) -> list[Any]:
        """Batches that were not used before.

        A batch that is trained on again and again is soon known by heart; its gradients are then denormal numbers, with which a product
        takes many times as long.
        """
        rows = [self._data.rows(_TIMED + (self._drawn + i) * BATCH, BATCH) for i in range(count)]
        self._drawn += count
        return [self._prepare(drawn) for drawn in rows]

    def _bound(self, steps: int) -> dict[str, Any]:
        """Seconds of a step, of its tables alone and of its matrix products alone: medians of alternating measurements."""
        from benchmarks.gemms import Products, seconds  # asks for torch

        if self._tables is None:
            raise ValueError("bound: this contestant does not say what its tables do")
        first, *batches = self._batches(1 + 2 * steps)
        tables, products = self._tables, Products(lambda: self._step(first))
        found: dict[str, list[float]] = {"step": [], "tables": [], "products": []}
        for batch in batches:
            found["step"].append(seconds(lambda batch=batch: self._step(batch)))
            found["tables"].append(seconds(lambda batch=batch: tables(batch)))
            found["products"].append(seconds(products.run))
        median = {name: float(np.median(values)) for name, values in found.items()}
        return median | {"share": (median["tables"] + median["products"]) / median["step"]}

    def _train(self, rows: int) -> dict[str, Any]:
        """One pass over ``rows`` rows, then quality on rows that nobody trained on."""
        started = time.perf_counter()
        waited = 0.0
        for start in range(BATCH, BATCH + rows, BATCH):
            before = time.perf_counter()
            drawn = self._data.rows(start, BATCH)
            waited += time.perf_counter() - before
            self._step(self._prepare(drawn))
        seconds = time.perf_counter() - started - waited
        labels, probability = [], []
        for start in range(0, HELD_OUT_ROWS, BATCH):
            drawn = self._data.rows(HELD_OUT + start, BATCH)
            labels.append(drawn.labels)
            probability.append(self._predict(self._prepare(drawn)))
        return {"rows": rows, "seconds": seconds, **quality(np.concatenate(labels), np.concatenate(probability))}
