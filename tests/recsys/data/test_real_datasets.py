# SPDX-License-Identifier: Apache-2.0
"""Impressions of data sets that are read from $RECSYS_DATA: histories against brute force on planted files, and facts of the real ones."""

import itertools
import os
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys.core.errors import DataError
from recsys.core.schema import EVENT_TIME
from recsys.data.datasets.frappe import FIELDS, FRAPPE
from recsys.data.datasets.impressions import data_folder, earlier_events, last_events
from recsys.data.datasets.movielens_impressions import HISTORY, LONG, MOVIELENS_1M, MOVIELENS_1M_LONG
from recsys.data.encode import Encoder

real = pytest.mark.skipif("RECSYS_DATA" not in os.environ, reason="RECSYS_DATA is not set")


def planted(seed: int, users: int = 30) -> tuple[pl.DataFrame, pl.DataFrame]:
    """All events with their seconds, and the rated part of them; a few rated ones lost their position."""
    random = np.random.default_rng(seed)
    frames = []
    for user in range(1, users + 1):
        count = int(random.integers(1, 120))
        second = 1_000_000 * (user % 7) + np.cumsum(random.integers(0, 3, count))
        frames.append(
            pl.DataFrame(
                {
                    "user_id": np.full(count, user, dtype=np.int32),
                    "item_id": random.permutation(150)[:count].astype(np.int32) + 1,
                    "position": np.arange(count, dtype=np.int32),
                    "second": second,
                    "rating": random.integers(1, 6, count).astype(np.int8),
                    "rated": random.random(count) < 0.4,
                    "lost": random.random(count) < 0.05,
                }
            )
        )
    events = pl.concat(frames)
    rated = events.filter("rated").sample(fraction=1, shuffle=True, seed=seed)
    rated = rated.with_columns(position=pl.when("lost").then(None).otherwise("position"), timestamp=pl.col("second"))
    return events, rated.select("user_id", "item_id", "rating", "timestamp", "position")


