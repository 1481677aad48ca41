# SPDX-License-Identifier: Apache-2.0
"""What is served: the quickstart's recipe with a smaller ranker, on planted data, registered twice, and requests for it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.behind import CHAMPION, MODEL
from pipelines.graph import Runner
from pipelines.pipeline import GRAPH, NAMES
from pipelines.recipe import Recipe
from recsys.core.config import load_recipe
from recsys.registry import Location, Registry
from recsys.registry.events import Entry
from recsys.training.tracking import start_run

CANDIDATES = 500
# A TokenMixer-Large of some 300,000 parameters, by which both deadlines are several times what a request takes on one core.
RANKER = ("ranker.model.dim=32",)
# How well models are trained changes no latency, so that little is done for it.
TRAINED_LITTLE = (
    "text.encoder={name: hashing}",
    "ranker.training.trainer.epochs=1",
    "collaborative.training.trainer.epochs=1",
    "collaborative.training.trainer.validate_every=1",
    "retriever.training.trainer.epochs=1",
    "retriever.training.trainer.validate_every=1",
    "lists.validation_steps=100",
    "evaluation.resamples=100",
    "evaluation.explained_requests=1",
    "gates=[]",
)


@dataclass(frozen=True)
class Sizes:
    """Of the planted data."""

    users: int = 250
    items: int = 2_000
    events_per_user: int = 60


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        home: the folder of registry and online store.
        parameters: of the ranker, its tables included.
        versions: the champion, and another version of the same content, which swaps go to and back from.
        users, items: ids.
    """

    home: Path
    parameters: int
    versions: tuple[int, int]
    users: tuple[str, ...]
    items: tuple[str, ...]


def prepare(home: Path, sizes: Sizes, say: Callable[[str], None]) -> Served:
    """Train a little, and register."""
    dataset = f"dataset={{name: synthetic, users: {sizes.users}, items: {sizes.items}, events_per_user: {sizes.events_per_user}}}"
    recipe = load_recipe(Recipe, "quickstart", (dataset, *RANKER, *TRAINED_LITTLE))
    location = Location.under(home)
    with start_run(location.tracking_uri, location.artifacts, recipe.name, "served") as tracker:
        Runner(GRAPH, recipe, home, say, tracker).run(NAMES)
        registry = Registry(location)
        bundle, first = registry.load(CHAMPION)
        second = registry.register(registry.download(MODEL, first), MODEL, tracker.run_id)
    parameters = sum(weight.numel() for weight in bundle.ranker.state_dict().values())
    items = bundle.items.column("item_id").to_pylist()
    users = tuple(str(user) for user in range(sizes.users))
    return Served(home, parameters, (first, second), users, tuple(items))


def move(registry: Registry) -> int:
    """Make the champion the version that is not, by what `recsys promote` and `recsys rollback` append to the log; returns it."""
    standing = registry.log.standing(MODEL)
    if standing.previous is not None:
        return registry.rollback(MODEL, reason="a benchmark of swaps").to_version
    (other,) = set(standing.states) - {standing.champion}
    sha256 = registry.sha256(MODEL, other)
    entries = [Entry(action, other, sha256, "a benchmark of swaps") for action in ("validate", "promote")]
    registry.log.append(MODEL, *entries, actor="benchmark", expected=standing.champion)
    registry.project(MODEL)
    return other


def questions(served: Served, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests of different users, each for `CANDIDATES` items."""
    random = np.random.default_rng(seed)
    users = random.permutation(len(served.users))[:count]
    return [
        {"user_id": served.users[user], "item_ids": [served.items[i] for i in random.permutation(len(served.items))[:CANDIDATES]]}
        for user in users
    ]


def write_bodies(path: Path, bodies: Sequence[dict[str, Any]]) -> None:
    """One body a line."""
    path.write_text("".join(json.dumps(body, separators=(",", ":")) + "\n" for body in bodies), encoding="utf-8")
