# SPDX-License-Identifier: Apache-2.0
"""Our feature store as a contestant, and the bare `join_asof` of Polars that ours is compared with.

Requests: ``join`` (seconds from the file to a table of features), ``held`` and ``bare`` (the same from tables in memory), ``memory`` (of
the join), ``materialize``, ``online`` (milliseconds of each request), ``trips`` (what one request asks the store).
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["POLARS_MAX_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # read when Polars is imported
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # on both sides: Arrow's own keeps what was freed

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.feature_store import data
from benchmarks.feature_store.measure import milliseconds, peak_bytes, timed
from benchmarks.worker import serve
from feature_store.definitions import FeatureRepo
from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import OnlineReader
from recsys.core import components

NOW = pa.scalar(data.START_US + data.SPAN_US, data.TIME)


def definitions(ttl: int | None) -> FeatureRepo:
    """One view and one service for users, and for items, of the newest row's values."""
    return FeatureRepo.model_validate(
        {
            "sources": [{"name": key, "kind": "events", "table": key, "keys": [key]} for key in data.KEYS],
            "views": [
                {
                    "name": key,
                    "source": key,
                    "entity": key,
                    "ttl": ttl,
                    "features": [{"kind": "attribute", "name": name, "column": name, "type": "dense"} for name in data.names(key)],
                }
                for key in data.KEYS
            ],
            "services": [{"name": key, "views": [key]} for key in data.KEYS],
        }
    )


def join(rows: pa.Table, spine: pa.Table) -> pa.Table:
    """Ours, with nothing kept of what was read before."""
    return OfflineReader(definitions(data.TTL_SECONDS), {"user_id": rows}).read("user_id", spine)


def bare_join(rows: pl.DataFrame, spine: pl.DataFrame) -> pl.DataFrame:
    """Polars', which wants both sides sorted; of all rows, however old."""
    rows = rows.select("user_id", "event_time", *data.names("user_id")).sort("event_time")
    return spine.sort("request_time").join_asof(
        rows, left_on="request_time", right_on="event_time", by="user_id", strategy="backward", check_sortedness=False
    )


def frame(table: pa.Table) -> pl.DataFrame:
    """As Polars holds it."""
    found = pl.from_arrow(table)
    assert isinstance(found, pl.DataFrame)
    return found


class Contestant:
    """Answers requests from the tables in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spines: dict[str, pa.Table] = {}
        self._reader: OnlineReader | None = None

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        match request["do"]:
            case "join":
                table, seconds = timed(lambda: self._join(request["folder"]))
                if request.get("to"):
                    pq.write_table(table, request["to"])
                return {"seconds": seconds, "rows": table.num_rows}
            case "held":
                rows, spine = self._rows(request["folder"]), self._spine(request["folder"])
                return {"seconds": timed(lambda: join(rows, spine))[1]}
            case "bare":
                frames = frame(self._rows(request["folder"])), frame(self._spine(request["folder"]))
                return {"seconds": timed(lambda: bare_join(*frames))[1]}
            case "memory":
                self._spine(request["folder"])
                return {"bytes": peak_bytes(lambda: self._join(request["folder"]))}
            case "materialize":
                return {"seconds": timed(lambda: self._materialize(request["store"]))[1]}
            case "online":
                return {"ms": milliseconds(self._online, data.requests(**request["requests"]))}
            case "trips":
                return self._trips(data.requests(**request["requests"])[0], request.get("to"))
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _spine(self, folder: str) -> pa.Table:
        if folder not in self._spines:
            self._spines[folder] = pq.read_table(self._folder / folder / "user_id_spine.parquet")
        return self._spines[folder]

    def _rows(self, folder: str) -> pa.Table:
        # Polars decodes Parquet in a third of the time that pyarrow takes, and less memory; its strings are made Arrow's plain ones.
        return pl.read_parquet(self._folder / folder / "user_id.parquet").to_arrow(compat_level=pl.CompatLevel.oldest())

    def _join(self, folder: str) -> pa.Table:
        return join(self._rows(folder), self._spine(folder))

    def _materialize(self, store: dict[str, Any]) -> None:
        repo = definitions(None)
        cls = components.get("online_store", store["name"])
        opened = cls(cls.Config.model_validate(store))
        materialize(repo, {key: pq.read_table(self._folder / "online" / f"{key}.parquet") for key in data.KEYS}, opened)
        self._reader, self._store = OnlineReader(repo, opened), opened

    def _online(self, request: dict[str, list[str]]) -> list[pa.Table]:
        assert self._reader is not None
        return [self._reader.read(key, _online_spine(key, ids)) for key, ids in request.items()]

    def _trips(self, request: dict[str, list[str]], to: str | None) -> dict[str, Any]:
        """How often the store is asked for values, and, of Redis, how often the server is sent anything."""
        trips, sent = [], []
        snapshots = type(self._snapshot())
        multi_get = snapshots.multi_get
        snapshots.multi_get = lambda snapshot, wanted: (trips.append(list(wanted)), multi_get(snapshot, wanted))[1]
        undo = _count_sent(sent)
        try:
            tables = self._online(request)
        finally:
            snapshots.multi_get = multi_get
            undo()
        for key, table in zip(request, tables, strict=True):
            if to is not None:
                pq.write_table(table, Path(to) / f"{key}_ours.parquet")
        return {"trips": len(trips), "sent": len(sent), "entity_types": len(request)}

    def _snapshot(self) -> Any:
        with self._store.snapshot() as snapshot:
            return snapshot


def _online_spine(key: str, ids: list[str]) -> pa.Table:
    return pa.table({key: pa.array(ids, pa.string()), "request_time": pa.repeat(NOW, len(ids))})


def _count_sent(sent: list[int]) -> Any:
    """Note each message to a Redis server; returns what ends it."""
    from redis.connection import AbstractConnection

    send = AbstractConnection.send_packed_command

    def noted(connection: Any, command: Any, *arguments: Any, **named: Any) -> None:
        sent.append(1)
        send(connection, command, *arguments, **named)

    AbstractConnection.send_packed_command = noted

    def undo() -> None:
        AbstractConnection.send_packed_command = send

    return undo


if __name__ == "__main__":
    serve(Contestant(Path(sys.argv[1])).handle)
