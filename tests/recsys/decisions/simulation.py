# SPDX-License-Identifier: Apache-2.0
"""Lists served at random, and users who look at a place with a probability of its own and click what they like."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from recsys.core.schema import TIME
from recsys.decisions.decision import SHOWN, Decision
from recsys.decisions.log import DecisionLog

START = datetime(2024, 1, 1, tzinfo=UTC)
WINDOW = 3600
EVENTS = pa.schema(
    [("request_id", pa.string()), ("item_id", pa.string()), ("event_time", TIME), ("kind", pa.string()), ("label", pa.float64())]
)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def decision(request: int | str, second: float, user: str, items: list[str], propensity: float = 1.0, **changes: Any) -> Decision:
    """A list that was shown, without its evidence."""
    count = len(items)
    shown = {
        "item_id": items,
        "position": range(1, count + 1),
        **{name: [-0.5] * count for name in ("log_probability", "probability", "score")},
        "propensity": [propensity] * count,
    }
    made = Decision(
        request_id=f"r{request}" if isinstance(request, int) else request,
        time=at(second),
        user_id=user,
        k=count,
        kind="recommend",
        explain=False,
        model="recsys",
        bundle="0" * 64,
        version=1,
        feature_versions={"user": "u", "item": "i"},
        flags=(),
        shown=pa.table({name: list(values) for name, values in shown.items()}, schema=SHOWN),
        evidence=None,
    )
    return replace(made, **changes)


def event(request: int | str, item: str, second: float, kind: str = "click", label: float = 1.0) -> dict[str, Any]:
    name = f"r{request}" if isinstance(request, int) else request
    return {"request_id": name, "item_id": item, "event_time": at(second), "kind": kind, "label": label}


@dataclass(frozen=True)
class Simulation:
    """What was served, what came of it, and what must come out.

    Attributes:
        decisions: in the order of their times.
        events: of clicks and purchases, some after the window.
        labels: by request, item and position; each is a served impression.
    """

    decisions: list[Decision]
    events: list[dict[str, Any]]
    labels: dict[tuple[str, str, int], float]


def simulate(seed: int, *, requests: int = 120, items: int = 12, places: int = 5, users: int = 9) -> Simulation:
    """Clicks by position: P(click) = 1 / position · attraction of the item; some who clicked buy, with a label of 2."""
    random = np.random.default_rng(seed)
    attraction = random.random(items)
    decisions, events, labels = [], [], {}
    for request in range(requests):
        second = request * 60.0
        shown = random.permutation(items)[:places]
        decisions.append(decision(request, second, f"user {random.integers(users)}", [str(item) for item in shown], 1 / items))
        for position, item in enumerate(shown, 1):
            label = 0.0
            if random.random() < attraction[item] / position:
                for kind, value in (("click", 1.0), ("purchase", 2.0))[: 1 + int(random.random() < 0.4)]:
                    delay = float(random.integers(0, 2 * WINDOW))
                    events.append(event(request, str(item), second + delay, kind, value))
                    label = max(label, value) if delay <= WINDOW else label
            labels[f"r{request}", str(item), position] = label
    return Simulation(decisions, events, labels)


def log_decisions(folder: Path, decisions: list[Decision], **options: Any) -> None:
    """Write them through a log of their own."""
    log = DecisionLog(folder, **{"capacity": 1_000_000, "flush_rows": 40, **options})
    assert all(log.offer(each) for each in decisions)
    log.close()
    assert (log.written, log.dropped) == (len(decisions), 0)


def write_events(path: Path, events: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(events, schema=EVENTS), path)
    return path


def emitted(out: Path) -> pa.Table:
    """All impressions of an output folder, as `recsys ingest` reads them."""
    return ds.dataset(out, format="parquet").to_table()


def labels_of(impressions: pa.Table) -> dict[tuple[str, str, int], float]:
    """By request, item and position; one that came out twice is an error."""
    found: dict[tuple[str, str, int], float] = {}
    for row in impressions.to_pylist():
        key = row["request_id"], row["item_id"], row["position"]
        assert key not in found, f"{key} came out twice"
        found[key] = row["label"]
    return found
