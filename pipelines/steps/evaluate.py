# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured of a candidate, through the path that would serve it; and λ, chosen on the validation period."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from pipelines.graph.step import Context
from pipelines.steps import lists, measure
from pipelines.steps.assemble import assemble
from pipelines.steps.collaborative import load_collaborative
from pipelines.steps.features import offline
from pipelines.steps.histories import Histories, build_histories
from pipelines.steps.index import load_index
from pipelines.steps.materialise import open_online
from pipelines.steps.online import latency, parity
from pipelines.steps.prepared import Prepared, load_prepared
from pipelines.steps.ranker import RankingResult, load_ranking
from pipelines.steps.ranks import retrieval_ranks
from pipelines.steps.retriever import load_retriever
from pipelines.steps.retrieving import load_curve
from pipelines.steps.slices import event_slices, figures
from pipelines.steps.text import load_text
from pipelines.training import Curve
from recsys.core.files import read_json, write_json
from recsys.evaluation.bootstrap import Interval, paired_mean_difference
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.inference.recommender import Recommender

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

K = 10
_RESULTS, _PLACES = "results.json", "places.safetensors"


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        results: as the report shows them.
        metrics: what goes into the bundle, and what gates look at.
        places: NDCG@10 of the final list at every test event, float64 ``[events]``.
    """

    results: dict[str, Any]
    metrics: dict[str, Any]
    places: np.ndarray

    @property
    def rank_weight(self) -> float:
        """λ."""
        return float(self.results["lists"]["rank_weight"])


def load_measured(directory: Path) -> Measured:
    """What the step wrote."""
    stored = read_json(directory / _RESULTS)
    return Measured(stored["results"], stored["metrics"], load_file(directory / _PLACES)["final"])


def run(context: Context) -> None:
    """Write ``results.json`` and ``places.safetensors``."""
    recipe, inputs = context.recipe, context.inputs
    prepared = load_prepared(inputs["splits"])
    histories, ranking, retrieval = build_histories(prepared), load_ranking(inputs["ranker"]), load_retriever(inputs["retriever"])
    index = load_index(inputs["index"], histories.catalogue)
    collaborative, _ = load_collaborative(inputs["collaborative"], histories)
    models = {recipe.retriever.model.name: (retrieval.retriever, index), recipe.collaborative.model.name: (collaborative, None)}
    context.say("ranking the catalogue for every test event")
    ranks, with_seen = retrieval_ranks(models, histories, load_text(inputs["text"]), recipe.seed)
    curves = {"sasrec": load_curve(inputs["collaborative"]), recipe.retriever.model.name: retrieval.curve}
    beta = getattr(retrieval.retriever, "beta", None)
    bundle = assemble(recipe, prepared, ranking, histories, retrieval, index)
    results, places = _measure(context, prepared, ranking, histories, ranks, bundle)
    results["retrieval"] = {
        "models": {name: measure.by_segment(prepared.segments(), measure.rank_metrics, own) for name, own in ranks.items()},
        "slices": measure.by_slice(histories.slices(), ranks),
        "slices_with_seen": measure.by_slice(histories.slices(), with_seen) if with_seen else {},
        "beta": beta,
    }
    results |= _learning(recipe.ranker.model.name, ranking.curve, {name: curve for name, curve in curves.items() if curve is not None})
    results["data"] = _described(prepared)
    metrics = bundle_metrics(results, recipe.ranker.model.name)
    write_json(context.out / _RESULTS, {"results": results, "metrics": metrics})
    save_file({"final": places}, context.out / _PLACES)


def _measure(
    context: Context,
    prepared: Prepared,
    ranking: RankingResult,
    histories: Histories,
    ranks: dict[str, np.ndarray],
    bundle: Any,
) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of the ranker, of the final list, of explanations, parity and latency; and the final list's NDCG@10 at every event."""
    recipe: Recipe = context.recipe
    evaluation, seed = recipe.evaluation, recipe.seed
    ours, finder = recipe.ranker.model.name, recipe.retriever.model.name
    segments = prepared.segments()
    users = measure.user_codes(prepared.impressions("test").column("user_id"))
    store = offline(recipe.features, prepared.dataset)
    recommender = Recommender(bundle, store.reader)
    context.say("measuring the list that would be served")
    chosen = histories.valid.sample(recipe.lists.validation_steps, seed)
    weight = lists.choose_rank_weight(lists.retrieve(recommender, chosen, "lists, validation"), chosen, recipe.lists.rank_weights)
    bundle.settings = bundle.settings.model_copy(update={"rank_weight": weight})
    served = lists.retrieve(recommender, histories.test, "lists, test")
    list_ranks = {"final": lists.list_ranks(served, histories.test, weight), "retriever": lists.list_ranks(served, histories.test, 0.0)}
    context.say("testing the explanations")
    deletions = lists.deletion_test(recommender, prepared, store, histories.test, evaluation.explained_requests, seed)
    context.say("comparing online with offline scores")
    online = Recommender(bundle, open_online(recipe.features, context.home))
    places = {name: ndcg_at(own, K) for name, own in list_ranks.items()}
    intervals = measure.ranking_intervals(ours, ranking.labels, ranking.probabilities, users, evaluation, seed)
    intervals |= measure.retrieval_intervals(finder, ranks, users, evaluation, seed)
    intervals["final_above_retriever.ndcg@10"] = measure.mean_interval(places["final"], places["retriever"], users, evaluation, seed)
    for other in ("random", "last"):
        values = getattr(deletions, other)
        intervals[f"top_event_above_{other}_event.fall"] = measure.mean_interval(deletions.top, values, deletions.user, evaluation, seed)
    slices = event_slices(prepared, histories, evaluation.slices)
    probability = ranking.probabilities[ours]
    results = {
        "ranking": _ranking(recipe, ranking, segments, users),
        "lists": {
            "models": {name: measure.by_segment(segments, measure.rank_metrics, own) for name, own in list_ranks.items()},
            "candidates": recipe.lists.candidates,
            "rank_weight": weight,
        },
        "explanations": _explanations(deletions, evaluation.resamples, seed),
        "by_slice": figures(slices, list_ranks["final"], ranking.labels, probability, users, ranking.base_rate),
        "verdicts": [measure.verdict(name, interval) for name, interval in intervals.items()],
        "parity": parity(recommender, online, histories.test, seed),
        "latency": latency(online, histories.test, K, seed),
    }
    return results, places["final"]


