# SPDX-License-Identifier: Apache-2.0
"""What the promotion measures on this machine, with a bundle that the whole road made."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.inference import golden
from recsys.inference.recommender import Recommender
from recsys.registry import Bound, Evidence, Location, run_gates
from recsys.registry.gates import LatencyBudget, ParityBound, SchemaCompatibility
from recsys.registry.gates.measuring import measure

USERS = ["1", "2", "never seen"]


@dataclass(frozen=True)
class Found:
    largest_difference: float
    rows: int


class Counting:
    """The online reader, and how often each service was asked."""

    def __init__(self, reader: OnlineReader) -> None:
        self._reader = reader
        self.asked: dict[str, list[str]] = {}

    def read(self, service, spine):
        self.asked.setdefault(service, []).append(spine)
        return self._reader.read(service, spine)


@pytest.fixture(scope="module")
def directory(tiny_run) -> Path:
    return tiny_run.directory / "bundle"


@pytest.fixture
def reader(tiny_run, directory: Path) -> Iterator[Counting]:
    bundle = Bundle.load(directory)
    store = SQLiteStore.open(Location.under(tiny_run.home).online_store(bundle.manifest.feature_versions))
    yield Counting(OnlineReader(parse(FeatureRepo, bundle.features, source="features.json"), store))
    store.close()


def replayed(bundle: Bundle) -> Found:
    """The bundle's own recorded requests as the recorded decisions."""
    report = golden.check(Recommender(bundle, None))
    return Found(report.largest_difference, sum(len(request.item_ids) for request in bundle.golden.requests))


def test_nothing_is_measured_that_no_gate_wants(directory: Path, reader: Counting) -> None:
    assert measure((Bound(metric="a"), SchemaCompatibility()), Path("nowhere"), reader, USERS) == {}
    assert reader.asked == {}


def test_requests_are_asked_one_at_a_time_of_all_users_in_turn(directory: Path, reader: Counting) -> None:
    gates = (LatencyBudget(p99_ms=60_000, requests=7, k=3), LatencyBudget(p50_ms=60_000, requests=4, k=5))
    measured = measure(gates, directory, reader, USERS)
    assert measured["latency"].keys() == {"p50_ms", "p99_ms", "requests", "k"}
    assert (measured["latency"]["requests"], measured["latency"]["k"]) == (7, 5)
    assert 0 < measured["latency"]["p50_ms"] <= measured["latency"]["p99_ms"]
    spines = reader.asked["user"]
    assert all(spine.num_rows == 1 for spine in spines)
    assert [spine.column("user_id")[0].as_py() for spine in spines][-7:] == ["1", "2", "never seen"] * 2 + ["1"]
    results = run_gates(gates, Evidence.of(directory, measured=measured))
    assert [result.passed for result in results] == [True, True]
    assert results[0].note == "7 requests of 5 items, on this machine"
    tight = run_gates((LatencyBudget(p50_ms=1e-6, p99_ms=1e-6),), Evidence.of(directory, measured=measured))
    assert not any(result.passed for result in tight)


def test_nobody_to_ask_for_is_no_measurement(directory: Path, reader: Counting) -> None:
    gates = (LatencyBudget(p99_ms=60_000),)
    (result,) = run_gates(gates, Evidence.of(directory, measured=measure(gates, directory, reader, [])))
    assert not result.passed and "was not measured" in result.note


def test_recorded_decisions_are_replayed_with_the_candidate(directory: Path, reader: Counting) -> None:
    gates = (ParityBound(at_most=0, min_rows=10),)
    measured = measure(gates, directory, reader, USERS, replayed)
    rows = measured["parity"]["rows"]
    assert measured == {"parity": {"max_difference": 0.0, "rows": rows, "source": "decisions"}} and rows >= 10
    assert reader.asked == {}
    (result,) = run_gates(gates, Evidence.of(directory, measured=measured))
    assert result.passed and result.note == f"{rows} scores of its recorded decisions"
