# SPDX-License-Identifier: Apache-2.0
"""The server that is soaked: a process of its own on a core of its own, over a small registry with two versions."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient
from rich.console import Console

from benchmarks.serving import servers
from benchmarks.serving.servers import OURS, WHOLE, Running
from benchmarks.worker import ROOT
from pipelines.recipe import Recipe
from pipelines.run import execute
from recsys.core.config import load_recipe
from recsys.registry import Evidence, Location, Registry

HOME = ROOT / ".cache" / "serving_soak" / "home"
MODEL = "recsys"
_SMALL = (
    "dataset={name: synthetic}",
    "text.encoder={name: hashing}",
    "ranker.training.trainer.epochs=2",
    "collaborative.training.trainer.epochs=4",
    "retriever.training.trainer.epochs=4",
    "evaluation.resamples=100",
    "evaluation.explained_requests=5",
    "gates=[{kind: bound, metric: ranking.ranker.auc, at_least: 0.5}, {kind: against_champion, metric: list.ndcg@10, margin: 1.0}]",
)


def registry_at(home: Path = HOME) -> Registry:
    """A registry whose champion can be rolled back to another version; it is made where it is not there yet."""
    if not (home / "mlflow.db").exists():
        execute(load_recipe(Recipe, "quickstart", _SMALL), home, Console(stderr=True))
    registry = Registry(Location.under(home))
    champion = registry.log.champion(MODEL)
    if champion is None:
        raise RuntimeError(f"{home}: the run put no champion live; remove the folder and begin again")
    if registry.log.previous(MODEL) is None:
        client = MlflowClient(registry.location.tracking_uri, registry.location.tracking_uri)
        first = client.get_model_version(MODEL, str(champion.to_version))
        version = int(client.create_model_version(MODEL, first.source, first.run_id, tags=first.tags).version)
        same = {"list.ndcg@10": {"estimate": 0.0, "low": 0.0, "high": 0.0}}
        evidence = Evidence.of(registry.download(MODEL, version), same)
        registry.promote(MODEL, version, gates=(), evidence=evidence, expected=champion.to_version)
    return registry


@contextmanager
def running(home: Path, log: Path, *options: str) -> Iterator[Running]:
    """A server that is ready; it is ended however the block ends.

    Raises:
        RuntimeError: it did not become ready; names the log's end.
    """
    soaked = replace(OURS, command=lambda port, home: ["-m", "serving", "--port", str(port), "--home", str(home), *options])
    log.parent.mkdir(parents=True, exist_ok=True)
    with servers.running(soaked, home, WHOLE, min(os.sched_getaffinity(0)), log) as server:
        yield server
