# SPDX-License-Identifier: Apache-2.0
"""The server that is soaked: a process of its own on a core of its own, over a small registry with two versions."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from mlflow import MlflowClient
from rich.console import Console

from pipelines.recipe import Recipe
from pipelines.run import execute
from pipelines.steps.demo import free_port
from recsys.core.config import load_recipe
from recsys.registry import Evidence, Location, Registry

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".cache" / "serving_soak" / "home"
MODEL = "recsys"
_START_SECONDS = 300
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
def running(home: Path, log: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    """The port and the process of a server that is ready; it is ended however the block ends.

    Raises:
        RuntimeError: it did not become ready; names the log.
    """
    port, core = free_port(), min(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "serving", "--port", str(port), "--home", str(home), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, preexec_fn=lambda: os.sched_setaffinity(0, {core})
        )
    try:
        end = time.monotonic() + _START_SECONDS
        while version_at(port) is None:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not become ready: exit status {process.poll()}; see {log}")
            time.sleep(0.2)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def version_at(port: int) -> str | None:
    """What ``/readyz`` says, where it says that all is well."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


def memory(process: psutil.Process) -> int:
    """Resident bytes of a process and its children."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
