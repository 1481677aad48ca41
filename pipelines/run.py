# SPDX-License-Identifier: Apache-2.0
"""A whole run: every step that is not there yet, then one recommendation from a real server, then the report."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pipelines.graph import Outcome, Runner
from pipelines.graph.store import RECORD
from pipelines.pipeline import GRAPH, NAMES
from pipelines.recipe import Recipe
from pipelines.report import write_report
from pipelines.steps import demo
from pipelines.steps.bundle import bundle_directory
from pipelines.steps.evaluate import K, Measured, load_measured
from pipelines.steps.prepared import load_prepared
from pipelines.steps.promote import load_release
from recsys.bundle.environment import code_commit
from recsys.core.errors import RecsysError
from recsys.core.files import write_json
from recsys.registry import Location, Registry
from recsys.training.tracking import JsonlTracker, MLflowTracker, start_run

_TRAININGS = ("ranker", "collaborative", "retriever")
_KEPT = {"frames": "features", **{name: name for name in _TRAININGS}}
"""What of the steps' results stands in a run's directory."""


@dataclass
class Run:
    """A run in progress: where it writes, what it has found, and how long its parts took."""

    recipe: Recipe
    home: Path
    directory: Path
    console: Console
    started: float = field(default_factory=time.perf_counter)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def location(self) -> Location:
        """The registry."""
        return Location.under(self.home)

    def say(self, message: str) -> None:
        """One line of progress with the time since the start."""
        self.console.print(f"[dim]{time.perf_counter() - self.started:6.1f} s[/]  {message}")


def execute(recipe: Recipe, home: Path, console: Console, directory: Path | None = None) -> Run:
    """Run a recipe; the report and ``summary.json`` stand in the run's directory, whether the gates hold or not.

    Steps that are there already are not run again, and an interrupted training goes on.

    Args:
        recipe: what to run.
        home: the folder of results, runs, registry and online stores.
        console: where progress is shown.
        directory: where to write; a new one by default.
    """
    home = home.resolve()
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    run = Run(recipe, home, (directory or home / recipe.name / stamp).resolve(), console)
    run.directory.mkdir(parents=True, exist_ok=True)
    with start_run(run.location.tracking_uri, run.location.artifacts, recipe.name, run.directory.name) as tracker:
        tracker.log_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), "recipe.yaml")
        _execute(run, tracker)
        tracker.log_artifact(run.directory / "report.html")
    return run


def _execute(run: Run, tracker: MLflowTracker) -> None:
    outcomes = Runner(GRAPH, run.recipe, run.home, run.say, tracker).run(NAMES)
    if found := [outcome for outcome in outcomes if not outcome.ran]:
        run.say(f"{len(found)} of {len(outcomes)} steps were there already")
    places = {outcome.step: outcome.result.directory for outcome in outcomes}
    _keep(run.directory, places)
    _log_found(outcomes, tracker)
    measured, release = load_measured(places["evaluate"]), load_release(places["promote"])
    run.results |= measured.results | {"champion": {name: release[name] for name in ("version", "sha256", "promoted", "gates")}}
    run.say("serving it")
    run.results["served"] = _serve(run, places["splits"], release["version"])
    _finish(run, measured, tracker)


def _keep(directory: Path, places: dict[str, Path]) -> None:
    """Put what the steps made beside the report: as further names of the same files where the file system allows, else as copies."""
    kept = {name: places[step] for name, step in _KEPT.items()} | {"bundle": bundle_directory(places["bundle"])}
    for name, place in kept.items():
        shutil.rmtree(directory / name, ignore_errors=True)
        shutil.copytree(place, directory / name, copy_function=_link, ignore=shutil.ignore_patterns(RECORD))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _log_found(outcomes: Sequence[Outcome], tracker: MLflowTracker) -> None:
    """Tell the tracker of the trainings that were there already, as they told of themselves when they ran."""
    for outcome in outcomes:
        if outcome.step in _TRAININGS and not outcome.ran:
            for row in JsonlTracker(outcome.result.directory / "metrics.jsonl").rows():
                step = int(row.pop("step"))
                tracker.log_metrics({f"{outcome.step}/{name}": value for name, value in row.items() if value is not None}, step)


def _serve(run: Run, splits: Path, version: int) -> dict[str, Any]:
    """Ask a real server for a user that it knows and for one that it does not."""
    prepared = load_prepared(splits)
    known = prepared.impressions("test").column("user_id")[-1].as_py()
    new = "brand-new-user"
    titles = dict(zip(*(prepared.dataset.items.column(c).to_pylist() for c in ("item_id", "title")), strict=True))
    recent = prepared.events_of(known, prepared.end).column("item_id").to_pylist()[-5:]
    champion = Registry(run.location).log.champion(run.recipe.model)
    model = f"models:/{run.recipe.model}@champion" if champion else f"models:/{run.recipe.model}/{version}"
    with demo.server(run.home, model, run.directory / "server.log") as client:
        served = {"known_user": demo.ask(client, known, K), "new_user": demo.ask(client, new, K)}
    return {who: answer | {"history": [titles[i] for i in recent] if who == "known_user" else []} for who, answer in served.items()}


def _finish(run: Run, measured: Measured, tracker: MLflowTracker) -> None:
    """Write the summary and the report."""
    results, seconds = run.results, time.perf_counter() - run.started
    results |= {
        "run": {
            "recipe": run.recipe.name,
            "started": run.directory.name,
            "seconds": seconds,
            "seed": run.recipe.seed,
            "commit": code_commit(),
        },
        "recipe_yaml": yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False),
    }
    results["cards"] = _cards(run)
    summary = {**measured.metrics, "champion": results["champion"], "served": results["served"], "seconds": seconds}
    write_json(run.directory / "summary.json", summary)
    write_json(run.directory / "results.json", results)
    write_report(run.directory / "report.html", results)
    tracker.log_metrics({f"{group}.{name}.{metric}": value for group, name, metric, value in _flat(summary)}, step=0)


def _flat(summary: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    rows = []
    for group in ("ranking", "retrieval", "list"):
        for name, values in summary[group].items():
            rows += [(group, name, metric, value) for metric, value in values.items() if value is not None]
    return rows


def _cards(run: Run) -> list[dict[str, str]]:
    results, recipe = run.results, run.recipe
    ranker = results["ranking"]["models"][recipe.ranker.model.name]["all"]
    found = results["retrieval"]["models"][recipe.retriever.model.name]["all"]
    final = results["lists"]["models"]["final"]["all"]
    return [
        {"name": "ranking AUC", "value": f"{ranker['auc']:.3f}"},
        {"name": "calibration (1 is right)", "value": f"{ranker['calibration']:.3f}"},
        {"name": "retrieval recall@10", "value": f"{found['recall@10']:.3f}"},
        {"name": "final list NDCG@10", "value": f"{final['ndcg@10']:.3f}"},
        {"name": "a recommendation, p99", "value": f"{results['latency']['p99_ms']:.0f} ms"},
        {"name": "offline − online score, at most", "value": f"{results['parity']:.1e}"},
    ]


def promoted(run: Run) -> bool:
    """Whether the run's bundle became the champion.

    Raises:
        RecsysError: the run has not come that far.
    """
    if "champion" not in run.results:
        raise RecsysError("the run ended before its bundle was released")
    return bool(run.results["champion"]["promoted"])
