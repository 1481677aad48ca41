# SPDX-License-Identifier: Apache-2.0
"""Register a bundle, hold it against the gates and the champion, and make it the champion if all hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import yaml

from pipelines.graph.step import Context
from pipelines.steps import measure
from pipelines.steps.bundle import bundle_directory
from pipelines.steps.compare import champion_list
from pipelines.steps.evaluate import load_measured
from pipelines.steps.features import feature_tables
from pipelines.steps.histories import build_histories
from pipelines.steps.materialise import open_online
from pipelines.steps.prepared import load_prepared
from pipelines.steps.slices import event_slices
from recsys.bundle.manifest import verify
from recsys.core.files import read_json, write_json
from recsys.registry import Event, Evidence, Location, PromotionLog, Registry
from recsys.registry.evidence import Comparison, slice_metric
from recsys.registry.gates import measuring
from recsys.registry.gates.parity import replay_own
from recsys.training.tracking import MLflowTracker, start_run

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_RELEASE, _VERSION = "release.json", "version.json"
_LIST = "list.ndcg@10"
_ASKED = 200  # users of the test period whom the latency gates ask for


def load_release(directory: Path) -> dict[str, Any]:
    """What the step wrote: ``version``, ``sha256``, ``promoted``, ``gates``, and the ``event`` of the promotion log."""
    release: dict[str, Any] = read_json(directory / _RELEASE)
    return release


def stands(recipe: "Recipe", home: Path, result: Path) -> str | None:
    """A judgement counts while the promotion log knows it, and, of a bundle that was refused, while the champion is the same.

    A promoted bundle is not promoted again after a rollback: somebody wanted it so.
    """
    release, log = load_release(result), PromotionLog(Location.under(home).log)
    event = release["event"]
    if not any((known.id, known.sha256) == (event["id"], release["sha256"]) for known in log.events(recipe.model)):
        return "the promotion log does not know it"
    champion = log.champion(recipe.model)
    if event["action"] == "refuse" and (champion and champion.to_version) != event["from_version"]:
        return "it was refused, and there is another champion now"
    return None


def run(context: Context) -> None:
    """Write ``release.json``."""
    recipe, directory = context.recipe, bundle_directory(context.inputs["bundle"])
    registry = Registry(Location.under(context.home))
    champion = registry.log.champion(recipe.model)
    expected = None if champion is None else champion.to_version
    evidence = _evidence(context, registry, directory, expected)
    version = _registered(context, registry, directory)
    event = _logged(context, registry, version, verify(directory).sha256)
    if event is None:
        event, _ = registry.promote(recipe.model, version, gates=recipe.gates, evidence=evidence, expected=expected)
    release = {"version": version, "sha256": event.sha256, "promoted": event.action == "promote", "gates": event.gates}
    write_json(context.out / _RELEASE, release | {"event": event.model_dump(mode="json", exclude={"gates"})})


def _evidence(context: Context, registry: Registry, directory: Path, expected: int | None) -> Evidence:
    """What the gates look at: the candidate's metrics, the champion beside it, and what is measured on this machine now."""
    recipe: Recipe = context.recipe
    comparison: Comparison | None = None
    champion: Path | None = None
    if expected is not None:
        context.say(f"comparing with the champion, version {expected}")
        comparison, champion = _comparison(context, registry), registry.download(recipe.model, expected)
    users = load_prepared(context.inputs["splits"]).impressions("test").column("user_id")
    asked = np.random.default_rng(recipe.seed).permutation(len(users))[:_ASKED]
    reader = open_online(recipe.features, context.home)
    replayed = None if recipe.decisions is None else partial(replay_own, folder=recipe.decisions)
    measured = measuring.measure(recipe.gates, directory, reader, users.take(pa.array(asked)).to_pylist(), replayed)
    return Evidence.of(directory, comparison, champion, measured)


def _comparison(context: Context, registry: Registry) -> Comparison:
    """The candidate's list less the champion's, on the same test events: all of them, and those of each slice."""
    recipe, prepared = context.recipe, load_prepared(context.inputs["splits"])
    histories = build_histories(prepared)
    ours = load_measured(context.inputs["evaluate"]).places
    theirs = champion_list(registry, recipe.model, feature_tables(recipe.features, prepared.dataset), histories)
    users = measure.user_codes(prepared.impressions("test").column("user_id"))

    def difference(mask: np.ndarray) -> dict[str, float]:
        interval = measure.mean_interval(ours[mask], theirs[mask], users[mask], recipe.evaluation, recipe.seed)
        return {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "events": float(mask.sum())}

    slices = event_slices(prepared, histories, recipe.evaluation.slices)
    return {_LIST if name == "all" else slice_metric(name, _LIST): difference(mask) for name, mask in slices.items()}


def _registered(context: Context, registry: Registry, directory: Path) -> int:
    """The version of the bundle in the registry: a new one, or that of this step before it was interrupted."""
    path = context.work / _VERSION
    if not path.is_file():
        with _run(context, registry.location) as run_id:
            write_json(path, {"version": registry.register(directory, context.recipe.model, run_id)})
    return int(read_json(path)["version"])


def _logged(context: Context, registry: Registry, version: int, sha256: str) -> Event | None:
    """The verdict that this step had logged before it was interrupted."""
    verdicts = [event for event in registry.log.events(context.recipe.model) if event.action in ("promote", "refuse")]
    return next((event for event in verdicts if (event.to_version, event.sha256) == (version, sha256)), None)


@contextmanager
def _run(context: Context, location: Location) -> Iterator[str]:
    """The MLflow run that the bundle is registered from: the one under way, or one of its own."""
    if isinstance(context.tracker, MLflowTracker):
        yield context.tracker.run_id
        return
    recipe = context.recipe
    with start_run(location.tracking_uri, location.artifacts, recipe.name, context.key[:16]) as tracker:
        tracker.log_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), "recipe.yaml")
        yield tracker.run_id
