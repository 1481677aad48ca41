# SPDX-License-Identifier: Apache-2.0
"""FS-11: PSI rises where a feature shifted and stays where it did not; shares, quantiles, and the age of the newest event."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_store.drift import QUANTILES, Summary, drift, freshness, psi, summarize
from feature_store.materialize import materialize
from feature_store.online import FeatureStoreError, MemoryStore, OnlineStore, SQLiteStore
from recsys.core.errors import DataError, SchemaError
from recsys.core.status import ValueStatus

ROWS = 5000
FEATURES = ("amount", "clicks", "job", "history")


def _table(seed: int, *, scale: float = 1.0, rate: float = 0.7, cook: float = 0.5, length: int = 5, missing: float = 0.1) -> pa.Table:
    random = np.random.default_rng(seed)
    values = {
        "amount": pa.array(random.lognormal(0, 1, ROWS) * scale),
        "clicks": pa.array(random.poisson(rate, ROWS)),
        "job": pa.array(np.where(random.random(ROWS) < cook, "cook", random.choice(["judge", "nurse", "clerk"], ROWS)).tolist()),
        "history": pa.array([["i"] * n for n in random.poisson(length, ROWS)], pa.list_(pa.string())),
    }
    columns = {"user_id": pa.array(["u"] * ROWS)}
    for name, column in values.items():
        status = np.where(random.random(ROWS) < missing, ValueStatus.MISSING, ValueStatus.PRESENT).astype(np.uint8)
        status[:50] = ValueStatus.NULL
        columns[name] = pa.compute.if_else(pa.array(status == ValueStatus.PRESENT), column, pa.scalar(None, column.type))
        columns[f"{name}__status"] = pa.array(status)
    return pa.table(columns)


def _psi(baseline: Summary, table: pa.Table) -> dict[str, float]:
    return {each.feature: each.psi for each in drift(baseline, table)}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_distribution_stays_below(seed: int) -> None:
    baseline = summarize(_table(0))
    found = _psi(baseline, _table(seed))
    assert set(found) == set(FEATURES) and all(0 <= value < 0.02 for value in found.values()), found
    assert set(_psi(baseline, _table(0)).values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "shifted"),
    [
        ({"scale": 2.0}, {"amount"}),
        ({"rate": 2.0}, {"clicks"}),
        ({"cook": 0.1}, {"job"}),
        ({"length": 8}, {"history"}),
        ({"missing": 0.4}, set(FEATURES)),
    ],
)
def test_what_shifted_rises_and_nothing_else(change: dict[str, Any], shifted: set[str]) -> None:
    found = _psi(summarize(_table(0)), _table(1, **change))
    assert {name for name, value in found.items() if value > 0.2} == shifted, found
    assert all(value < 0.02 for name, value in found.items() if name not in shifted), found


def test_psi_is_the_sum_of_its_definition() -> None:
    p, q = (0.5, 0.3, 0.2, 0.0), (0.2, 0.3, 0.4, 0.1)
    by_hand = (0.2 - 0.5) * math.log(0.2 / 0.5) + (0.4 - 0.2) * math.log(0.4 / 0.2) + (0.1 - 1e-4) * math.log(0.1 / 1e-4)
    assert psi(p, q) == pytest.approx(by_hand) == pytest.approx(psi(q, p))


def test_a_summary_says_what_numpy_says_and_survives_json() -> None:
    table = _table(2)
    summary = summarize(table)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
    amount, status = summary.features["amount"], np.asarray(table.column("amount__status"))
    present = np.asarray(table.column("amount").drop_null())
    assert amount.quantiles == pytest.approx(np.quantile(present, QUANTILES).tolist())
    assert (amount.rows, amount.null, amount.missing) == (ROWS, 50 / ROWS, (status == ValueStatus.MISSING).mean())
    assert len(amount.edges) == 9 and amount.shares[:-1] == pytest.approx([len(present) / ROWS / 10] * 10, abs=1e-3)
    assert amount.shares[-1] == pytest.approx(1 - len(present) / ROWS)
    clicks = table.column("clicks").drop_null().to_pylist()
    assert summary.features["clicks"].edges == (0.0, 1.0, 2.0)[: len(summary.features["clicks"].edges)]
    assert summary.features["clicks"].shares[0] == clicks.count(0) / ROWS and summary.features["clicks"].shares[1] == clicks.count(1) / ROWS
    assert summary.features["job"].categories[0] == "cook" and summary.features["job"].kind == "category"
    assert summary.features["history"].quantiles[-1] == max(len(each) for each in table.column("history").drop_null().to_pylist())
    for feature in summary.features.values():
        assert sum(feature.shares) == pytest.approx(1)


def test_columns_without_any_value() -> None:
    nothing = _table(3, missing=2.0)
    baseline = summarize(nothing)
    assert baseline.features["amount"].quantiles == () and baseline.features["amount"].shares[-1] == 1.0
    assert set(_psi(baseline, nothing).values()) == {0.0}
    assert all(value > 0.2 for value in _psi(baseline, _table(3)).values())


def test_what_is_refused() -> None:
    table, baseline = _table(4), summarize(_table(4))
    with pytest.raises(DataError, match="feature 'amount': expected at least one row, got none"):
        drift(baseline, table.slice(0, 0))
    with pytest.raises(SchemaError, match="drift: missing column: unknown column 'amount'"):
        drift(baseline, table.drop_columns(["amount"]))
    with pytest.raises(SchemaError, match="feature 'clicks': expected a number as in the baseline, got a category: string"):
        drift(baseline, table.set_column(3, "clicks", pa.array(["x"] * ROWS)))
    with pytest.raises(DataError, match="bins: expected at least 2, got 1"):
        summarize(table, bins=1)


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    return MemoryStore() if request.param == "memory" else SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))


def test_freshness_is_the_age_of_the_newest_event(world: Callable[..., Any], store: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.drift.BATCH_ENTITIES", 2)
    w = world(5)
    with pytest.raises(FeatureStoreError, match="view 'activity' is not in the online store"):
        freshness(w.repo, store, w.at(0))
    empty = w.tables | {"interactions": w.tables["interactions"].slice(0, 0)}
    materialize(w.repo, empty, store)
    assert freshness(w.repo, store, w.at(0)) == {"activity": None, "recent": None, "popularity": None}
    materialize(w.repo, w.tables, store)
    rows = w.tables["interactions"].to_pylist()
    newest = {key: max(row["event_time"] for row in rows if row[key] is not None) for key in ("user_id", "item_id")}
    user, item = ((w.at(5000) - newest[key]).total_seconds() for key in ("user_id", "item_id"))
    assert freshness(w.repo, store, w.at(5000)) == {"activity": user, "recent": user, "popularity": item}
