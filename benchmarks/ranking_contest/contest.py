# SPDX-License-Identifier: Apache-2.0
"""The contestant's side: time training steps, or train on many rows and measure on held-out ones. Imports nothing beyond numpy."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.ranking_contest.data import HELD_OUT, Planted, Rows, quality

BATCH = 4096
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
        self._data = Planted()

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
        """Samples a second over ``steps`` steps on one in-memory batch, after one step of warm-up."""
        batch = self._prepare(self._data.rows(0, BATCH))
        self._step(batch)
        started = time.perf_counter()
        for _ in range(steps):
            self._step(batch)
        return {"samples_per_second": steps * BATCH / (time.perf_counter() - started)}

    def _bound(self, steps: int) -> dict[str, Any]:
        """Seconds of a step, of its tables alone and of its matrix products alone: medians of alternating measurements."""
        from benchmarks.gemms import Products, seconds  # asks for torch

        if self._tables is None:
            raise ValueError("bound: this contestant does not say what its tables do")
        batch, tables = self._prepare(self._data.rows(0, BATCH)), self._tables
        products = Products(lambda: self._step(batch))
        work = {"step": lambda: self._step(batch), "tables": lambda: tables(batch), "products": products.run}
        found: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(2 * steps):
            for name, part in work.items():
                found[name].append(seconds(part))
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
