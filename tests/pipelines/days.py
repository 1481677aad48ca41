# SPDX-License-Identifier: Apache-2.0
"""A small data set that arrives in days, as files."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

FIRST = datetime(2024, 3, 1, tzinfo=UTC)
DAYS = tuple(f"2024-03-0{day}" for day in range(1, 6))
ROLES = """
interactions:
  event_time: {column: time}
  values: [{name: rating, kind: label}]
items:
  attributes:
    - {name: title, kind: text}
    - {name: year, kind: dense}
    - {name: genres, kind: bag, separator: " "}
users:
  attributes:
    - {name: age, kind: dense}
    - {name: gender, kind: categorical}
    - {name: occupation, kind: categorical}
"""
USERS, ITEMS, EVENTS = 40, 30, 240


def events(day: str, seed: int, count: int = EVENTS) -> pl.DataFrame:
    """Events of a day, spread over it, in which users prefer items of their own parity."""
    random = np.random.default_rng(seed)
    start = datetime.fromisoformat(day).replace(tzinfo=UTC)
    user = random.integers(0, USERS, count)
    item = (random.integers(0, ITEMS // 2, count) * 2 + user % 2) % ITEMS
    liked = random.random(count) < 0.6
    seconds = np.sort(random.choice(86_400, count, replace=False)).tolist()
    times = [start + timedelta(seconds=int(second)) for second in seconds]
    columns = {"user_id": user.astype(str), "item_id": item.astype(str), "time": times, "rating": np.where(liked, 5.0, 2.0)}
    return pl.DataFrame(columns)


def write_day(folder: Path, day: str, frame: pl.DataFrame, name: str = "part-0") -> Path:
    """One file of a day's folder."""
    path = folder / "events" / f"day={day}" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    return path


def write_all(folder: Path, days: tuple[str, ...] = DAYS) -> str:
    """Days, items, users and roles; returns the override that a recipe takes."""
    for place, day in enumerate(days):
        write_day(folder, day, events(day, place))
    names = np.arange(ITEMS).astype(str)
    genres = ["Comedy" if place % 2 else "Drama" for place in range(ITEMS)]
    titles, years = [f"No. {name}" for name in names], 1990.0 + np.arange(ITEMS)
    pl.DataFrame({"item_id": names, "title": titles, "year": years, "genres": genres}).write_parquet(folder / "items.parquet")
    users = {"user_id": np.arange(USERS).astype(str), "age": 20.0 + np.arange(USERS), "gender": ["F", "M"] * (USERS // 2)}
    pl.DataFrame(users | {"occupation": ["writer"] * USERS}).write_parquet(folder / "users.parquet")
    (folder / "roles.yaml").write_text(ROLES)
    where = {name: folder / file for name, file in (("items", "items.parquet"), ("users", "users.parquet"), ("roles", "roles.yaml"))}
    return f"dataset={{name: daily, path: {folder / 'events'}, {', '.join(f'{name}: {file}' for name, file in where.items())}}}"
