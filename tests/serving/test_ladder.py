# SPDX-License-Identifier: Apache-2.0
"""What a request gets when something is slow, fails, or gives garbage: a list within its deadline, and flags that say which."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_store.online import FeatureStoreError
from serving.engine import Answer, Engine, Loaded
from tests.serving.support import KNOWN, Faulty, Switch, one, running, together, wait_until, work

Load = Callable[..., Loaded]
SECONDS = 1.2  # more than a batch takes on a busy machine


def swapped(table: pa.Table) -> pa.Table:
    return table.set_column(0, table.schema.field(0), pa.chunked_array([pa.array(["somebody else"] * table.num_rows)]))


FAULTS: dict[str, dict[str, Any]] = {
    "slow": {"delay": 4.0},
    "failing": {"error": FeatureStoreError("the store is gone")},
    "broken": {"error": ZeroDivisionError()},
    "no rows": {"garbage": lambda table: table.slice(0, 0)},
    "no columns": {"garbage": lambda table: table.select(table.column_names[:3])},
    "other types": {"garbage": lambda table: table.set_column(2, table.column_names[2], pa.nulls(table.num_rows, pa.binary()))},
    "other keys": {"garbage": swapped},
    "no table": {"garbage": lambda table: None},
}


@pytest.fixture
def engine(load: Load, faulty: Faulty) -> Iterator[Engine]:
    # A breaker that never opens: what it does is tested apart.
    with running(Switch(v1=lambda: load(reader=faulty)), breaker_failures=10**6, read_threads=16, reserve_ms=100) as engine:
        yield engine


def break_(faulty: Faulty, fault: str, *services: str) -> None:
    faulty.services = set(services)
    for name, value in FAULTS[fault].items():
        setattr(faulty, name, value)


def in_time(engine: Engine, **asked: Any) -> Answer:
    answer = one(engine, request := work(**{"user": "2", "seconds": SECONDS} | asked))
    assert time.monotonic() <= request.deadline.at
    assert answer.response.items
    return answer


def ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.response.items]


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_user_features_the_last_ones_are_used(engine: Engine, faulty: Faulty, fault: str) -> None:
    whole = one(engine, work("2"))
    break_(faulty, fault, "user", "seen")
    answer = in_time(engine)
    assert answer.response.flags == ("cached_features",) and answer.response.items == whole.response.items
    assert answer.ages.cached is not None and 0 < answer.ages.cached < 60
    assert whole.ages.newest_event is not None and answer.ages.newest_event == pytest.approx(whole.ages.newest_event + answer.ages.cached)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_any_features_of_the_user_the_popular_list_is_given(engine: Engine, faulty: Faulty, fault: str) -> None:
    break_(faulty, fault, "user", "seen")
    answer = in_time(engine, user="10")
    assert answer.response.flags == ("popular",)
    recommender, popular = answer.loaded.recommender, answer.loaded.popular
    rows = recommender.view.rows(ids(answer))
    assert (np.diff(popular.log_share[rows]) <= 0).all() and popular.log_share[rows[-1]] >= np.sort(popular.log_share)[-5]


@pytest.mark.parametrize("fault", FAULTS)
def test_without_item_features_the_order_is_the_retrievers(engine: Engine, faulty: Faulty, fault: str) -> None:
    whole = one(engine, work("2", k=20))
    break_(faulty, fault, "item")
    answer = in_time(engine, k=20)
    assert answer.response.flags == ("retriever_only",)
    assert sorted(ids(answer)) == sorted(ids(whole))
    expected = sorted(whole.response.items, key=lambda item: -item.log_probability)
    assert ids(answer) == [item.item_id for item in expected]
    assert all(np.isnan(item.probability) and item.score == item.log_probability for item in answer.response.items)


def test_a_store_that_is_gone_altogether_leaves_what_is_known_of_a_user(engine: Engine, faulty: Faulty) -> None:
    one(engine, work("2"))
    break_(faulty, "slow", "user", "seen", "item")
    assert in_time(engine).response.flags == ("cached_features", "retriever_only")
    assert in_time(engine, explain=True).response.flags == ("cached_features", "retriever_only", "no_reasons")


def test_rank_falls_to_the_retrievers_order_and_then_to_popularity(engine: Engine, faulty: Faulty) -> None:
    items = ["3", "1", "99", "50", "8"]
    whole = one(engine, work("2", items=items))
    break_(faulty, "failing", "item")
    answer = in_time(engine, items=items)
    assert answer.response.flags == ("retriever_only",)
    assert ids(answer) == [item.item_id for item in sorted(whole.response.items, key=lambda item: -item.log_probability)]
    break_(faulty, "failing", "user", "seen", "item")
    answer = in_time(engine, user="10", items=items)
    assert answer.response.flags == ("popular",) and sorted(ids(answer)) == sorted(items)
    share = answer.loaded.popular.log_share[answer.loaded.recommender.view.rows(ids(answer))]
    assert (np.diff(share) <= 0).all()


@pytest.mark.parametrize("stage", ["retrieve", "score"])
@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_without_a_retriever_the_popular_list_leaves_out_what_was_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stage: str, fault: str
) -> None:
    def broken(*_: Any) -> Any:
        if fault == "hangs":
            time.sleep(1.5)
        raise RuntimeError("the index is gone")

    loaded = engine.loaded
    assert loaded is not None
    monkeypatch.setattr(loaded.recommender, stage, broken)
    if stage == "score":
        assert sorted(ids(in_time(engine, items=["1", "2"]))) == ["1", "2"]
        return
    answer = in_time(engine, k=60)
    assert "popular" in answer.response.flags
    seen = loaded.remembered.users(["2"], pa.array([work("2").request.at])).seen.values
    assert len(seen) and not set(ids(answer)) & set(loaded.recommender.view.take(seen).to_pylist())


@pytest.mark.parametrize("fault", ["fails", "hangs", "is not finite"])
def test_without_a_ranker_the_order_is_the_retrievers(engine: Engine, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    loaded = engine.loaded
    assert loaded is not None
    rank = loaded.recommender.rank

    def broken(*arguments: Any) -> Any:
        if fault == "hangs":
            time.sleep(1.5)
        if fault == "fails":
            raise RuntimeError("the ranker is gone")
        ranked = rank(*arguments)
        return replace(ranked, score=np.full_like(ranked.score, np.nan))

    monkeypatch.setattr(loaded.recommender, "rank", broken)
    assert in_time(engine).response.flags == ("retriever_only",)


def test_reasons_that_come_too_late_are_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = engine.loaded
    assert loaded is not None
    whole, respond = one(engine, work("2", explain=True)), loaded.recommender.respond
    assert any(item.reasons for item in whole.response.items) and whole.response.flags == ()

    def slow(request: Any, *arguments: Any) -> Any:
        time.sleep(2.0 if request.explain else 0.0)
        return respond(request, *arguments)

    monkeypatch.setattr(loaded.recommender, "respond", slow)
    answer = in_time(engine, explain=True)
    assert answer.response.flags == ("no_reasons",) and ids(answer) == ids(whole)
    assert not any(item.reasons for item in answer.response.items)


def test_who_has_little_time_does_not_take_it_from_who_has_more(load: Load, faulty: Faulty) -> None:
    with running(Switch(v1=lambda: load(reader=faulty)), max_delay_ms=100, breaker_failures=10**6, reserve_ms=100) as engine:
        one(engine, work("2"))
        break_(faulty, "slow", "user")
        faulty.delay = 0.5
        hurried, patient = together(engine, [work("2", seconds=0.5), work("4", seconds=30)])
        assert hurried.response.flags == ("cached_features",)
        assert patient.response.flags == ()


def test_a_dead_store_is_left_alone_and_tried_again(load: Load, faulty: Faulty) -> None:
    with running(Switch(v1=lambda: load(reader=faulty)), breaker_failures=3, breaker_seconds=0.3, read_threads=8, reserve_ms=100) as engine:
        one(engine, work("2"))
        break_(faulty, "slow", "user", "seen", "item")
        for _ in range(2):
            in_time(engine)
        assert engine.breaker.open and engine.not_ready == "the feature store does not answer"
        faulty.reads.clear()
        began = time.monotonic()
        for _ in range(3):
            in_time(engine)
        assert time.monotonic() - began < SECONDS, "no request waits for a store that is left alone"
        assert faulty.reads.total() <= 1, "but for one attempt now and then"
        faulty.heal()
        wait_until(lambda: not engine.breaker.open)
        assert one(engine, work("2")).response.flags == () and engine.not_ready is None


def test_every_flag_is_counted(engine: Engine, faulty: Faulty) -> None:
    for user in KNOWN[:3]:
        one(engine, work(user))
    break_(faulty, "failing", "user", "seen", "item")
    for user in (*KNOWN[:3], "stranger"):
        one(engine, work(user))
    counted = {s.labels["flag"]: s.value for s in engine.metrics.flagged.collect()[0].samples if s.name.endswith("_total")}
    assert counted == {"cached_features": 3, "retriever_only": 3, "popular": 1}
