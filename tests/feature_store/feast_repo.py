# SPDX-License-Identifier: Apache-2.0
"""Runs in Feast's environment: a small repository from apply to teardown; what it reads goes to a file as JSON. Imports nothing of ours."""

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.types import Array, Bool, Float32, Int64, String
from feast.value_type import ValueType

START = datetime(2026, 1, 1, tzinfo=UTC)
DRIVERS = 6


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def tables(folder: Path) -> None:
    """Drivers by an integer, hourly, one corrected by a row that was created later; routes by two keys, of strings that look alike."""
    rows = [
        {
            "driver": d,
            "at": at(h),
            "written": at(h + 0.1),
            "trips": 10 * d + h,
            "share": d / 4,
            "city": "ü" * d,
            "active": d % 2 == 0,
            "last": [d, h],
        }
        for d in range(DRIVERS)
        for h in range(1, 5)
    ]
    rows.append({**rows[0], "written": at(9), "trips": 777, "city": None})
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_parquet(folder / "drivers.parquet")
    routes = [("a|", "b", 1.5), ("a", "|b", 2.5), ("a\\", "b", 3.5)]
    frame = pd.DataFrame([{"origin": a, "target": b, "at": at(2), "minutes": m} for a, b, m in routes])
    frame.to_parquet(folder / "routes.parquet")


def definitions(folder: Path) -> list[Any]:
    driver = Entity(name="driver", join_keys=["driver"], value_type=ValueType.INT64)
    ends = [Entity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in ("origin", "target")]
    drivers = FileSource(name="d", path=str(folder / "drivers.parquet"), timestamp_field="at", created_timestamp_column="written")
    routes = FileSource(name="r", path=str(folder / "routes.parquet"), timestamp_field="at", field_mapping={"minutes": "duration"})
    schema = [("trips", Int64), ("share", Float32), ("city", String), ("active", Bool), ("last", Array(Int64))]
    fields = [Field(name=name, dtype=dtype) for name, dtype in schema]
    return [
        driver,
        *ends,
        FeatureView(name="drivers", entities=[driver], ttl=timedelta(hours=2), schema=fields, source=drivers),
        FeatureView(name="routes", entities=ends, ttl=timedelta(0), schema=[Field(name="duration", dtype=Float32)], source=routes),
    ]


def spine() -> pd.DataFrame:
    """Questions before, at and after rows, and after the limit; of an unknown driver; the last one twice."""
    asked = [(d, h) for d in [*range(DRIVERS), 99] for h in (0.5, 1.0, 2.5, 6.0, 6.01)]
    asked.append(asked[2])
    ends = [("a|", "b"), ("a", "|b"), ("a\\", "b"), ("a", "b")]
    return pd.DataFrame(
        [
            {"row": i, "driver": d, "origin": ends[i % 4][0], "target": ends[i % 4][1], "event_timestamp": at(h)}
            for i, (d, h) in enumerate(asked)
        ]
    )


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    frame = frame.sort_values("row").drop(columns="event_timestamp")
    return json.loads(frame.to_json(orient="records"))


def main(repo: Path, to: Path) -> None:
    tables(repo)
    store = FeatureStore(repo_path=str(repo))
    things = definitions(repo)
    store.apply(things)
    features = [f"drivers:{name}" for name in ("trips", "share", "city", "active", "last")] + ["routes:duration"]
    found: dict[str, Any] = {}
    # The frame's own order is kept only by ours, so the test looks at it there.
    historical = store.get_historical_features(entity_df=spine(), features=features).to_df()
    found["order"] = historical["row"].tolist()
    found["historical"] = rows(historical)
    full = store.get_historical_features(entity_df=spine(), features=features, full_feature_names=True).to_arrow()
    found["full_names"] = sorted(full.column_names)

    def online() -> dict[str, list[Any]]:
        asked = [{"driver": d, "origin": "a|", "target": "b"} for d in [*range(DRIVERS), 99]]
        return store.get_online_features(features=features, entity_rows=asked).to_dict()

    found["before"] = online()
    store.materialize(at(0), at(3.5))
    found["materialized"] = online()
    store.materialize(at(0), at(24))
    found["again"] = online()
    newer = {
        "driver": [1],
        "at": [at(30)],
        "written": [at(30)],
        "trips": [5],
        "share": [0.5],
        "city": ["x"],
        "active": [True],
        "last": [[1]],
    }
    store.write_to_online_store("drivers", pd.DataFrame(newer))
    found["pushed"] = online()
    store.write_to_online_store("drivers", pd.DataFrame({**newer, "at": [at(1)], "written": [at(31)], "trips": [6]}))
    found["older"] = online()
    store.apply([], objects_to_delete=[things[-1]], partial=False)
    store.apply([things[-1]])
    found["deleted"] = online()
    found["torch"] = [name for name in ("torch", "torchrec", "mlflow") if name in sys.modules]
    to.write_text(json.dumps(found))
    store.teardown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
