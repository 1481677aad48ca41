# SPDX-License-Identifier: Apache-2.0
"""Requests that are computed together get the answers that each would get alone; who has gone harms nobody; nobody is computed too late."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recsys.core.deadline import RejectReason
from serving.engine import Answer, Engine, Loaded, Rejected, Served
from tests.serving.support import KNOWN, NOW, Switch, one, running, together, wait_until, work

Load = Callable[..., Loaded]
GATHER = 300  # milliseconds in which requests that come together form one batch


def mixed() -> list:
    lists = [["1", "2", "3"], ["50", "7"], [str(item) for item in range(40)]]
    asked = [work(user, k=k) for user, k in zip(KNOWN[:12], (3, 5, 40, 10) * 3, strict=True)]
    return [
        *asked,
        *(work(user, items=items) for user, items in zip(KNOWN[5:8], lists, strict=True)),
        work("who?"),
        work("6", explain=True),
    ]


def figures(answer: Answer) -> np.ndarray:
    return np.array([(item.score, item.log_probability, item.probability) for item in answer.response.items])


def alike(one: Answer, two: Answer, tolerance: float) -> None:
    assert [item.item_id for item in one.response.items] == [item.item_id for item in two.response.items]
    assert one.response.flags == two.response.flags
    np.testing.assert_allclose(figures(one), figures(two), rtol=0, atol=tolerance)
    assert [[r.item_id for r in item.reasons] for item in one.response.items] == [
        [r.item_id for r in i.reasons] for i in two.response.items
    ]


def batches(engine: Engine) -> list[int]:
    """The number of batches and of their requests so far."""
    samples = {s.name: s.value for metric in engine.metrics.registry.collect() for s in metric.samples if not s.labels}
    return [int(samples["recsys_batch_requests_count"]), int(samples["recsys_batch_requests_sum"])]


def test_batched_answers_are_those_of_each_request_alone(load: Load) -> None:
    with running(Switch(v1=load), cached_candidates=1) as engine:
        alone = [one(engine, asked) for asked in mixed()]
    with running(Switch(v1=load), max_delay_ms=GATHER) as engine:
        together_ = together(engine, mixed())
        assert batches(engine) == [1, len(mixed())]
    recommender = load().recommender
    for asked, first, second in zip(mixed(), alone, together_, strict=True):
        alike(first, second, 1e-5)
        if asked.item_ids is None:
            (expected,) = recommender.recommend([asked.request])
        else:
            expected = recommender.rank_items(asked.request, asked.item_ids)
        alike(first, Answer(expected, first.loaded, {}), 1e-5)


def test_a_batch_of_one_is_the_recommenders_answer_to_the_bit(load: Load) -> None:
    recommender = load().recommender
    with running(Switch(v1=load)) as engine:
        for user in KNOWN[:5]:
            (expected,) = recommender.recommend([work(user).request])
            assert one(engine, work(user)).response == expected


def test_no_batch_has_more_rows_than_the_cap(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, rows = load(), []
    rank = loaded.recommender.rank

    def counted(users: Any, candidates: Any, items: Any = None) -> Any:
        rows.append(int((candidates.rows >= 0).sum()))
        return rank(users, candidates, items)

    with running(Switch(v1=lambda: loaded), max_delay_ms=GATHER, max_batch_rows=70, queue_rows=100_000) as engine:
        monkeypatch.setattr(loaded.recommender, "rank", counted)
        answers = together(engine, [work(user) for user in KNOWN])
    assert all(isinstance(answer, Answer) for answer in answers)
    # 20 candidates each: three requests a batch.
    assert max(rows) == 60 and len(rows) == len(KNOWN) // 3


def test_thirty_in_a_hundred_cancel_and_the_others_answers_are_equal_to_the_bit(load: Load) -> None:
    stays = [user for place, user in enumerate(KNOWN) if place % 10 not in (1, 4, 8)]

    async def ask(engine: Engine) -> list[Answer]:
        tasks = {user: asyncio.ensure_future(engine.answer(work(user))) for user in KNOWN}
        await asyncio.sleep(0.05)
        for user in set(KNOWN) - set(stays):
            tasks[user].cancel()
        await asyncio.wait(tasks.values())
        assert [user for user in KNOWN if tasks[user].cancelled()] == [user for user in KNOWN if user not in stays]
        return [tasks[user].result() for user in stays]

    with running(Switch(v1=load), max_delay_ms=GATHER) as engine:
        beside = asyncio.run(ask(engine))
        assert batches(engine) == [1, len(stays)], "those who had gone were not computed"
    with running(Switch(v1=load), max_delay_ms=GATHER) as engine:
        without = together(engine, [work(user) for user in stays])
    assert [answer.response for answer in beside] == [answer.response for answer in without]


def test_who_goes_while_the_batch_is_computed_is_left_out_of_the_next_stage(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ranked, retrieving, gone = load(), [], threading.Event(), threading.Event()
    retrieve, rank = loaded.recommender.retrieve, loaded.recommender.rank

    def slow(users: Any, count: int) -> Any:
        retrieving.set()
        assert gone.wait(30)
        return retrieve(users, count)

    def counted(users: Any, candidates: Any, items: Any = None) -> Any:
        ranked.extend(users.table.column("user_id").to_pylist())
        return rank(users, candidates, items)

    async def ask(engine: Engine) -> Answer:
        stays, goes = (asyncio.ensure_future(engine.answer(work(user))) for user in ("2", "4"))
        await asyncio.to_thread(retrieving.wait, 30)
        goes.cancel()
        await asyncio.wait({goes})
        gone.set()
        return await stays

    with running(Switch(v1=lambda: loaded), max_delay_ms=50) as engine:
        alone = one(engine, work("2"))
        monkeypatch.setattr(loaded.recommender, "retrieve", slow)
        monkeypatch.setattr(loaded.recommender, "rank", counted)
        engine._tools.caches.of(engine.loaded)._entries.clear()
        alike(asyncio.run(ask(engine)), alone, 1e-5)
    assert ranked == ["2"]


def test_no_stage_begins_after_the_deadline(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, calls = load(), []
    for name in ("users", "retrieve", "items", "rank", "respond"):
        stage = getattr(loaded.recommender, name)

        def noted(*arguments: Any, stage: Any = stage, name: str = name) -> Any:
            calls.append((name, time.monotonic()))
            if name == "retrieve":
                time.sleep(0.6)
            return stage(*arguments)

        monkeypatch.setattr(loaded.recommender, name, noted)

    async def ask(engine: Engine) -> list[Any]:
        first, ends = work("2", seconds=0.3), []
        started = asyncio.ensure_future(engine.answer(first))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(engine.answer(work("4", seconds=0.3)))
        for task in (started, waiting):
            await asyncio.wait({task})
            ends.append(time.monotonic())
        assert ends[0] <= first.deadline.at
        return [started.result(), waiting.exception(), first.deadline.at]

    with running(Switch(v1=lambda: loaded), reserve_ms=100) as engine:
        calls.clear()
        engine._queue.pace.__init__()  # what the slow warm-up taught would reject the second at once
        answer, rejected, deadline = asyncio.run(ask(engine))
        time.sleep(0.8)
    assert [name for name, _ in calls] == ["users", "retrieve"]
    assert all(at < deadline for _, at in calls)
    assert "popular" in answer.response.flags and answer.response.items
    assert isinstance(rejected, Rejected) and rejected.reason is RejectReason.DEADLINE_BEFORE_START


def test_equal_histories_are_retrieved_once_and_hits_give_the_same_bits(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, retrieved = load(), []
    retrieve = loaded.recommender.retrieve

    def counted(users: Any, count: int) -> Any:
        retrieved.append(users.table.num_rows)
        return retrieve(users, count)

    with running(Switch(v1=lambda: loaded)) as engine:
        monkeypatch.setattr(loaded.recommender, "retrieve", counted)
        first = one(engine, work("2"))
        assert one(engine, work("2")).response == first.response and retrieved == [1]
        one(engine, work("2", k=30))
        assert retrieved == [1, 1], "another count is another list"
        one(engine, work("4"))
        one(engine, work("unheard of"))
        one(engine, work("of whom nobody heard"))
        assert retrieved == [1, 1, 1, 1], "users without a history have the same list"
        lookups = {s.labels["outcome"]: s.value for s in engine.metrics.lookups.collect()[0].samples if s.name.endswith("_total")}
        assert lookups == {"hit": 2, "miss": 4}


def test_features_of_a_user_are_read_once_a_request(load: Load, faulty: Any) -> None:
    with running(Switch(v1=lambda: load(reader=faulty)), max_delay_ms=GATHER) as engine:
        faulty.reads.clear()
        together(engine, [work(user, explain=user == "2") for user in KNOWN[:10]])
        assert (faulty.reads["user"], faulty.reads["seen"]) == (1, 1)


def test_the_hook_is_told_of_what_was_served(load: Load) -> None:
    told: list[Served] = []
    asked = [
        work("2", name="a"),
        work("who?", k=4, name="b"),
        work("4", items=["5", "50", "99"], name="c"),
        work("6", explain=True, name="d"),
    ]
    with running(Switch(v1=load), on_answer=told.append, max_delay_ms=GATHER) as engine:
        answers = together(engine, asked)
        wait_until(lambda: len(told) == len(asked))
    by_id = {served.request_id: served for served in told}
    for each, answer in zip(asked, answers, strict=True):
        served, recommender = by_id[each.request_id], answer.loaded.recommender
        assert served.response == answer.response and served.loaded is answer.loaded and served.request == each.request
        assert served.given == (each.item_ids is not None) and served.deadline == each.deadline
        assert served.users is not None and served.users.table.column("user_id").to_pylist() == [each.request.user_id]
        assert served.ranked is not None
        ids, items = recommender.view.take(served.ranked.candidates.rows[0]).to_pylist(), served.ranked.items
        assert items.column("item_id").to_pylist() == ids and set(items.column("request_time").to_pylist()) == {NOW}
        scores = dict(zip(ids, served.ranked.score[0].tolist(), strict=True))
        assert all(scores[item.item_id] == item.score for item in served.response.items)
        assert {"queue", "features", "retrieve", "items", "rank", "respond"} <= served.stages.keys() | {"retrieve"}


def test_a_hook_that_fails_or_is_slow_costs_no_request_anything(load: Load) -> None:
    release = threading.Event()

    def broken(_: Served) -> None:
        release.wait(30)
        raise ZeroDivisionError

    with running(Switch(v1=load), on_answer=broken) as engine:
        assert all(one(engine, work(user)).response.items for user in KNOWN[:5])
        release.set()
