# SPDX-License-Identifier: Apache-2.0
"""Data checks: days that are in order pass, and each kind of planted fault is refused with its column and figures."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.checks import KINDS, DataChecks, examine
from pipelines.steps.validate import write_report
from recsys.core.config import parse
from recsys.core.errors import ConfigError, DataError

CHECKS = {
    "columns": {
        "user_id": {"type": "text", "nulls": 0},
        "event_time": {"type": "time", "low": "2024-01-01", "high": "2024-12-31T23:59:59"},
        "rating": {"type": "number", "low": 1, "high": 5, "values": [1, 2, 3, 4, 5], "nulls": 0.1, "drift": 0.2},
        "device": {"type": "text", "values": ["phone", "web"], "drift": 0.2},
    },
    "volume": {"low": 200, "high": 2000, "factor": 2},
    "dropped": 0.05,
}
DAY = "2024-03-08"


def checks(**more: object) -> DataChecks:
    return parse(DataChecks, CHECKS | more, source="test")


def table(day: str, seed: int, count: int = 500) -> pa.Table:
    random = np.random.default_rng(seed)
    start = datetime.fromisoformat(day).replace(tzinfo=UTC)
    times = [start + timedelta(seconds=int(second)) for second in random.integers(0, 86_400, count)]
    rating = random.choice([1.0, 2.0, 3.0, 4.0, 5.0], count, p=[0.1, 0.1, 0.2, 0.3, 0.3])
    return pa.table(
        {
            "user_id": pa.array(random.integers(0, 50, count).astype(str)),
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "rating": pa.array(rating, mask=random.random(count) < 0.05),
            "device": pa.array(random.choice(["phone", "web"], count, p=[0.8, 0.2])),
        }
    )


def before(count: int = 500) -> dict[str, pa.Table]:
    return {f"2024-03-0{day}": table(f"2024-03-0{day}", day, count) for day in range(1, 8)}


def with_column(events: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return events.set_column(events.column_names.index(name), name, values)


@pytest.mark.parametrize("seed", range(5))
def test_a_good_day_passes(seed: int) -> None:
    report = examine(checks(), DAY, table(DAY, 100 + seed), before(), dropped=0.01, daily=True)
    assert not report.failed, report.failed
    assert {finding.kind for finding in report.findings} == set(KINDS)
    report.raise_failed()


def test_the_first_day_has_nothing_to_be_compared_with() -> None:
    report = examine(checks(), DAY, table(DAY, 1), {}, daily=True)
    assert not report.failed
    assert {finding.kind for finding in report.findings} == set(KINDS) - {"drift"}


GOOD = table(DAY, 11)
RATING = GOOD["rating"].combine_chunks()
HALF = pa.array(np.arange(500) % 2 == 0)
BAD = [
    ("columns", GOOD.drop_columns(["device"]), 0.0, "columns of 'device': the columns are user_id, event_time, rating, expected there"),
    ("types", with_column(GOOD, "rating", RATING.cast(pa.string())), 0.0, "types of 'rating': string, expected number"),
    (
        "ranges",
        with_column(GOOD, "rating", pa.array(np.where(np.arange(500) == 3, -7.0, 4.0))),
        0.0,
        r"ranges of 'rating': -7\.0 to 4\.0, 1 of 500 outside, expected at least 1 and at most 5",
    ),
    (
        "ranges",
        with_column(GOOD, "rating", pa.array(np.where(np.arange(500) == 3, np.nan, 4.0))),
        0.0,
        r"ranges of 'rating': .*, 1 of 500 outside",
    ),
    (
        "values",
        with_column(GOOD, "device", pa.array(["tv"] * 2 + ["phone"] * 400 + ["web"] * 98)),
        0.0,
        r"values of 'device': 'tv' \(2\), expected of phone, web",
    ),
    (
        "nulls",
        with_column(GOOD, "rating", pa.array(RATING.to_pylist(), mask=np.arange(500) < 75)),
        0.0,
        r"nulls of 'rating': 0\.1\d*, expected at most 0\.1",
    ),
    ("volume", GOOD.slice(0, 150), 0.0, "volume: 150 events, expected at least 200"),
    ("volume", GOOD.slice(0, 230), 0.0, r"volume: 230 events, expected 250 to 1,000 \(median of 7 days before is 500\)"),
    ("volume", pa.concat_tables([GOOD] * 5), 0.0, "volume: 2,500 events, expected at most 2,000"),
    ("dropped", GOOD, 0.5, r"dropped: 0\.5 of the raw rows, expected at most 0\.05"),
    (
        "drift",
        with_column(GOOD, "device", pa.array(["web"] * 400 + ["phone"] * 100)),
        0.0,
        r"drift of 'device': PSI [1-9]\.\d+, expected at most 0\.2 against 7 days before",
    ),
    ("drift", with_column(GOOD, "rating", pa.array(np.tile([1.0, 2.0], 250))), 0.0, r"drift of 'rating': PSI \d+\.\d+"),
    (
        "day",
        with_column(
            GOOD, "event_time", pa.array([datetime(2024, 3, 9, tzinfo=UTC), *GOOD["event_time"].to_pylist()[1:]], pa.timestamp("us", "UTC"))
        ),
        0.0,
        r"day of 'event_time': 1 of 500 events outside, such as 2024-03-09 00:00:00\+00:00, expected all in 2024-03-08, UTC",
    ),
]


@pytest.mark.parametrize(("kind", "events", "dropped", "message"), BAD)
def test_a_bad_day_is_refused_with_column_and_figures(kind: str, events: pa.Table, dropped: float, message: str) -> None:
    report = examine(checks(), DAY, events, before(), dropped=dropped, daily=True)
    assert kind in {finding.kind for finding in report.failed}
    with pytest.raises(DataError, match=f"^{DAY}: ") as raised:
        report.raise_failed()
    assert re.search(message, str(raised.value)), raised.value


def test_a_column_that_changed_its_type_has_drifted() -> None:
    loose = checks(columns={"rating": {"drift": 0.2}})
    changed = with_column(GOOD, "rating", RATING.cast(pa.string()))
    with pytest.raises(DataError, match="drift of 'rating': type string, in the days before double"):
        examine(loose, DAY, changed, before(), daily=True).raise_failed()


def test_all_that_fails_is_named_at_once() -> None:
    events = with_column(GOOD.slice(0, 150), "device", pa.array(["tv"] * 150))
    with pytest.raises(DataError, match=r"4 checks failed: values of 'device'.*volume: 150.*volume: 150.*drift of 'device'"):
        examine(checks(), DAY, events, before(), daily=True).raise_failed()


def test_a_day_is_compared_with_the_last_days_only() -> None:
    days = before(5000) | {"2024-03-07": table("2024-03-07", 7)}
    assert examine(checks(days=1), DAY, GOOD, days).compared_with == ("2024-03-07",)
    assert not examine(checks(days=1), DAY, GOOD, days).failed
    assert {finding.kind for finding in examine(checks(), DAY, GOOD, days).failed} == {"volume"}


def test_the_report_is_kept_for_machines_and_for_people(tmp_path: Path) -> None:
    report = examine(checks(), DAY, GOOD.slice(0, 150), before(), daily=True)
    write_report(report, tmp_path)
    stored = json.loads((tmp_path / "checks.json").read_text())
    assert stored["events"] == 150 and stored["partition"] == DAY and len(stored["compared_with"]) == 7
    assert next(each for each in stored["findings"] if not each["passed"])["value"] == "150 events"
    lines = (tmp_path / "checks.txt").read_text().splitlines()
    assert sum("FAILED" in line for line in lines) == len(report.failed) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"columns": {"rating": {"low": 5, "high": 1}}}, "low: expected at most high, 1, got 5"),
        ({"columns": {"rating": {"low": "a", "high": 1}}}, "expected values of one type"),
        ({"columns": {"rating": {"nulls": 2}}}, "columns.rating.nulls"),
        ({"columns": {"rating": {"nuls": 0.2}}}, "did you mean 'nulls'"),
        ({"volume": {"factor": 1}}, "volume.factor"),
    ],
)
def test_demands_that_make_no_sense_are_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checks(**more)


def test_bounds_of_another_type_than_the_column_fail_instead_of_passing() -> None:
    wrong = parse(DataChecks, {"columns": {"device": {"low": 1}}}, source="test")
    (finding,) = [each for each in examine(wrong, DAY, GOOD, {}).findings if each.kind == "ranges"]
    assert not finding.passed and "cannot be compared" in finding.value
