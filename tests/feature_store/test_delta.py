# SPDX-License-Identifier: Apache-2.0
"""Sources in Delta tables: features equal those over the same rows in Parquet, at the version named; what is new is all that is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader, OnlineStore
from feature_store.partitions import JoinConfig, join_features
from feature_store.scan import scan
from recsys.core.delta import DeltaVersion, append_events
from recsys.core.errors import DataError, SchemaError


def digest(store: OnlineStore) -> str:
    with store.snapshot() as snapshot:
        return snapshot.digest()


def up_to(w: Any, seq: int, first: int = 0) -> pa.Table:
    events = w.tables["interactions"]
    place = events.column("ingest_seq")
    return events.filter(pc.and_(pc.less(place, seq), pc.greater_equal(place, first)))


def append(w: Any, table: Path, first: int, seq: int) -> DeltaVersion:
    """The events from one place to another; they keep their places, which begin anew in each append."""
    rows = up_to(w, seq, first)
    rows = rows.set_column(4, "ingest_seq", pc.subtract(rows.column("ingest_seq"), first))
    return DeltaVersion(table, append_events(table, rows, app="world", number=seq, by_day=True).version)


def tables(w: Any, log: DeltaVersion | pa.Table) -> dict[str, Any]:
    return dict(w.tables) | {"interactions": log}


@pytest.mark.parametrize(("seed", "late"), [(0, 0.0), (1, 0.3)])
def test_a_join_over_a_delta_log_is_that_over_parquet(world: Callable[..., Any], tmp_path: Path, seed: int, late: float) -> None:
    w = world(seed, late=late)
    for first, last in ((0, 150), (150, 152), (152, 400)):
        append(w, tmp_path / "log", first, last)
    deltalake.write_deltalake(str(tmp_path / "users"), w.tables["users"])
    log, users = DeltaVersion.open(tmp_path / "log"), DeltaVersion.open(tmp_path / "users")
    deltalake.DeltaTable(str(tmp_path / "log")).optimize.compact()
    compacted = DeltaVersion.open(tmp_path / "log")
    assert compacted.version > log.version and len(compacted.files()) < len(log.files())
    for service in ("user", "item"):
        spine = w.spine(service, 400)
        expected = OfflineReader(w.repo, w.tables).read(service, spine)
        for version in (log, compacted):
            assert OfflineReader(w.repo, tables(w, version) | {"users": users}).read(service, spine).equals(expected)
        pieces = list(scan(w.repo, tables(w, compacted), service, w.at(-100), w.at(3000)))
        assert pa.concat_tables(pieces).equals(pa.concat_tables(list(scan(w.repo, w.tables, service, w.at(-100), w.at(3000)))))


def test_a_join_in_parts_over_a_delta_log_is_that_over_parquet(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(2)
    append(w, tmp_path / "log", 0, 250)
    log = append(w, tmp_path / "log", 250, 400)
    pq.write_table(w.spine("user", 300), tmp_path / "spine.parquet")
    for name in ("interactions", "users"):
        pq.write_table(w.tables[name], tmp_path / f"{name}.parquet")
    written = []
    for name, source in (("of_parquet", tmp_path / "interactions.parquet"), ("of_delta", tmp_path / f"log@v{log.version}")):
        given = {"interactions": source, "users": tmp_path / "users.parquet"}
        join_features(w.repo, given, ["user"], tmp_path / "spine.parquet", tmp_path / name, JoinConfig(partitions=3, order="spine"))
        written.append([file.read_bytes() for file in sorted((tmp_path / name).rglob("*.parquet"))])
    assert written[0] == written[1] and len(written[0]) == 3


def test_what_came_after_the_version_is_not_seen(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(3)
    pinned = append(w, tmp_path / "log", 0, 250)
    reader, spine = OfflineReader(w.repo, tables(w, pinned)), w.spine("user", 200)
    before = reader.read("user", spine)
    append(w, tmp_path / "log", 250, 400)
    for fresh in (reader, OfflineReader(w.repo, tables(w, DeltaVersion.open(tmp_path / "log", pinned.version)))):
        assert fresh.read("user", spine).equals(before)
    assert before.equals(OfflineReader(w.repo, tables(w, up_to(w, 250))).read("user", spine))
    latest = OfflineReader(w.repo, tables(w, DeltaVersion.open(tmp_path / "log"))).read("user", spine)
    assert latest.equals(OfflineReader(w.repo, w.tables).read("user", spine)) and not latest.equals(before)


@pytest.mark.parametrize("overlap", [0, 30])
def test_materialising_reads_what_is_above_the_watermark(world: Callable[..., Any], tmp_path: Path, overlap: int) -> None:
    w, store, whole = world(4), MemoryStore(), MemoryStore()
    materialize(w.repo, w.tables, whole)
    old = append(w, tmp_path / "log", 0, 300)
    materialize(w.repo, tables(w, old), store, overlap=overlap)
    between = append(w, tmp_path / "log", 300, 350)
    latest = append(w, tmp_path / "log", 350, 400)
    for file in old.files():  # of which nothing lies above the watermark, less the overlap
        if overlap == 0:
            Path(file).unlink()
    reports = [materialize(w.repo, tables(w, version), store, overlap=overlap) for version in (between, latest, latest)]
    assert digest(store) == digest(whole)
    activity = [next(view for view in report.views if view.view == "activity") for report in reports]
    assert [view.watermark for view in activity] == [349, 399, 399] and not any(view.full for view in activity)
    assert all(view.events <= 50 + overlap for view in activity)
    spine = w.spine("user", 100)
    assert OnlineReader(w.repo, store).read("user", spine).equals(OfflineReader(w.repo, w.tables).read("user", spine))


def test_a_log_that_was_never_written_anew_cannot_lose_what_it_knew(world: Callable[..., Any], tmp_path: Path) -> None:
    w, store = world(5), MemoryStore()
    old = append(w, tmp_path / "log", 0, 200)
    materialize(w.repo, tables(w, append(w, tmp_path / "log", 200, 400)), store)
    before = digest(store)
    materialize(w.repo, tables(w, old), store)
    assert digest(store) == before
    with pytest.raises(DataError, match=r"ends at ingest_seq 19\d, but the store has seen 39\d"):
        materialize(w.repo, tables(w, old), store, full=True)


def test_a_table_without_a_column_is_named(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(6)
    rows = w.tables["interactions"].drop_columns(["rating"])
    version = append_events(tmp_path / "log", rows, app="world", number=1).version
    with pytest.raises(SchemaError, match=rf"log@v{version}: missing column: unknown column 'rating'"):
        OfflineReader(w.repo, tables(w, DeltaVersion(tmp_path / "log", version))).read("user", w.spine("user", 3))
