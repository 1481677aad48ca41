# SPDX-License-Identifier: Apache-2.0
"""Feast as a contestant, in its own environment, as its documentation sets it up. The requests are those of `ours`, without ``bare``.

``join`` takes the name of an offline store for files, ``online`` how a request is asked: ``together`` is one call whose rows hold the
user beside each item, ``apart`` one call for the user and one for the items.
"""

import os
import sys
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # on both sides: Arrow's own keeps what was freed

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Float64
from feast.value_type import ValueType

from benchmarks.feature_store import data
from benchmarks.feature_store.measure import milliseconds, peak_bytes, timed
from benchmarks.worker import serve

START = datetime.fromtimestamp(data.START_US / 1e6 - 1, UTC)
END = datetime.fromtimestamp((data.START_US + data.SPAN_US) / 1e6 + 1, UTC)


def build(folder: Path, keys: tuple[str, ...], offline: str, online: dict[str, Any], ttl: timedelta) -> FeatureStore:
    """A store with a view for each key, applied."""
    root = Path(tempfile.mkdtemp(prefix="feast", dir=folder))
    config = {
        "project": "contest",
        "provider": "local",
        "registry": str(root / "registry.db"),
        "offline_store": {"type": offline},
        "online_store": online,
        "entity_key_serialization_version": 3,
    }
    store = FeatureStore(config=RepoConfig(**config, repo_path=root))
    things: list[Any] = []
    for key in keys:
        entity = Entity(name=key, join_keys=[key], value_type=ValueType.STRING)
        source = FileSource(name=f"{key}_rows", path=str(folder / f"{key}_feast.parquet"), timestamp_field="event_time")
        schema = [Field(name=name, dtype=Float64) for name in data.names(key)]
        things += [entity, FeatureView(name=key, entities=[entity], ttl=ttl, schema=schema, source=source)]
    store.apply(things)
    return store


class Contestant:
    """Answers requests from the tables in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._joins: dict[tuple[str, str], tuple[FeatureStore, pd.DataFrame]] = {}
        self._online: FeatureStore | None = None

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        match request["do"]:
            case "join":
                table, seconds = timed(lambda: self._join(request["folder"], request["kind"]))
                if request.get("to"):
                    pq.write_table(table, request["to"])
                return {"seconds": seconds, "rows": table.num_rows}
            case "memory":
                self._prepared(request["folder"], request["kind"])
                return {"bytes": peak_bytes(lambda: self._join(request["folder"], request["kind"]))}
            case "materialize":
                return {"seconds": timed(lambda: self._materialize(request["store"]))[1]}
            case "online":
                read = {"together": self._together, "apart": self._apart}[request["how"]]
                return {"ms": milliseconds(read, data.requests(**request["requests"]))}
            case "values":
                self._write_values(data.requests(**request["requests"])[0], Path(request["to"]))
                return {}
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _prepared(self, folder: str, kind: str) -> tuple[FeatureStore, pd.DataFrame]:
        """The store and the spine, both made before anything is timed."""
        if (folder, kind) not in self._joins:
            ttl = timedelta(seconds=data.TTL_SECONDS)
            online = {"type": "sqlite", "path": "online.db"}
            store = build(self._folder / folder, ("user_id",), kind, online, ttl)
            spine = pq.read_table(self._folder / folder / "user_id_spine.parquet").to_pandas()
            self._joins[folder, kind] = store, spine.rename(columns={"request_time": "event_timestamp"})
        return self._joins[folder, kind]

    def _join(self, folder: str, kind: str) -> pa.Table:
        store, spine = self._prepared(folder, kind)
        features = [f"user_id:{name}" for name in data.names("user_id")]
        return store.get_historical_features(entity_df=spine, features=features).to_arrow()

    def _materialize(self, online: dict[str, Any]) -> None:
        self._online = build(self._folder / "online", data.KEYS, "file", online, timedelta(0))
        self._online.materialize(START, END)

    def _ask(self, keys: tuple[str, ...], rows: list[dict[str, str]]) -> dict[str, list[Any]]:
        assert self._online is not None
        features = [f"{key}:{name}" for key in keys for name in data.names(key)]
        return self._online.get_online_features(features=features, entity_rows=rows).to_dict()

    def _together(self, request: dict[str, list[str]]) -> dict[str, list[Any]]:
        (user,) = request["user_id"]
        return self._ask(data.KEYS, [{"user_id": user, "item_id": item} for item in request["item_id"]])

    def _apart(self, request: dict[str, list[str]]) -> list[dict[str, list[Any]]]:
        return [self._ask((key,), [{key: one} for one in ids]) for key, ids in request.items()]

    def _write_values(self, request: dict[str, list[str]], to: Path) -> None:
        for key, found in zip(request, self._apart(request), strict=True):
            pq.write_table(pa.table(found), to / f"{key}_theirs.parquet")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve(Contestant(Path(sys.argv[1])).handle)
