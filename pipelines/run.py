# SPDX-License-Identifier: Apache-2.0
"""A whole run: raw events → features → ranker and retriever → measured list → promoted bundle → served recommendation → report."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from pipelines.recipe import Recipe
from pipelines.report import write_report
from pipelines.steps import compare, demo, lists, measure, release
from pipelines.steps.data import Prepared, prepare
from pipelines.steps.ranking import RankingResult, build_frames, train_ranker
from pipelines.steps.retrieval import Histories, RetrievalResult, build_histories, text_vectors, train_retrievers
from recsys.bundle.bundle import Bundle
from recsys.bundle.environment import code_commit
from recsys.core.errors import RecsysError
from recsys.core.files import write_json
from recsys.evaluation.bootstrap import paired_mean_difference
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.inference.recommender import Recommender
from recsys.registry import Location, Registry
from recsys.training.tracking import MLflowTracker, start_run

K = 10


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

    Args:
        recipe: what to run.
        home: the folder of runs, registry and online stores.
        console: where progress is shown.
        directory: of an earlier run of the same recipe, to be continued; a new one by default.
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
    recipe = run.recipe
    run.say(f"loading {recipe.dataset.name}")
    prepared = prepare(recipe)
    run.say("joining features as of just before every event")
    frames = build_frames(prepared, run.directory / "frames")
    run.say("training the ranker")
    ranking = train_ranker(recipe, prepared, frames, run.directory / "ranker", tracker)
    run.say("embedding item texts")
    histories = build_histories(prepared)
    text = text_vectors(recipe, prepared, run.home / "cache")
    run.say("training the retrievers")
    retrieval = train_retrievers(recipe, prepared, histories, text, run.directory, tracker)
    bundle = release.assemble(recipe, prepared, ranking, histories, retrieval)
    run.say("measuring the list that would be served")
    measured = _measure(run, prepared, ranking, histories, retrieval, bundle)
    run.say("registering, and promoting if the gates hold")
    released = release.release(recipe, bundle, run.directory, run.location, tracker.run_id, measured.comparison, measured.champion)
    run.results["champion"] = {
        "version": released.version,
        "sha256": released.sha256,
        "promoted": released.event.action == "promote",
        "gates": [gate.model_dump() for gate in released.gates],
    }
    run.say("serving it")
    run.results["served"] = _serve(run, prepared, released.version)
    _finish(run, prepared, tracker)


@dataclass(frozen=True)
class _Measured:
    comparison: dict[str, dict[str, float]] | None
    champion: int | None


def _measure(
    run: Run, prepared: Prepared, ranking: RankingResult, histories: Histories, retrieval: RetrievalResult, bundle: Bundle
) -> _Measured:
    """Fill the results and the bundle's metrics; compare with the champion, if there is one, on the same events."""
    recipe, evaluation, seed = run.recipe, run.recipe.evaluation, run.recipe.seed
    ours, finder = recipe.ranker.model.name, recipe.retriever.model.name
    segments = prepared.segments()
    users = measure.user_codes(prepared.impressions("test").column("user_id"))
    offline = Recommender(bundle, prepared.reader)
    chosen = histories.valid.sample(recipe.lists.validation_steps, seed)
    weight = lists.choose_rank_weight(lists.retrieve(offline, chosen, "lists, validation"), chosen, recipe.lists.rank_weights)
    bundle.settings = bundle.settings.model_copy(update={"rank_weight": weight})
    served = lists.retrieve(offline, histories.test, "lists, test")
    list_ranks = {"final": lists.list_ranks(served, histories.test, weight), "retriever": lists.list_ranks(served, histories.test, 0.0)}
    run.say("testing the explanations")
    deletions = lists.deletion_test(offline, prepared, histories.test, evaluation.explained_requests, seed)
    run.say("comparing online with offline scores")
    online = release.online_recommender(bundle, recipe, prepared, run.location)
    intervals = measure.ranking_intervals(ours, ranking.labels, ranking.probabilities, users, evaluation, seed)
    intervals |= measure.retrieval_intervals(finder, retrieval.ranks, users, evaluation, seed)
    places = {name: ndcg_at(ranks, 10) for name, ranks in list_ranks.items()}
    intervals["final_above_retriever.ndcg@10"] = measure.mean_interval(places["final"], places["retriever"], users, evaluation, seed)
    for other in ("random", "last"):
        values = getattr(deletions, other)
        intervals[f"top_event_above_{other}_event.fall"] = measure.mean_interval(deletions.top, values, deletions.user, evaluation, seed)
    run.results |= {
        "ranking": {
            "label": f"{recipe.encoder.tasks[0].feature} {recipe.encoder.tasks[0].threshold or ''}",
            "models": {
                name: measure.by_segment(
                    segments, lambda y, p, u: measure.ranking_metrics(y, p, u, ranking.base_rate), ranking.labels, probability, users
                )
                for name, probability in ranking.probabilities.items()
            },
            "calibration": measure.calibration_bins(ranking.labels, ranking.probabilities),
        },
        "retrieval": {
            "models": {name: measure.by_segment(segments, measure.rank_metrics, ranks) for name, ranks in retrieval.ranks.items()},
            "slices": measure.by_slice(histories.slices(), retrieval.ranks),
            "slices_with_seen": measure.by_slice(histories.slices(), retrieval.with_seen) if retrieval.with_seen else {},
            "beta": getattr(retrieval.retriever, "beta", None),
        },
        "lists": {
            "models": {name: measure.by_segment(segments, measure.rank_metrics, ranks) for name, ranks in list_ranks.items()},
            "candidates": recipe.lists.candidates,
            "rank_weight": weight,
        },
        "explanations": {
            "requests": len(deletions.top),
            "users": len(np.unique(deletions.user)),
            "effects": {
                name: _effect(getattr(deletions, name), deletions.user, evaluation.resamples, seed) for name in ("top", "random", "last")
            },
        },
        "verdicts": [measure.verdict(name, interval) for name, interval in intervals.items()],
        "curves": {ours: ranking.history.rows()} | {name: history.rows() for name, history in retrieval.curves.items()},
        "monitors": {ours: "auc"} | dict.fromkeys(retrieval.curves, "ndcg@10"),
        "parity": release.parity(offline, online, histories.test, seed),
        "latency": release.latency(online, histories.test, K, seed),
    }
    bundle.metrics = _bundle_metrics(run.results, ours)
    return _compare(run, prepared, histories, places["final"], users)


