# SPDX-License-Identifier: Apache-2.0
"""The generated log, and the definitions that are read from it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LIMIT_GIB = 4.0
STEP = 1_000_000
PLANTED = 1000
"""Of each step so many rows have no user, so many an unknown item, and so many repeat an earlier row."""
BEGIN_US, SPAN_US = 1_700_000_000_000_000, 30 * 86_400 * 1_000_000
LATE, LAG_US = 0.05, 60_000_000


@dataclass(frozen=True)
class Size:
    """How large the log is; events of users and items by Zipf, with exponents 0.6 and 1.

    Attributes:
        rows: a multiple of `STEP`.
        partitions: into how many parts entities are divided.
    """

    rows: int
    users: int
    items: int
    partitions: int

    @property
    def planted(self) -> int:
        """How many rows break each of the three rules."""
        return self.rows // STEP * PLANTED

    @property
    def clean_rows(self) -> int:
        """How many must come out."""
        return self.rows - 3 * self.planted

    def as_json(self) -> dict[str, int]:
        """The fields."""
        return asdict(self)


FULL = Size(rows=100_000_000, users=2_000_000, items=500_000, partitions=128)
QUICK = Size(rows=2_000_000, users=100_000, items=20_000, partitions=8)

SCHEMA: dict[str, Any] = {
    "interactions": {
        "user_id": "uid",
        "item_id": "iid",
        "event_time": {"column": "ts", "unit": "us"},
        "available_time": {"column": "seen", "unit": "us"},
        "values": [{"name": "rating", "kind": "label", "source": "stars"}],
    },
    "items": {"item_id": "iid", "attributes": [{"name": "category", "kind": "categorical"}]},
}

FEATURES: dict[str, Any] = {
    "sources": [
        {"name": "interactions", "kind": "events", "table": "interactions", "keys": ["user_id", "item_id"]},
        {"name": "items", "kind": "static", "table": "items", "keys": ["item_id"]},
    ],
    "views": [
        {
            "name": "user_activity",
            "source": "interactions",
            "entity": "user_id",
            "features": [
                {"kind": "count", "name": "user_events"},
                {"kind": "count", "name": "user_events_day", "window": 86400},
                {"kind": "count", "name": "user_likes", "where": [{"column": "rating", "op": ">=", "value": 4}]},
                {"kind": "last_n", "name": "history", "column": "item_id", "n": 10},
            ],
        },
        {
            "name": "item_profile",
            "source": "items",
            "entity": "item_id",
            "features": [{"kind": "attribute", "name": "item_category", "column": "category", "type": "categorical"}],
        },
        {
            "name": "item_activity",
            "source": "interactions",
            "entity": "item_id",
            "features": [
                {"kind": "count", "name": "item_events"},
                {"kind": "count", "name": "item_events_week", "window": 604800},
                {"kind": "mean", "name": "item_mean", "column": "rating"},
            ],
        },
    ],
    "services": [{"name": "user", "views": ["user_activity"]}, {"name": "item", "views": ["item_profile", "item_activity"]}],
}

ENCODER: dict[str, Any] = {
    "features": [
        {"kind": "categorical", "feature": "item_category"},
        *({"kind": "dense", "feature": name, "transform": "log1p"} for name in ("user_events", "user_events_day", "user_likes")),
        *({"kind": "dense", "feature": name, "transform": "log1p"} for name in ("item_events", "item_events_week")),
        {"kind": "dense", "feature": "item_mean"},
        {
            "kind": "sequence",
            "name": "history_items",
            "items": "history",
            "target": "item_id",
            "max_length": 10,
            "ids": "hashed",
            "rows": 262144,
        },
    ],
    "tasks": [{"name": "like", "feature": "rating", "threshold": ">= 4"}],
}


def generate(folder: Path, size: Size) -> None:
    """Write ``events/NNNN.parquet``, one file for each step of `STEP` rows in the order of time, and ``items.parquet``."""
    (folder / "events").mkdir(parents=True)
    items = np.arange(size.items)
    pq.write_table(pa.table({"iid": _ids("i", items), "category": _ids("c", items % 100)}), folder / "items.parquet")
    of_users, of_items = _zipf(size.users, 0.6), _zipf(size.items, 1.0)
    steps, before = size.rows // STEP, None
    for step in range(steps):
        table = _step(np.random.default_rng([0, step]), of_users, of_items, BEGIN_US + SPAN_US * step // steps, SPAN_US // steps)
        fresh = table.slice(0, STEP - PLANTED)
        repeated = (before if before is not None else fresh).slice(0, PLANTED)
        pq.write_table(pa.concat_tables([fresh, repeated]), folder / "events" / f"{step:04d}.parquet", row_group_size=STEP // 4)
        before = fresh


def _step(random: np.random.Generator, of_users: np.ndarray, of_items: np.ndarray, begin: int, span: int) -> pa.Table:
    """`STEP` rows: the first `PLANTED` are clean, as many without a user follow, and as many with an unknown item."""
    users, items = (np.searchsorted(weights, random.random(STEP)) for weights in (of_users, of_items))
    times = begin + np.sort(random.integers(0, span, STEP))
    lag = np.where(random.random(STEP) < LATE, random.integers(0, LAG_US, STEP), 0)
    place = np.arange(STEP) // PLANTED
    return pa.table(
        {
            "uid": pc.if_else(pa.array(place == 1), pa.scalar(None, pa.string()), _ids("u", users)),
            "iid": pc.if_else(pa.array(place == 2), pa.scalar("unknown"), _ids("i", items)),
            "ts": times,
            "seen": pa.array(times + lag, mask=lag == 0),
            "stars": random.integers(1, 6, STEP).astype(float),
        }
    )


def _zipf(count: int, exponent: float) -> np.ndarray:
    """The running sum of the probabilities."""
    weights = np.arange(1, count + 1) ** -exponent
    return np.cumsum(weights / weights.sum())


def _ids(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")
