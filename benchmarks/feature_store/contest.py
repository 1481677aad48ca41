# SPDX-License-Identifier: Apache-2.0
"""The contest: each side in a process of its own, asked in turns; values compared before anything is timed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.feature_store import data
from benchmarks.feature_store.compare import same_values
from benchmarks.feature_store.data import Sizes
from benchmarks.feature_store.report import Joins, Online, result
from benchmarks.feature_store.servers import redis_server
from benchmarks.frame import Result
from benchmarks.peers import python_of
from benchmarks.worker import Worker
from recsys.training.progress import track

HERE = Path(__file__).parent
SCRIPTS = {"ours": "ours.py", "feast": "feast_worker.py"}
THREADS = 1
ITEMS = 500
KINDS = ("file", "duckdb")
WAYS = ("together", "apart")
STORES = ("sqlite", "redis")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        joins: the sizes of joins; the checks are of the last.
        online: rows of each entity type's table online.
        pairs: of measurements.
        block: requests in each online measurement.
    """

    joins: tuple[Sizes, ...]
    online: int
    pairs: int
    block: int


QUICK = Plan((Sizes(200_000, 50_000),), 50_000, 5, 60)
FULL = Plan((Sizes(200_000, 50_000), Sizes(2_000_000, 500_000)), 200_000, 7, 200)


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    plan = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="features") as name:
        folder = Path(name)
        joins = [measure_join(folder, sizes, plan.pairs) for sizes in plan.joins]
        return result(joins, measure_online(folder, plan))


@contextmanager
def sides(folder: Path) -> Iterator[tuple[Worker, Worker]]:
    """Ours and Feast's, in fresh processes."""
    with _side(folder, "ours") as ours, _side(folder, "feast") as theirs:
        yield ours, theirs


def _side(folder: Path, side: str) -> Worker:
    return Worker(side, python_of(side), HERE / SCRIPTS[side], str(folder), threads=THREADS)


def measure_join(folder: Path, sizes: Sizes, pairs: int) -> Joins:
    """Compare the values, then time the joins in turns, then take the memory of each in processes of their own."""
    place = f"join_{sizes.features}"
    (folder / place).mkdir()
    data.write(folder / place, "user_id", sizes)
    with sides(folder) as (ours, theirs):
        joins = Joins(
            sizes, _agreed(folder, place, ours, theirs), feast={kind: [] for kind in KINDS}, feast_bytes={kind: [] for kind in KINDS}
        )
        for _ in track(range(pairs), f"join of {sizes}, in turns"):
            joins.ours.append(ours.ask(do="join", folder=place)["seconds"])
            for kind, seconds in joins.feast.items():
                seconds.append(theirs.ask(do="join", folder=place, kind=kind)["seconds"])
            joins.bare.append(ours.ask(do="bare", folder=place)["seconds"])
            joins.ours_beside_bare.append(ours.ask(do="held", folder=place)["seconds"])
    if not (folder / "small").exists():
        (folder / "small").mkdir()
        data.write(folder / "small", "user_id", Sizes(1_000, 100))
    for _ in track(range(pairs), f"memory of {sizes}"):
        joins.ours_bytes.append(_memory(folder, place, "ours", ""))
        for kind, taken in joins.feast_bytes.items():
            taken.append(_memory(folder, place, "feast", kind))
    return joins


def _memory(folder: Path, place: str, side: str, kind: str) -> int:
    """Bytes of a join in a fresh process, less those of the table as Arrow holds it."""
    table = pq.read_table(folder / place / ("user_id.parquet" if side == "ours" else "user_id_feast.parquet"))
    with _side(folder, side) as worker:
        worker.ask(do="join", folder="small", kind=kind)  # what is imported late is no part of a join
        return int(worker.ask(do="memory", folder=place, kind=kind)["bytes"]) - table.nbytes


def _agreed(folder: Path, place: str, ours: Worker, theirs: Worker) -> dict[str, int]:
    """The rows that went in, and that came out of each, once the values are the same."""
    written = {name: folder / place / f"{name}.parquet" for name in ("ours", *KINDS)}
    ours.ask(do="join", folder=place, to=str(written["ours"]))
    mine = pq.read_table(written["ours"])
    rows = {"asked": pq.read_metadata(folder / place / "user_id_spine.parquet").num_rows, "ours": mine.num_rows}
    for kind in KINDS:
        theirs.ask(do="join", folder=place, kind=kind, to=str(written[kind]))
        rows[kind] = same_values(mine, pq.read_table(written[kind]), "row", data.names("user_id"))
    return rows


def measure_online(folder: Path, plan: Plan) -> list[Online]:
    """The online stores in turn."""
    (folder / "online").mkdir()
    for key in data.KEYS:
        data.write(folder / "online", key, Sizes(plan.online, 1))
    found = []
    for name in STORES:
        with _opened(folder, name) as (our_store, feast_store), sides(folder) as (ours, theirs):
            ours.ask(do="materialize", store=our_store)
            theirs.ask(do="materialize", store=feast_store)
            found.append(_measure_store(name, folder, plan, ours, theirs))
    return found


def _measure_store(name: str, folder: Path, plan: Plan, ours: Worker, theirs: Worker) -> Online:
    def requests(seed: int, count: int) -> dict[str, int]:
        return {"entities": plan.online // data.ROWS_PER_ENTITY, "items": ITEMS, "count": count, "seed": seed}

    ours.ask(do="online", requests=requests(0, 10))
    trips = ours.ask(do="trips", requests=requests(0, 1), to=str(folder))
    theirs.ask(do="values", requests=requests(0, 1), to=str(folder))
    for key in data.KEYS:
        tables = [pq.read_table(folder / f"{key}_{side}.parquet") for side in ("ours", "theirs")]
        same_values(*tables, key, data.names(key))
    ways = {way: min(theirs.ask(do="online", how=way, requests=requests(0, 10))["ms"]) for way in WAYS}
    online = Online(name, trips, min(ways, key=lambda way: ways[way]), ways)
    for seed in track(range(1, plan.pairs + 1), f"online from {name}, in turns"):
        online.ours.append(ours.ask(do="online", requests=requests(seed, plan.block))["ms"])
        online.feast.append(theirs.ask(do="online", how=online.way, requests=requests(seed, plan.block))["ms"])
    return online


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The settings of our store and of Feast's: files, or a server for each."""
    if name == "sqlite":
        yield {"name": name, "path": str(folder / "ours.db")}, {"type": name, "path": str(folder / "feast.db")}
        return
    with redis_server(folder) as ours, redis_server(folder) as theirs:
        yield {"name": name, "url": f"redis://127.0.0.1:{ours}/0"}, {"type": name, "connection_string": f"127.0.0.1:{theirs}"}