def _ranking(recipe: "Recipe", ranking: RankingResult, segments: measure.Segments, users: np.ndarray) -> dict[str, Any]:
    def figures(labels: np.ndarray, probability: np.ndarray, whose: np.ndarray) -> dict[str, float | None]:
        return measure.ranking_metrics(labels, probability, whose, ranking.base_rate)

    return {
        "label": f"{recipe.encoder.tasks[0].feature} {recipe.encoder.tasks[0].threshold or ''}",
        "models": {
            name: measure.by_segment(segments, figures, ranking.labels, probability, users)
            for name, probability in ranking.probabilities.items()
        },
        "calibration": measure.calibration_bins(ranking.labels, ranking.probabilities),
    }


def _explanations(deletions: lists.Deletions, resamples: int, seed: int) -> dict[str, Any]:
    effects = {name: _effect(getattr(deletions, name), deletions.user, resamples, seed) for name in ("top", "random", "last")}
    return {"requests": len(deletions.top), "users": len(np.unique(deletions.user)), "effects": effects}


def _effect(values: np.ndarray, clusters: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    interval: Interval = paired_mean_difference(values, np.zeros_like(values), clusters, resamples=resamples, level=0.95, seed=seed)
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _learning(ranker: str, curve: Curve, retrievers: dict[str, Curve]) -> dict[str, Any]:
    return {"curves": {ranker: curve} | retrievers, "monitors": {ranker: "auc"} | dict.fromkeys(retrievers, "ndcg@10")}


def _described(prepared: Prepared) -> dict[str, Any]:
    dataset, split = prepared.dataset, prepared.split
    return {
        "name": dataset.name,
        "interactions": dataset.interactions.num_rows,
        "items": dataset.items.num_rows,
        "users": len(prepared.events.column("user_id").unique()),
        "valid_start": split.valid_start.isoformat(sep=" "),
        "test_start": split.test_start.isoformat(sep=" "),
        "end": prepared.end.isoformat(sep=" "),
        **{part: events.num_rows for part, events in prepared.parts.items()},
        "test_new_share": float(prepared.segments()["new"].mean()),
    }


def bundle_metrics(results: dict[str, Any], ranker: str) -> dict[str, Any]:
    """What goes into the bundle, and what gates look at; the recipe's ranker stands under its name and as ``ranker``."""
    ranking = {name: segments["all"] for name, segments in results["ranking"]["models"].items()}
    ranking["ranker"] = ranking[ranker]
    return {
        "ranking": ranking,
        "calibration": {name: values["calibration"] for name, values in ranking.items()},
        "retrieval": {name: segments["all"] for name, segments in results["retrieval"]["models"].items()},
        "slices": results["retrieval"]["slices"],
        "by_slice": results["by_slice"],
        "list": {name: segments["all"] for name, segments in results["lists"]["models"].items()},
        "intervals": {v["name"]: {"estimate": v["estimate"], "low": v["low"], "high": v["high"]} for v in results["verdicts"]},
        "parity": {"max_difference": results["parity"]},
        "latency": results["latency"],
    }
