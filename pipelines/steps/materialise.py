# SPDX-License-Identifier: Apache-2.0
"""Bring the online store of the recipe's features up to date with the data.

It comes before the evaluation, whose parity and latency are those of this store, and so before any promotion: no champion is ever live
before its features are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.definitions import FeatureRepo
from feature_store.materialize import materialize
from feature_store.online import OnlineReader, SQLiteStore
from pipelines.graph.step import Context
from pipelines.steps.features import feature_tables
from pipelines.steps.prepared import load_prepared
from recsys.core.files import read_json, write_json
from recsys.core.tombstones import Tombstones
from recsys.registry.location import Location

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_STORE = "online.json"


def versions(features: FeatureRepo) -> dict[str, str]:
    """The version of each service, by which online stores are named."""
    return {service.name: features.version(service.name) for service in features.services}


def online_path(features: FeatureRepo, home: Path) -> Path:
    """Where the online store of these features is."""
    return Location.under(home).online_store(versions(features))


def open_online(features: FeatureRepo, home: Path) -> OnlineReader:
    """A reader of the online store."""
    return OnlineReader(features, SQLiteStore.open(online_path(features, home)))


def stands(recipe: "Recipe", home: Path, result: Path) -> str | None:
    """A result counts while the store holds these views at least as far."""
    path = online_path(recipe.features, home)
    if not path.is_file():
        return "the online store is gone"
    store = SQLiteStore.open(path)
    try:
        reached = _states(store)
    finally:
        store.close()
    for name, wanted in read_json(result / _STORE)["views"].items():
        found = reached.get(name)
        if found is None or found["version"] != wanted["version"] or (found["watermark"] or 0) < (wanted["watermark"] or 0):
            return f"the online store does not hold view {name!r} as it was written"
    return None


def run(context: Context) -> None:
    """Write the store, and ``online.json``: what it holds, and how far.

    Days may be completed late, below the watermark of what came after them, so a data set of days is written anew. Users who were forgotten
    (`recsys forget`) stay away, although the data holds them again.
    """
    recipe, prepared = context.recipe, load_prepared(context.inputs["splits"])
    path = online_path(recipe.features, context.home)
    path.parent.mkdir(parents=True, exist_ok=True)
    store = SQLiteStore(SQLiteStore.Config(path=path))
    try:
        tables, forgotten = feature_tables(recipe.features, prepared.dataset), Tombstones.under(context.home)
        materialize(recipe.features, tables, store, full=prepared.daily, forgotten=forgotten)
        write_json(context.out / _STORE, {"services": versions(recipe.features), "views": _states(store)})
    finally:
        store.close()


def _states(store: SQLiteStore) -> dict[str, Any]:
    with store.snapshot() as snapshot:
        return {name: {"version": state.version, "watermark": state.watermark} for name, state in sorted(snapshot.states().items())}
