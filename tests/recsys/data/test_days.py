# SPDX-License-Identifier: Apache-2.0
"""Days of events, each made canonical alone, against the same rows made canonical together."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from recsys.core.errors import DataError, SchemaError
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.datasets import Daily, Partitioned
from recsys.data.ingest import RawTable, canonicalise
from recsys.data.ingest.days import DayEvents
from tests.pipelines.days import DAYS, events, write_all, write_day


@pytest.fixture
def source(tmp_path: Path) -> Daily:
    write_all(tmp_path)
    return Daily(daily_config(tmp_path))


def daily_config(folder: Path, **more: object) -> Daily.Config:
    where = {
        "path": folder / "events",
        "items": folder / "items.parquet",
        "users": folder / "users.parquet",
        "roles": folder / "roles.yaml",
    }
    return Daily.Config.model_validate(where | more)


def dirty(day: str) -> pl.DataFrame:
    """Events with all that ingest drops: nulls, an unknown item, a repetition, the future."""
    frame = events(day, 7, 40)
    broken = [
        frame[:1].with_columns(pl.lit(None, pl.String).alias("user_id")),
        frame[1:2].with_columns(pl.lit("unknown").alias("item_id")),
        frame[2:4],
        frame[4:5].with_columns((pl.col("time") + timedelta(days=365 * 100)).alias("time")),
    ]
    return pl.concat([frame, *broken])


def test_joined_days_are_the_rows_made_canonical_together(source: Daily, tmp_path: Path) -> None:
    assert isinstance(source, Partitioned) and source.partitions() == DAYS
    write_day(tmp_path, DAYS[1], dirty(DAYS[1]), "part-1")
    whole = source.load()
    frames = [pl.read_parquet(file) for file in sorted((tmp_path / "events").glob("*/*.parquet"))]
    raw = [RawTable(name, pl.read_parquet(tmp_path / f"{name}.parquet")) for name in ("items", "users")]
    together = canonicalise("events", DatasetSchema.load(tmp_path / "roles.yaml"), RawTable("events", pl.concat(frames)), *raw)
    for one, other in zip(whole.tables().values(), together.tables().values(), strict=True):
        columns = [name for name in one[0].column_names if name != "ingest_seq"]
        assert one[0].select(columns).equals(other[0].select(columns))
    for rule in ("null_user", "unknown_item", "exact_duplicate", "future_time"):
        assert whole.report.count("interactions", rule) == together.report.count("interactions", rule) > 0
    counts, expected = whole.report.tables[0], together.report.tables[0]
    assert (counts.read, counts.kept) == (expected.read, expected.kept)


def test_a_late_file_changes_the_rows_of_its_day_alone(source: Daily, tmp_path: Path) -> None:
    before = {day: source.load_day(day).events for day in DAYS}
    old = source.day_files(DAYS[2])
    write_day(tmp_path, DAYS[2], events(DAYS[2], 99, 5), "part-1")
    after = {day: source.load_day(day).events for day in DAYS}
    assert [day for day in DAYS if not before[day].equals(after[day])] == [DAYS[2]]
    assert len(source.day_files(DAYS[2])) == len(old) + 1
    kept = set(map(tuple, before[DAYS[2]].to_pandas().itertuples(index=False)))
    assert kept < set(map(tuple, after[DAYS[2]].to_pandas().itertuples(index=False))), "what was there keeps its place in the order"
    sequence = source.load().interactions["ingest_seq"].to_pylist()
    assert len(set(sequence)) == len(sequence) and max(sequence) < 1 << 53


def test_a_day_is_written_and_read_whole(source: Daily, tmp_path: Path) -> None:
    day = source.load_day(DAYS[0])
    day.save(tmp_path / "t.parquet", tmp_path / "r.json")
    again = DayEvents.load(tmp_path / "t.parquet", tmp_path / "r.json")
    assert again.report == day.report and again.events.equals(day.events)


def test_the_recipe_may_leave_days_alone(source: Daily, tmp_path: Path) -> None:
    chosen = Daily(daily_config(tmp_path, first_day="2024-03-02", last_day="2024-03-04"))
    assert chosen.partitions() == DAYS[1:4]
    with pytest.raises(DataError, match="found none in the recipe's days"):
        Daily(daily_config(tmp_path, first_day="2025-01-01")).partitions()


def test_a_folder_without_files_is_no_day_and_a_wrong_name_is_an_error(source: Daily, tmp_path: Path) -> None:
    (tmp_path / "events" / "day=2024-03-09").mkdir()
    assert source.partitions() == DAYS
    with pytest.raises(DataError, match="expected Parquet files, found none"):
        source.load_day("2024-03-09")
    (tmp_path / "events" / f"day={DAYS[0]}").rename(tmp_path / "events" / "day=1st")
    with pytest.raises(DataError, match="expected a name such as day=2024-03-01"):
        source.partitions()


def test_a_column_that_is_absent_names_the_file(source: Daily, tmp_path: Path) -> None:
    path = write_day(tmp_path, DAYS[0], events(DAYS[0], 0).drop("rating"))
    with pytest.raises(SchemaError, match=f"{path.name}: interactions.rating: unknown column 'rating'"):
        source.load_day(DAYS[0])


def test_days_without_an_event_of_a_known_item_are_an_error(source: Daily, tmp_path: Path) -> None:
    for day in DAYS:
        write_day(tmp_path, day, events(day, 0).with_columns(pl.lit("unknown").alias("item_id")))
    with pytest.raises(DataError, match="no event is of a known item"):
        source.load()


def test_times_are_in_utc(source: Daily) -> None:
    times = source.load_day(DAYS[0]).events["event_time"].to_pylist()
    assert min(times) >= datetime(2024, 3, 1, tzinfo=UTC) and max(times) < datetime(2024, 3, 2, tzinfo=UTC)
