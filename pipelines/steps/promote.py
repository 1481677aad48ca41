# SPDX-License-Identifier: Apache-2.0
"""Register a bundle, hold it against the gates and the champion, and make it the champion if all hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.graph.step import Context
from pipelines.steps import measure
from pipelines.steps.bundle import bundle_directory
from pipelines.steps.compare import champion_list
from pipelines.steps.evaluate import load_measured
from pipelines.steps.features import feature_tables
from pipelines.steps.histories import build_histories
from pipelines.steps.prepared import load_prepared
from recsys.bundle.manifest import verify
from recsys.core.files import read_json, write_json
from recsys.registry import Event, Evidence, Location, PromotionLog, Registry
from recsys.training.tracking import MLflowTracker, start_run

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_RELEASE, _VERSION = "release.json", "version.json"


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
    comparison = None
    if expected is not None:
        context.say(f"comparing with the champion, version {expected}")
        comparison = {"list.ndcg@10": _difference(context, registry)}
    version = _registered(context, registry, directory)
    event = _logged(context, registry, version, verify(directory).sha256)
    if event is None:
        evidence = Evidence(directory, read_json(directory / "metrics.json"), comparison, champion=None, measured={})
        event, _ = registry.promote(recipe.model, version, gates=recipe.gates, evidence=evidence, expected=expected)
    release = {"version": version, "sha256": event.sha256, "promoted": event.action == "promote", "gates": event.gates}
    write_json(context.out / _RELEASE, release | {"event": event.model_dump(mode="json", exclude={"gates"})})


def _difference(context: Context, registry: Registry) -> dict[str, float]:
    """The candidate's list less the champion's, on the same test events."""
    recipe, prepared = context.recipe, load_prepared(context.inputs["splits"])
    ours = load_measured(context.inputs["evaluate"]).places
    theirs = champion_list(registry, recipe.model, feature_tables(recipe.features, prepared.dataset), build_histories(prepared))
    users = measure.user_codes(prepared.impressions("test").column("user_id"))
    interval = measure.mean_interval(ours, theirs, users, recipe.evaluation, recipe.seed)
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


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
