# SPDX-License-Identifier: Apache-2.0
"""From trained models to a registered bundle, and to the champion if the gates hold."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.materialize import materialize
from feature_store.online import OnlineReader, SQLiteStore
from pipelines.recipe import Recipe
from pipelines.steps.data import Prepared
from pipelines.steps.ranking import RankingResult
from pipelines.steps.retrieval import Histories, RetrievalResult
from recsys.bundle.bundle import Bundle, Settings, new_manifest
from recsys.data.sequences import EvaluationSteps
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request
from recsys.registry import Event, GateResult, Location, Registry

_PARITY_REQUESTS = 50
_LATENCY_REQUESTS = 100
_EXPLAINED_REQUESTS = 20


@dataclass(frozen=True)
class Released:
    """What became of a candidate."""

    version: int
    sha256: str
    event: Event
    gates: list[GateResult]


def assemble(recipe: Recipe, prepared: Prepared, ranking: RankingResult, histories: Histories, retrieval: RetrievalResult) -> Bundle:
    """The bundle of a run, with λ still to be chosen and metrics still to be measured."""
    versions = {service.name: recipe.features.version(service.name) for service in recipe.features.services}
    sequence = ranking.encoder.spec.sequences[0]
    return Bundle(
        manifest=new_manifest(
            name=recipe.model,
            data_snapshot=prepared.dataset.fingerprint(),
            feature_versions=versions,
            encoder=ranking.encoder,
            seed=recipe.seed,
            recipe=recipe,
        ),
        features=recipe.features.model_dump(mode="json"),
        settings=Settings(
            candidates=recipe.lists.candidates,
            history_feature=recipe.lists.history_feature,
            history_columns=sequence.keys,
            seen_feature=recipe.lists.seen_feature,
            task=ranking.encoder.spec.tasks[0],
        ),
        metrics={},
        items=prepared.dataset.items,
        catalogue=histories.catalogue,
        encoder=ranking.encoder,
        ranker=ranking.ranker,
        retriever=retrieval.retriever,
        item_table=retrieval.items,
        index=retrieval.index,
        tokenizer=retrieval.tokenizer,
        calibration=ranking.calibration,
    )


def online_recommender(bundle: Bundle, recipe: Recipe, prepared: Prepared, location: Location) -> Recommender:
    """Materialise the features of a bundle into its online store, and open the path on it as the server will."""
    path = location.online_store(bundle.manifest.feature_versions)
    path.parent.mkdir(parents=True, exist_ok=True)
    materialize(recipe.features, prepared.tables, SQLiteStore(SQLiteStore.Config(path=path)))
    return Recommender(bundle, OnlineReader(recipe.features, SQLiteStore.open(path)))


def parity(offline: Recommender, online: Recommender, steps: EvaluationSteps, seed: int) -> float:
    """The greatest difference between the scores of offline and online features, over some steps of the test period."""
    chosen = np.random.default_rng(seed).permutation(len(steps))[:_PARITY_REQUESTS]
    users, at = steps.user_id.take(pa.array(chosen)), steps.request_time.take(pa.array(chosen))
    first = offline.users(users, at)
    retrieved = offline.retrieve(first, offline.bundle.settings.candidates)
    one = offline.rank(first, retrieved)
    second = online.users(users, at)
    two = online.rank(second, online.score(second, retrieved.rows))
    present = retrieved.rows >= 0
    return float(np.abs(one.score[present] - two.score[present]).max())


def latency(online: Recommender, steps: EvaluationSteps, k: int, seed: int) -> dict[str, float]:
    """Milliseconds of a recommendation, one at a time, in this process: median and 99th percentile; and the median with explanations."""
    chosen = np.random.default_rng(seed).permutation(len(steps))
    plain = _taken(online, steps, chosen[:_LATENCY_REQUESTS], k, explain=False)
    explained = _taken(online, steps, chosen[:_EXPLAINED_REQUESTS], k, explain=True)
    return {"p50_ms": float(np.median(plain)), "p99_ms": float(np.quantile(plain, 0.99)), "explained_p50_ms": float(np.median(explained))}


def _taken(online: Recommender, steps: EvaluationSteps, places: np.ndarray, k: int, *, explain: bool) -> list[float]:
    taken = []
    for place in places:
        request = Request(user_id=steps.user_id[place].as_py(), k=k, at=steps.request_time[place].as_py(), explain=explain)
        started = time.perf_counter()
        online.recommend([request])
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def release(
    recipe: Recipe, bundle: Bundle, run_dir: Path, location: Location, run_id: str, comparison: dict[str, Any] | None, expected: int | None
) -> Released:
    """Save, register and, if every gate holds, promote. What a resumed run had saved is written anew: only the registered copy counts."""
    registry = Registry(location)
    shutil.rmtree(run_dir / "bundle", ignore_errors=True)
    manifest = bundle.save(run_dir / "bundle")
    version = registry.register(run_dir / "bundle", recipe.model, run_id)
    event, gates = registry.promote(recipe.model, version, gates=recipe.gates, comparison=comparison, expected=expected)
    return Released(version, manifest.sha256, event, gates)
