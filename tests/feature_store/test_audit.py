# SPDX-License-Identifier: Apache-2.0
"""FS-10: what was served is written down and compared; a planted skew is found where it is, and nothing else is accused."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.audit import AuditReport, audit
from feature_store.comparing import compare, edit_distance
from feature_store.definitions import FeatureRepo
from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader
from feature_store.served import LoggedReader, ServedLog
from recsys.core import part_log
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.hashing import is_sampled
from recsys.core.status import ValueStatus


def _online(w: Any) -> OnlineReader:
    store = MemoryStore()
    materialize(w.repo, w.tables, store)
    return OnlineReader(w.repo, store)


def _log(w: Any, folder: Path, *reads: tuple[str, pa.Table], **options: Any) -> ServedLog:
    """Offer what was read, and close."""
    log = ServedLog(folder, w.repo, **{"share": 1.0, **options})
    for service, features in reads:
        log.offer(service, features)
    log.close()
    return log


def _set(table: pa.Table, column: str, values: pa.Array | list[Any]) -> pa.Table:
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


def _of(report: AuditReport, feature: str) -> Any:
    return next(each for each in report.features if each.feature == feature)


def test_no_skew_is_zero_everywhere(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(0)
    reader = _online(w)
    log = ServedLog(tmp_path, w.repo, share=1.0)
    logged, spines = LoggedReader(reader, log), {"user": w.spine("user", 400), "item": w.spine("item", 200)}
    for service, spine in spines.items():
        for first in range(0, spine.num_rows, 50):
            assert logged.read(service, spine.slice(first, 50)).equals(reader.read(service, spine.slice(first, 50)))
    log.close()
    report = audit(w.repo, w.tables, tmp_path)
    known = sum(
        key is not None and time is not None
        for spine, name in zip(spines.values(), ("user_id", "item_id"), strict=True)
        for key, time in zip(spine.column(name).to_pylist(), spine.column("request_time").to_pylist(), strict=True)
    )
    assert (report.rows, report.other_versions, log.written, log.dropped) == (known, 0, known, 0)
    assert {f.feature for f in report.features} == {*w.repo.schema("user").names(), *w.repo.schema("item").names()}
    for feature in report.features:
        assert feature.wrong == 0 and set(feature.days.values()) == {0.0}, feature
        assert feature.smape in (0.0, None) and feature.edit_distance in (0.0, None) and feature.largest in (0.0, None), feature
    assert report.alarms == ()


SKEWS: dict[str, Callable[[Any], Any]] = {
    "rating_mean": lambda value: value + 0.5,
    "events": lambda value: value + 1,
    "items_4": lambda value: value[1:],
    "job": lambda value: value + "?",
}


@pytest.mark.parametrize("name", SKEWS)
def test_one_percent_of_skew_in_one_feature_is_found_there_alone(world: Callable[..., Any], tmp_path: Path, name: str) -> None:
    w = world(1)
    spine = w.spine("user", 2000)
    features = _online(w).read("user", spine)
    present = np.flatnonzero(
        np.asarray(pc.equal(features.column(f"{name}__status"), int(ValueStatus.PRESENT)))
        & np.asarray(pc.is_valid(spine.column("user_id")))
        & np.asarray(pc.is_valid(spine.column("request_time")))
    )
    logged = sum(
        a is not None and b is not None for a, b in zip(spine["user_id"].to_pylist(), spine["request_time"].to_pylist(), strict=True)
    )
    count = -(-logged // 100)
    values = features.column(name).to_pylist()
    for place in present[:: len(present) // count][:count].tolist():
        values[place] = SKEWS[name](values[place])
    _log(w, tmp_path, ("user", _set(features, name, values)))
    report = audit(w.repo, w.tables, tmp_path)
    assert [each.feature for each in report.alarms] == [name]
    found = report.alarms[0]
    assert (found.mismatch, found.wrong, found.rows) == (count, count, logged)
    assert 0.01 <= found.share < 0.011
    assert all(feature.wrong == 0 for feature in report.features if feature.feature != name)
    if name in ("rating_mean", "events"):
        assert found.largest == pytest.approx({"rating_mean": 0.5, "events": 1}[name])
        assert 0 < found.smape < 0.02
    if name == "items_4":
        assert 0.25 * count / len(present) <= found.edit_distance <= count / len(present)
    assert audit(w.repo, w.tables, tmp_path, alert=0.02).alarms == ()


def test_each_kind_of_difference_is_counted_as_itself(world: Callable[..., Any], tmp_path: Path) -> None:
    """Of u1, whose job is known and who has events; of nobody, who has neither."""
    w = world(2)
    time = pa.array([w.at(900)] * 5, pa.timestamp("us", tz="UTC"))
    spine = pa.table({"user_id": ["u1", "u1", "nobody", "nobody", "nobody"], "request_time": time})
    features = OfflineReader(w.repo, w.tables).read("user", spine)
    assert features.column("age__status").to_pylist() == [0, 0, 2, 2, 2]
    age = features.column("age")[0].as_py()
    features = _set(features, "age", [age * (1 + 1e-9), None, 5.0, 6.0, None])
    features = _set(features, "age__status", [0, int(ValueStatus.MISSING), 0, 0, int(ValueStatus.ERROR)])
    _log(w, tmp_path, ("user", features))
    found = _of(audit(w.repo, w.tables, tmp_path), "age")
    assert (found.rows, found.mismatch, found.missing, found.extra, found.status) == (5, 0, 1, 2, 1)
    assert found.days == {"2024-01-01": 0.8}


def test_an_event_that_was_available_but_not_materialised_is_found(world: Callable[..., Any], tmp_path: Path) -> None:
    """u0's events of the second half were there at the requests, but the store had not been brought up to date; u1's were."""
    w = world(3, late=0.0)
    events = w.tables["interactions"]
    late = pc.and_(pc.greater_equal(events.column("ingest_seq"), 200), pc.fill_null(pc.equal(events.column("user_id"), "u0"), False))
    store = MemoryStore()
    materialize(w.repo, w.tables | {"interactions": events.filter(pc.invert(late))}, store)
    spine = pa.table(
        {"user_id": ["u0", "u1"] * 20, "request_time": pa.array([w.at(1001 + n) for n in range(40)], pa.timestamp("us", tz="UTC"))}
    )
    _log(w, tmp_path, ("user", OnlineReader(w.repo, store).read("user", spine)))
    report = audit(w.repo, w.tables, tmp_path)
    assert _of(report, "events").mismatch == _of(report, "items_all").mismatch == 20
    assert _of(report, "job").wrong == 0
    later = pa.scalar(w.at(5000), events.schema.field("available_time").type)
    tables = w.tables | {"interactions": events.set_column(3, "available_time", pc.if_else(late, later, events.column("available_time")))}
    assert _of(audit(w.repo, tables, tmp_path), "events").wrong == 0  # what nobody could have known is no difference


def test_drift_by_day(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(4)
    times = [w.at(86_400 * (n % 4)) for n in range(40)]
    features = OfflineReader(w.repo, w.tables).read("user", pa.table({"user_id": ["u1"] * 40, "request_time": times}))
    events = [value + (n % 4 == 3 and n < 20) for n, value in enumerate(features.column("events").to_pylist())]
    _log(w, tmp_path, ("user", _set(features, "events", events)))
    assert _of(audit(w.repo, w.tables, tmp_path), "events").days == {"2024-01-01": 0, "2024-01-02": 0, "2024-01-03": 0, "2024-01-04": 0.5}


def test_rows_of_another_version_are_counted_apart(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(5)
    spine = w.spine("user", 30)
    log = _log(w, tmp_path, ("user", _online(w).read("user", spine)), ("item", _online(w).read("item", w.spine("item", 20))))
    views = [{**view, "ttl": 51} if view["name"] == "recent" else view for view in w.definitions["views"]]
    report = audit(FeatureRepo.model_validate({**w.definitions, "views": views}), w.tables, tmp_path)
    assert {feature.service for feature in report.features} == {"item"}
    assert report.rows + report.other_versions == log.written and report.other_versions > 20 and report.alarms == ()


def test_features_of_the_request_are_recomputed_from_what_it_carried(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(6)
    definitions = copy.deepcopy(w.definitions)
    definitions["sources"].append({"name": "request", "kind": "request"})
    features = [
        {"kind": "attribute", "name": "request_device", "column": "device", "type": "categorical"},
        {"kind": "clock", "name": "request_hour", "unit": "hour"},
    ]
    definitions["views"].append({"name": "context", "source": "request", "entity": "user_id", "features": features})
    definitions["services"][0]["views"].append("context")
    w.repo = FeatureRepo.model_validate(definitions)
    spine = pa.table({"user_id": ["u1"] * 30, "request_time": [w.at(3600 * n) for n in range(30)], "device": ["tv"] * 30})
    read = _online(w).read("user", spine)
    _log(w, tmp_path, ("user", _set(read, "request_hour", [n % 24 if n else 7 for n in range(30)])))
    report = audit(w.repo, w.tables, tmp_path)
    assert [each.feature for each in report.alarms] == ["request_hour"] and report.alarms[0].mismatch == 1


# --- the log


def test_all_requests_of_a_sampled_key_and_none_of_others(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(7)
    keys = [f"u{n}" for n in range(4000)]
    spine = pa.table({"user_id": keys * 2, "request_time": [w.at(900)] * 8000})
    log = _log(w, tmp_path, ("user", OfflineReader(w.repo, w.tables).read("user", spine)), share=0.1)
    written = pa.concat_tables([pq.read_table(path) for path in tmp_path.glob("*.parquet")]).column("entity").to_pylist()
    assert sorted(written) == sorted(2 * [key for key in keys if is_sampled(key, 0.1)])
    assert log.written == len(written) and 600 < len(written) < 1000
    # Pinned: a sample that changed between versions would no longer hold all requests of its keys.
    assert [key for key in keys[:40] if is_sampled(key, 0.1)] == ["u3", "u13", "u18", "u36"]


def test_spines_of_several_types_are_one_file(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(13)
    reader, times = _online(w), pa.chunked_array([[w.at(900)] * 3], pa.timestamp("us", tz="UTC"))
    keys = [pa.array(["u1", "u2", "u3"], kind) for kind in (pa.string(), pa.large_string())] + [pa.array([1, 2, 3])]
    kinds = (pa.timestamp("us"), pa.timestamp("ns", tz="Asia/Tokyo"), pa.timestamp("us", tz="UTC"))
    spines = [pa.table({"user_id": key, "request_time": times.cast(kind)}) for key, kind in zip(keys, kinds, strict=True)]
    log = _log(w, tmp_path, *(("user", reader.read("user", spine)) for spine in spines))
    assert (log.written, log.dropped, len(list(tmp_path.iterdir()))) == (9, 0, 1)
    report = audit(w.repo, w.tables, tmp_path)
    assert report.rows == 9 and {feature.wrong for feature in report.features} == {0}


def test_a_full_log_drops_and_counts_and_never_waits(world: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(8)
    writing, go_on = threading.Event(), threading.Event()
    original = part_log.write_bytes

    def slow(path: Path, content: bytes) -> None:
        writing.set()
        assert go_on.wait(30)
        original(path, content)

    monkeypatch.setattr(part_log, "write_bytes", slow)
    spine = pa.table({"user_id": ["u1"] * 10, "request_time": [w.at(900)] * 10})
    features = OfflineReader(w.repo, w.tables).read("user", spine)
    log = ServedLog(tmp_path, w.repo, share=1.0, capacity=30, flush_rows=10)
    log.offer("user", features)
    assert writing.wait(30)
    for _ in range(7):  # three fit while the disk is busy; this returns though nothing is written
        log.offer("user", features)
    assert (log.dropped, log.written) == (40, 0)
    go_on.set()
    log.close()
    assert (log.dropped, log.written) == (40, 40)
    assert [pq.read_metadata(path).num_rows for path in sorted(tmp_path.iterdir())] == [10, 30]
    log.offer("user", features)
    assert log.dropped == 50


def test_a_disk_that_fails_costs_rows_not_requests(world: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w = world(9)
    (tmp_path / "file").write_text("in the way")
    features = OfflineReader(w.repo, w.tables).read("user", pa.table({"user_id": ["u1"], "request_time": [w.at(900)]}))
    log = _log(w, tmp_path / "file", ("user", features))
    assert (log.dropped, log.written) == (1, 0)
    assert "1 rows could not be written" in caplog.text


def test_a_log_flushes_after_its_seconds(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(10)
    features = OfflineReader(w.repo, w.tables).read("user", pa.table({"user_id": ["u1"], "request_time": [w.at(900)]}))
    log = ServedLog(tmp_path, w.repo, share=1.0, flush_seconds=0.05)
    log.offer("user", features)
    waited = threading.Event()
    for _ in range(200):
        if log.written:
            break
        waited.wait(0.05)
    assert log.written == 1
    log.close()
    assert len(list(tmp_path.iterdir())) == 1


# --- what an audit refuses


def test_a_damaged_or_foreign_file_is_named(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(11)
    with pytest.raises(DataError, match=r"expected the parts \(\*\.parquet\) of a served log, found none"):
        audit(w.repo, w.tables, tmp_path)
    _log(w, tmp_path, ("user", _online(w).read("user", w.spine("user", 20))))
    (part,) = tmp_path.iterdir()
    whole = part.read_bytes()
    for content in (whole[:-10], whole[: len(whole) // 2], b"", b"PAR1" + bytes(40) + b"PAR1"):
        part.write_bytes(content)
        with pytest.raises(DataError, match=f"served part {part}: not a whole Parquet file"):
            audit(w.repo, w.tables, tmp_path)
    part.write_bytes(whole)
    (tmp_path / ".part-9.parquet.1.tmp").write_bytes(b"half")  # of a writer that died
    assert audit(w.repo, w.tables, tmp_path).alarms == ()
    foreign = tmp_path / "zz.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(DataError, match=f"served part {foreign}: expected the metadata recsys.served = 1, got None"):
        audit(w.repo, w.tables, tmp_path)
    foreign.unlink()
    table = pq.read_table(part)
    pq.write_table(table.drop_columns(["age"]), part)
    with pytest.raises(SchemaError, match=f"served part {part}: missing column: unknown column 'age'"):
        audit(w.repo, w.tables, tmp_path)


def test_what_a_log_refuses(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(12)
    with pytest.raises(ConfigError, match=r"share: expected a number between 0 and 1, got 1\.5"):
        ServedLog(tmp_path, w.repo, share=1.5)
    definitions = copy.deepcopy(w.definitions)
    definitions["views"][0]["features"][0]["name"] = "entity"
    with pytest.raises(ConfigError, match="feature 'entity' of service 'user': what was served has a column of this name"):
        ServedLog(tmp_path, FeatureRepo.model_validate(definitions))


# --- distances


@pytest.mark.parametrize("seed", range(5))
def test_edit_distance_equals_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)

    def distance(a: list[Any], b: list[Any]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for _ in range(20):
        a, b = ([["x", "y", None][v] for v in random.integers(0, 3, random.integers(0, 6))] for _ in range(2))
        assert edit_distance(a, b) == (distance(a, b) / max(len(a), len(b)) if a or b else 0.0)


def test_when_numbers_agree() -> None:
    one, other = pa.array([1e9, 1e9, 0.0, 5e-7, np.inf, np.inf]), pa.array([1e9 + 999, 1e9 + 1100, 0.0, 0.0, np.inf, 1.0])
    differs, found = compare(one, other)
    assert differs.tolist() == [False, True, False, False, False, True]
    assert found.smape == pytest.approx((2 + 2 + (999 + 1100) / 1e9) / 6) and found.largest == np.finfo(float).max
    differs, found = compare(pa.array([2**60, 3]), pa.array([2**60 + 1, 3]))
    assert differs.tolist() == [True, False]
    assert compare(pa.array([], pa.float64()), pa.array([], pa.float64()))[1].smape is None