def _effect(values: np.ndarray, clusters: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    interval = paired_mean_difference(values, np.zeros_like(values), clusters, resamples=resamples, level=0.95, seed=seed)
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _compare(run: Run, prepared: Prepared, histories: Histories, ours: np.ndarray, users: np.ndarray) -> _Measured:
    """The candidate's list less the champion's, on the same test events; nothing where there is no champion."""
    registry = Registry(run.location)
    champion = registry.log.champion(run.recipe.model)
    if champion is None:
        return _Measured(None, None)
    run.say(f"comparing with the champion, version {champion.to_version}")
    theirs = compare.champion_list(registry, run.recipe.model, prepared, histories)
    interval = measure.mean_interval(ours, theirs, users, run.recipe.evaluation, run.recipe.seed)
    difference = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return _Measured({"list.ndcg@10": difference}, champion.to_version)


def _bundle_metrics(results: dict[str, Any], ranker: str) -> dict[str, Any]:
    """What goes into the bundle, and what gates look at; the recipe's ranker stands under its name and as ``ranker``."""
    ranking = {name: segments["all"] for name, segments in results["ranking"]["models"].items()}
    ranking["ranker"] = ranking[ranker]
    return {
        "ranking": ranking,
        "calibration": {name: values["calibration"] for name, values in ranking.items()},
        "retrieval": {name: segments["all"] for name, segments in results["retrieval"]["models"].items()},
        "slices": results["retrieval"]["slices"],
        "list": {name: segments["all"] for name, segments in results["lists"]["models"].items()},
        "intervals": {v["name"]: {"estimate": v["estimate"], "low": v["low"], "high": v["high"]} for v in results["verdicts"]},
        "parity": {"max_difference": results["parity"]},
        "latency": results["latency"],
    }


def _serve(run: Run, prepared: Prepared, version: int) -> dict[str, Any]:
    """Ask a real server for a user that it knows and for one that it does not."""
    known = prepared.impressions("test").column("user_id")[-1].as_py()
    new = "brand-new-user"
    titles = dict(zip(*(prepared.dataset.items.column(c).to_pylist() for c in ("item_id", "title")), strict=True))
    recent = prepared.events_of(known, prepared.end).column("item_id").to_pylist()[-5:]
    champion = Registry(run.location).log.champion(run.recipe.model)
    model = f"models:/{run.recipe.model}@champion" if champion else f"models:/{run.recipe.model}/{version}"
    with demo.server(run.home, model, run.directory / "server.log") as client:
        served = {"known_user": demo.ask(client, known, K), "new_user": demo.ask(client, new, K)}
    return {who: answer | {"history": [titles[i] for i in recent] if who == "known_user" else []} for who, answer in served.items()}


def _finish(run: Run, prepared: Prepared, tracker: MLflowTracker) -> None:
    """Write the summary and the report, and show the lists."""
    results, split = run.results, prepared.split
    seconds = time.perf_counter() - run.started
    segments = prepared.segments()
    ingested = prepared.dataset
    results |= {
        "run": {
            "recipe": run.recipe.name,
            "started": run.directory.name,
            "seconds": seconds,
            "seed": run.recipe.seed,
            "commit": code_commit(),
        },
        "data": {
            "name": ingested.name,
            "interactions": ingested.interactions.num_rows,
            "items": ingested.items.num_rows,
            "users": len(prepared.events.column("user_id").unique()),
            "valid_start": split.valid_start.isoformat(sep=" "),
            "test_start": split.test_start.isoformat(sep=" "),
            "end": prepared.end.isoformat(sep=" "),
            **{part: events.num_rows for part, events in prepared.parts.items()},
            "test_new_share": float(segments["new"].mean()),
        },
        "recipe_yaml": yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False),
    }
    results["cards"] = _cards(run)
    summary = {
        **_bundle_metrics(results, run.recipe.ranker.model.name),
        "champion": results["champion"],
        "served": results["served"],
        "seconds": seconds,
    }
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