@pytest.fixture
def movielens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A planted ml_1m folder."""
    events, rated = planted(3)
    folder = tmp_path / "ml_1m"
    folder.mkdir()
    events.select("user_id", "item_id", "position").write_parquet(folder / "interactions.parquet")
    rated.write_parquet(folder / "ratings_sample.parquet")
    items = pl.DataFrame(
        {"item_id": pl.Series(range(1, 151), dtype=pl.Int32), "title": "t", "year": 1990, "genres": [["Drama", "War"]] * 150}
    )
    items.write_parquet(folder / "items.parquet")
    users = pl.DataFrame({"user_id": pl.Series(range(1, 31), dtype=pl.Int32), "gender": "F", "age": 25, "occupation": 3, "zip": "12345"})
    users.write_parquet(folder / "users.parquet")
    monkeypatch.setenv("RECSYS_DATA", str(tmp_path))
    return events, rated


@pytest.mark.parametrize("seed", range(3))
def test_earlier_events_are_those_up_to_the_last_one_known_to_be_earlier(seed: int) -> None:
    events, rated = planted(seed)
    user, second = rated["user_id"].to_numpy(), rated["timestamp"].to_numpy()
    position = rated["position"].fill_null(-1).to_numpy()
    counts = earlier_events(user, second, position)
    for row in range(len(user)):
        known = position[(user == user[row]) & (second < second[row])]
        assert counts[row] == known.max(initial=-1) + 1
    # All of them are earlier in truth, by times that the function was not given.
    for u, s, count in zip(user, second, counts, strict=True):
        assert (events.filter(pl.col("user_id") == u)["second"].to_numpy()[:count] < s).all()


def test_last_events_are_slices() -> None:
    first, count = np.array([0, 10, 10, 4]), np.array([3, 0, 7, 2])
    picks, offsets = last_events(first, count, 3)
    expected = [list(range(f + max(0, c - 3), f + c)) for f, c in zip(first, count, strict=True)]
    assert [picks[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected


def test_movielens_1m_histories_equal_brute_force(movielens: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    events, rated = movielens
    parts = MOVIELENS_1M.load().parts
    rows = [row for part in parts.values() for row in part.to_pylist()]
    assert len(rows) == rated.height
    shown = {(r["user_id"], r["item_id"]): r for r in rows}
    known = {(u, p): r for u, p, r in rated.select("user_id", "position", "rating").iter_rows() if p is not None}
    for user, item, rating, second, _ in rated.iter_rows():
        before = rated.filter((pl.col("user_id") == user) & (pl.col("timestamp") < second))["position"].drop_nulls()
        count = 0 if before.is_empty() else int(before.max()) + 1  # type: ignore[arg-type]
        places = range(max(0, count - HISTORY), count)
        mine = events.filter(pl.col("user_id") == user)["item_id"].to_list()
        row = shown[str(user), str(item)]
        assert row["history_item"] == [str(mine[p]) for p in places]
        assert row["history_rating"] == [known.get((user, p)) for p in places]
        assert row["label"] == (rating >= 4) and row["zip"] == "12" and row["genres"] == ["Drama", "War"]


def test_long_histories_end_in_the_short_ones(movielens: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    short, long = MOVIELENS_1M.load(), MOVIELENS_1M_LONG.load()
    assert long.name == "movielens_1m_long"
    assert [f.max_length for f in long.encoder.features if f.kind == "sequence"] == [LONG]
    for part, rows in short.parts.items():
        other = long.parts[part]
        same = [name for name in rows.column_names if not name.startswith("history")]
        assert rows.select(same).equals(other.select(same))
        for name in ("history_item", "history_rating"):
            assert rows[name].to_pylist() == [history[-HISTORY:] for history in other[name].to_pylist()]
    longest = max(len(history) for rows in long.parts.values() for history in rows["history_item"].to_pylist())
    assert longest > HISTORY


def test_movielens_1m_parts_follow_each_other(movielens: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    parts = MOVIELENS_1M.load().parts
    ends = [pc.min_max(parts[part][EVENT_TIME]).as_py() for part in ("train", "valid", "test")]
    assert ends[0]["max"] < ends[1]["min"] and ends[1]["max"] < ends[2]["min"]


def test_fields_of_the_encoder_are_the_groups(movielens: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    impressions = MOVIELENS_1M.load()
    spec = Encoder.fit(impressions.encoder, impressions.parts["train"]).spec
    assert sorted(field for fields in spec.groups.values() for field in fields) == sorted(spec.fields)


def test_the_fingerprint_follows_the_files(movielens: tuple[pl.DataFrame, pl.DataFrame], tmp_path: Path) -> None:
    before = MOVIELENS_1M.fingerprint()
    assert before == MOVIELENS_1M.fingerprint()
    pl.read_parquet(tmp_path / "ml_1m" / "users.parquet").head(29).write_parquet(tmp_path / "ml_1m" / "users.parquet")
    assert MOVIELENS_1M.fingerprint() != before


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_DATA", raising=False)
    with pytest.raises(DataError, match=r"frappe: .*RECSYS_DATA.* not set"):
        FRAPPE.fingerprint()
    monkeypatch.setenv("RECSYS_DATA", str(tmp_path))
    with pytest.raises(DataError, match="no folder 'ml_1m'"):
        data_folder("ml_1m")
    (tmp_path / "frappe").mkdir()
    with pytest.raises(DataError, match=r"lacks ctr\.parquet"):
        FRAPPE.fingerprint()


@real
def test_frappe_is_what_its_readme_says() -> None:
    parts = FRAPPE.load().parts
    assert {name: part.num_rows for name, part in parts.items()} == {"train": 202_026, "valid": 57_720, "test": 28_863}
    assert all(pc.mean(part["label"]).as_py() == pytest.approx(1 / 3, abs=1e-6) for part in parts.values())
    everything = pa.concat_tables(parts.values())
    assert pc.count_distinct(everything["user_id"]).as_py() == 957 and pc.count_distinct(everything["item_id"]).as_py() == 4082
    assert all(everything[name].null_count == 0 for name in FIELDS)


@real
def test_movielens_1m_is_what_its_readme_says() -> None:
    parts = MOVIELENS_1M.load().parts
    rows = pa.concat_tables(parts.values())
    assert rows.num_rows == 100_000
    lengths = pc.list_value_length(rows["history_item"]).to_numpy()
    assert lengths.max() == HISTORY and lengths.mean() > 35
    # The candidate is never in its own history: each film is rated once.
    flat = rows["history_item"].combine_chunks()
    own = np.repeat(rows["item_id"].to_numpy(zero_copy_only=False), lengths)
    assert not (flat.flatten().to_numpy(zero_copy_only=False) == own).any()
