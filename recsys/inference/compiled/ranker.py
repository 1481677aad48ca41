# SPDX-License-Identifier: Apache-2.0
"""A ranker whose dense part was compiled by AOTInductor; its tables are looked up as ever."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package

from recsys.bundle.bundle import Bundle
from recsys.data.batch import RankingBatch, TiledBatch
from recsys.inference.compiled.cache import About, Key, store, stored
from recsys.inference.compiled.graph import Span, arguments, capture, fits
from recsys.ranking.model import Ranker
from recsys.ranking.vectors import vectors

log = logging.getLogger(__name__)


class CompiledRanker:
    """Predicts as the ranker does that it was compiled from; threads that ask at the same time come one after another.

    A compiled graph has one place to work in, and whoever waits for it keeps Python's lock, which operators of the graph that are written
    in Python need: two threads inside would wait for each other for ever.

    Args:
        ranker: whose tables are looked up, and which answers where a batch is too small for the graph.
        graph: from `recsys.inference.compiled.graph.arguments`, or from the fields' vectors, to logits.
        span: where it begins.
    """

    def __init__(self, ranker: Ranker, graph: Callable[..., Any], span: Span) -> None:
        self.ranker, self.span = ranker, span
        self._graph, self._turn = graph, threading.Lock()

    @torch.no_grad()
    def predict(self, batch: RankingBatch | TiledBatch) -> Tensor:
        """See `Ranker.predict`."""
        inputs = vectors(self.ranker.embed(batch), batch, self.ranker.spec)
        if not fits(inputs):
            return torch.sigmoid(self.ranker.interact(self.ranker.fields_of(inputs)))
        given = arguments(inputs) if self.span == "vectors" else (self.ranker.fields_of(inputs).contiguous(),)
        with self._turn:
            logits: Tensor = self._graph(*given)
        return torch.sigmoid(logits)


def compile_ranker(bundle: Bundle, cache: Path) -> CompiledRanker | None:
    """A bundle's ranker, compiled for this host, or found in ``cache`` where that was done before. It takes about half a minute.

    It is not to be used before it has been compared with the ranker itself on real rows: `recsys.inference.recommender.Recommender.adopt`.

    Args:
        bundle: as it was loaded.
        cache: a directory of this host. Whoever can write there decides what is run.

    Returns:
        None where the ranker cannot be compiled; the reason is logged.
    """
    key = Key.here(bundle.manifest.sha256)
    try:
        graph, about = stored(cache, key) or _build(bundle.ranker, cache, key)
        return CompiledRanker(bundle.ranker, aoti_load_package(str(graph)), about.span)
    except Exception as error:
        log.warning("the ranker of bundle %s is not compiled: %s: %s", bundle.manifest.sha256[:12], type(error).__name__, error)
        return None


def _build(ranker: Ranker, cache: Path, key: Key) -> tuple[Path, About]:
    captured = capture(ranker)
    if captured.passed_over is not None:
        log.warning("the ranker is compiled behind its history encoders only: %s", captured.passed_over)

    def write(path: Path) -> None:
        aoti_compile_and_package(captured.program, package_path=str(path))

    return store(cache, key, captured.span, write)
