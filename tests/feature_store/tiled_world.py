# SPDX-License-Identifier: Apache-2.0
"""Views with tiles over the random world, and what their features must be, by the definition, in plain Python."""

import math
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from feature_store.definitions import FeatureRepo
from recsys.core.status import ValueStatus
from tests.feature_store.conftest import REPO, START, Oracle

WEB = [{"column": "channel", "op": "==", "value": "web"}]
LIKED = [{"column": "rating", "op": ">=", "value": 4}]
RECENT = {
    "name": "tiled",
    "source": "events",
    "entity": "user_id",
    "tile": 30,
    "features": [
        {"kind": "count", "name": "t_count", "window": 100},
        {"kind": "count", "name": "t_count_long", "window": 300},
        {"kind": "count", "name": "t_liked", "window": 150, "where": LIKED},
        {"kind": "sum", "name": "t_amount", "column": "amount", "window": 300},
        {"kind": "sum", "name": "t_rating", "column": "rating", "window": 90},
        {"kind": "mean", "name": "t_mean", "column": "amount", "window": 120},
        {
            "kind": "mean",
            "name": "t_mean_web",
            "column": "rating",
            "window": 200,
            "where": [{"column": "channel", "op": "==", "value": "web"}],
        },
        {"kind": "min", "name": "t_min", "column": "amount", "window": 200},
        {"kind": "max", "name": "t_max", "column": "rating", "window": 60, "where": [{"column": "channel", "op": "!=", "value": "app"}]},
        {"kind": "distinct", "name": "t_items", "column": "item_id", "window": 300},
        {"kind": "quantile", "name": "t_median", "column": "amount", "q": 0.5, "window": 300},
        {"kind": "quantile", "name": "t_high", "column": "rating", "q": 0.9, "window": 90, "size": 16},
    ],
}
EXPIRING = {
    "name": "tiled_expiring",
    "source": "events",
    "entity": "user_id",
    "tile": 7,
    "ttl": 50,
    "features": [
        {"kind": "count", "name": "e_count", "window": 40},
        {"kind": "max", "name": "e_max", "column": "amount", "window": 7},
        {"kind": "sum", "name": "e_sum", "column": "amount", "window": 21},
        {"kind": "distinct", "name": "e_items", "column": "item_id", "window": 40, "precision": 4},
        {"kind": "quantile", "name": "e_low", "column": "amount", "window": 35, "q": 0.1, "size": 16},
    ],
}
POPULAR = {
    "name": "tiled_items",
    "source": "events",
    "entity": "item_id",
    "tile": 100,
    "features": [
        {"kind": "sum", "name": "i_amount", "column": "amount", "window": 250},
        {"kind": "distinct", "name": "i_users", "column": "user_id", "window": 400, "precision": 14},
    ],
}
SERVICES = [{"name": "user", "views": ["activity", "tiled", "tiled_expiring"]}, {"name": "item", "views": ["tiled_items"]}]
DEFINITIONS: dict[str, Any] = {**REPO, "views": [*REPO["views"], RECENT, EXPIRING, POPULAR], "services": SERVICES}  # type: ignore[misc]


def repo() -> FeatureRepo:
    """The world's views, and those with tiles."""
    return FeatureRepo.model_validate(DEFINITIONS)


def tiled_features() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each view with tiles and each of its features."""
    return [(view, feature) for view in (RECENT, EXPIRING, POPULAR) for feature in view["features"]]  # type: ignore[attr-defined]


class TiledOracle(Oracle):
    """The same, and aggregates of tiles, by lists and loops."""

    def __init__(self, tables: dict[str, pa.Table]) -> None:
        super().__init__({**DEFINITIONS, "services": []}, tables)

    def value(self, view: dict[str, Any], feature: dict[str, Any], entity: str | None, time: datetime | None) -> tuple[Any, ValueStatus]:
        """The feature's value and status; of sketches the exact value."""
        additive = feature["kind"] in ("count", "sum", "distinct")
        if entity is None or time is None:
            return None, ValueStatus.MISSING
        rows = [row for row in self._tables["interactions"] if row[view["entity"]] == entity]
        rows = [row for row in rows if row["event_time"] <= time and row["available_time"] <= time]
        if rows and "ttl" in view and time - max(row["event_time"] for row in rows) > timedelta(seconds=view["ttl"]):
            return None, ValueStatus.EXPIRED
        tail = _tile(time - timedelta(seconds=feature["window"]), view["tile"])
        inside = [row for row in rows if _tile(row["event_time"], view["tile"]) > tail and _meets(row, feature.get("where", ()))]
        values = [row[feature["column"]] for row in inside if row[feature["column"]] is not None] if "column" in feature else inside
        if not rows and not additive:
            return None, ValueStatus.MISSING
        if not values and not additive:
            return None, ValueStatus.NULL
        return _aggregate(feature, values), ValueStatus.PRESENT


def _aggregate(feature: dict[str, Any], values: list[Any]) -> Any:
    match feature["kind"]:
        case "count":
            return len(values)
        case "sum":
            return math.fsum(values)
        case "mean":
            return math.fsum(values) / len(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "distinct":
            return len(set(values))
        case _:
            return sorted(values)[max(math.ceil(round(feature["q"] * len(values), 9)), 1) - 1]


def _tile(time: datetime, width: int) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=START.tzinfo)) // timedelta(seconds=width)


def _meets(row: dict[str, Any], conditions: Any) -> bool:
    compare = {">=": lambda a, b: a >= b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b}
    return all(row[c["column"]] is not None and compare[c["op"]](row[c["column"]], c["value"]) for c in conditions)
