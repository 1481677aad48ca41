# SPDX-License-Identifier: Apache-2.0
"""The synthetic tables that all contestants read: features of entities at times, and a spine of entities and request times.

All times of a table differ, so that "the newest row" means the same to everyone, and rows stand in no order. Only numpy and pyarrow are
needed, since contestants have environments of their own.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = tuple(f"f{i}" for i in range(8))
KEYS = ("user_id", "item_id")
TIME = pa.timestamp("us", tz="UTC")
START_US = 1_700_000_000_000_000
SPAN_US = 30 * 86_400 * 1_000_000
TTL_SECONDS = 10 * 86_400
ROWS_PER_ENTITY = 10
UNKNOWN = 0.01
"""The share of the spine's entities that have no row."""


@dataclass(frozen=True)
class Sizes:
    """How many rows the features have, and the spine."""

    features: int
    spine: int

    def __str__(self) -> str:
        return f"{self.features:,} x {self.spine:,}"


def names(key: str) -> tuple[str, ...]:
    """The features of an entity, which need names of their own beside another's."""
    return tuple(f"{key.removesuffix('_id')}_{feature}" for feature in FEATURES)


def feature_table(key: str, rows: int, *, seed: int = 0) -> pa.Table:
    """``rows`` rows of ``rows / 10`` entities: the key (string), eight float64 features, and the three times of our sources."""
    random = np.random.default_rng([seed, 0])
    entities = random.integers(0, max(rows // ROWS_PER_ENTITY, 1), rows)
    times = pa.array(_distinct_times(rows, random), TIME)
    columns = {key: _ids(key, entities), "event_time": times, "available_time": times, "ingest_seq": pa.array(np.arange(rows))}
    return pa.table(columns | {name: pa.array(random.normal(size=rows)) for name in names(key)})


def spine_table(key: str, sizes: Sizes, *, seed: int = 0) -> pa.Table:
    """``sizes.spine`` rows: the row's number, the key, of which some have no features, and ``request_time``."""
    random = np.random.default_rng([seed, 1])
    known = max(sizes.features // ROWS_PER_ENTITY, 1)
    entities = random.integers(0, known, sizes.spine)
    entities[random.random(sizes.spine) < UNKNOWN] += known
    times = pa.array(_distinct_times(sizes.spine, random), TIME)
    return pa.table({"row": pa.array(np.arange(sizes.spine)), key: _ids(key, entities), "request_time": times})


def write(folder: Path, key: str, sizes: Sizes) -> None:
    """Both tables as Parquet: ``<key>.parquet`` as we read it, ``<key>_feast.parquet`` with only what Feast needs, and the spine."""
    table = feature_table(key, sizes.features)
    pq.write_table(table, folder / f"{key}.parquet")
    pq.write_table(table.drop_columns(["available_time", "ingest_seq"]), folder / f"{key}_feast.parquet")
    pq.write_table(spine_table(key, sizes), folder / f"{key}_spine.parquet")


def requests(entities: int, items: int, count: int, *, seed: int) -> list[dict[str, list[str]]]:
    """Online requests of one user and ``items`` distinct items, equal for equal arguments."""
    random = np.random.default_rng([seed, 2])
    drawn = ((random.integers(0, entities, 1), random.choice(entities, items, replace=False)) for _ in range(count))
    return [{"user_id": _ids("user_id", user).to_pylist(), "item_id": _ids("item_id", some).to_pylist()} for user, some in drawn]


def _distinct_times(rows: int, random: np.random.Generator) -> np.ndarray:
    step = SPAN_US // rows
    return random.permutation(START_US + np.arange(rows) * step + random.integers(0, step, rows))


def _ids(key: str, numbers: np.ndarray) -> pa.Array:
    return pa.array([f"{key[0]}{number:07d}" for number in numbers.tolist()], pa.string())
