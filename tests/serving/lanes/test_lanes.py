# SPDX-License-Identifier: Apache-2.0
"""A canary answers its users and is taken back by itself; a shadow changes no answer, however slow it is."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient

from recsys.core.errors import ConfigError
from recsys.data.encode import label_of
from recsys.data.encoding.config import Task
from recsys.inference.request import Response
from recsys.registry import Entry, Location, PromotionLog, State
from serving.app import create_app
from serving.engine import Engine, Hosting, Loaded, RegistrySource, Target
from serving.engine.threads import Repeating
from serving.lanes import Canary, CanaryPolicy, Lane, Shadow, lanes_of
from serving.lanes.split import SALT, is_in
from serving.live import ChangeLog, LiveCatalogue, Wanted
from serving.routes import admin
from tests.serving.support import KNOWN, Switch, one, running, settings, wait_until, work

Load = Callable[..., Loaded]
MODEL = "recsys"
ANY = CanaryPolicy(steps=(30.0, 60.0), least_minutes=0, least_requests=10_000)
USERS = [*KNOWN, *(f"nobody {place}" for place in range(30))]


class Moves:
    """A real promotion log, moved without MLflow, whose aliases are nothing to a canary."""

    def __init__(self, log: PromotionLog, shas: dict[int, str]) -> None:
        self.log, self.shas = log, shas
        for version, sha in shas.items():
            log.append(MODEL, Entry("register", version, sha, "r"), Entry("validate", version, sha, "r"), actor="a")
        self._move("promote", 1, "a", "first", {})

    def stage(self, model: str, version: int, to: Any, *, percent: Any = None, actor: Any = "a", reason: str, details: Any = None) -> Any:
        return self._move(to, version, actor, reason, {**(details or {}), **({} if percent is None else {"percent": percent})})

    def withdraw(self, model: str, version: int, *, actor: Any = "a", reason: str, details: Any = None) -> Any:
        return self._move("withdraw", version, actor, reason, details or {})

    def _move(self, action: Any, version: int, actor: str, reason: str, details: dict[str, Any]) -> Any:
        (event,) = self.log.append(MODEL, Entry(action, version, self.shas[version], reason, details=details), actor=actor)
        return event


@pytest.fixture
def second(load: Load) -> Loaded:
    return load(2, rank_weight=0.0)


@pytest.fixture
def moves(load: Load, second: Loaded, tmp_path: Any) -> Moves:
    return Moves(PromotionLog(f"sqlite:///{tmp_path / 'log.db'}"), {1: load().sha256, 2: second.sha256})


def canary_of(moves: Moves, loaded: Loaded, policy: CanaryPolicy = ANY, **lane: Any) -> Canary:
    found = Lane(lambda: moves.log.canary(MODEL), lambda target: loaded, most_rows=20, **lane)
    return Canary(found, lambda: moves, policy, poll_seconds=0.05)


def test_a_canarys_users_get_its_answers_and_nobody_else_does(load: Load, second: Loaded, moves: Moves) -> None:
    canary = canary_of(moves, second)
    with running(Switch(v1=load), lanes=canary) as engine:
        assert {one(engine, work(user)).loaded.version for user in USERS[:6]} == {1}
        event = moves.stage(MODEL, 2, "canary", percent=30.0, reason="try")
        wait_until(lambda: canary.lane.now is not None)
        for _ in range(2):
            for user in USERS:
                assert one(engine, work(user)).loaded.version == (2 if is_in(user, event) else 1)
        (expected,) = second.recommender.recommend([work(chosen := next(u for u in USERS if is_in(u, event))).request])
        assert [i.item_id for i in one(engine, work(chosen)).response.items] == [i.item_id for i in expected.items]
        moves.withdraw(MODEL, 2, reason="enough")
        wait_until(lambda: canary.lane.now is None)
        assert {one(engine, work(user)).loaded.version for user in USERS} == {1}


def test_a_canary_that_fails_is_withdrawn_and_the_log_says_so(
    load: Load, second: Loaded, moves: Moves, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = canary_of(moves, second, CanaryPolicy(steps=(30.0,), judged_requests=10, p99_growth=1e6, psi=1e6))
    with running(Switch(v1=load), lanes=canary) as engine:
        moves.stage(MODEL, 2, "canary", percent=50.0, reason="try")
        wait_until(lambda: canary.lane.now is not None)
        wait_until(lambda: canary.verdict is not None)

        def broken(*_: Any) -> Any:
            raise RuntimeError("a broken ranker")

        monkeypatch.setattr(second.recommender, "rank", broken)
        for user in USERS:
            assert one(engine, work(user)).response.items, "its users get the retriever's list"
        wait_until(lambda: moves.log.canary(MODEL) is None)
        last = moves.log.events(MODEL)[-1]
        assert (last.action, last.actor, last.to_version) == ("withdraw", "guardrail", 2) and "error rate 100.00%" in last.reason
        assert last.details["figures"]["error_rate"] == [1.0, 0.0] and moves.log.state(MODEL, 2) is State.VALIDATED
        wait_until(lambda: canary.lane.now is None)
        assert "retriever_only" not in one(engine, work(USERS[0])).response.flags


def test_a_canary_that_holds_gets_more_users_and_keeps_those_that_it_has(load: Load, second: Loaded, moves: Moves) -> None:
    policy = CanaryPolicy(steps=(30.0, 60.0), least_minutes=0, least_requests=5, judged_requests=10_000)
    canary = canary_of(moves, second, policy)
    with running(Switch(v1=load), lanes=canary) as engine:
        first = moves.stage(MODEL, 2, "canary", percent=30.0, reason="try")
        wait_until(lambda: canary.lane.now is not None)

        def asked(until: Callable[[], bool]) -> None:
            while not until():
                for user in USERS[::3]:
                    one(engine, work(user, k=1))

        asked(lambda: moves.log.canary(MODEL).details["percent"] == 60.0)
        event = moves.log.canary(MODEL)
        assert event.actor == "guardrail" and event.details[SALT] == first.id and event.details["figures"]["requests"][0] >= 5
        assert {user for user in USERS if is_in(user, first)} <= {user for user in USERS if is_in(user, event)}
        asked(lambda: canary.verdict is not None and canary.verdict.move == "promote")
        assert moves.log.canary(MODEL) == event and moves.log.champion(MODEL).to_version == 1, "promotion needs the gates"


def test_a_canary_that_cannot_be_loaded_answers_nobody(load: Load, moves: Moves) -> None:
    def refused(_: Target) -> Loaded:
        raise RuntimeError("no such file")

    lane = Lane(lambda: moves.log.canary(MODEL), refused, most_rows=20, retry_seconds=0.0)
    canary = Canary(lane, lambda: moves, ANY, poll_seconds=0.05)
    with running(Switch(v1=load), lanes=canary) as engine:
        moves.stage(MODEL, 2, "canary", percent=50.0, reason="try")
        wait_until(lambda: lane.problem is not None)
        assert "no such file" in lane.problem and {one(engine, work(user)).loaded.version for user in USERS[:10]} == {1}


def test_a_canary_shows_no_removed_item_either(load: Load, second: Loaded, moves: Moves, tmp_path: Any) -> None:
    live = LiveCatalogue(ChangeLog(tmp_path / "catalogue.sqlite"))
    canary = canary_of(moves, second, keep_up=live.kept_up)
    event = moves.stage(MODEL, 2, "canary", percent=50.0, reason="try")
    user = next(user for user in USERS if is_in(user, event))
    with running(Switch(v1=load), lanes=canary, keep_up=live.kept_up) as engine:
        wait_until(lambda: canary.lane.now is not None)
        before = one(engine, work(user))
        gone = before.response.items[0].item_id
        live.change(engine.loaded, [Wanted(action="remove", item_id=gone)], actor="a", reason="r")
        engine.renew()
        after = one(engine, work(user))
        assert before.loaded.version == after.loaded.version == 2
        assert gone not in [item.item_id for item in after.response.items] and len(after.response.items) == 5


def shadowed(load: Load, lane: Lane | None, users: list[str], **shadow: Any) -> tuple[list[Response], dict[str, float], Shadow | None]:
    """The answers, how often each stage was timed, and the shadow, when all that waits has been compared."""
    watching = None if lane is None else Shadow(lane, **shadow)
    with running(Switch(v1=load), on_answer=watching) as engine:
        answers = [one(engine, work(user, k=10)).response for user in users]
        counts = {
            sample.labels["stage"]: sample.value
            for family in engine.metrics.stage.collect()
            for sample in family.samples
            if sample.name.endswith("_count")
        }
    if watching is not None:
        watching.close()
    return answers, counts, watching


def test_a_shadow_ten_times_slower_changes_no_answer_and_no_stage_and_drops_what_is_too_much(
    load: Load, second: Loaded, moves: Moves, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves.stage(MODEL, 2, "shadow", reason="watch")
    lane = Lane(lambda: moves.log.shadow(MODEL), lambda target: second, most_rows=20)
    lane.follow()
    recommend, began = second.recommender.recommend, time.monotonic()
    one_takes = time.monotonic() - began if recommend([work(KNOWN[0]).request]) else 0.0
    one_takes = max(one_takes, time.monotonic() - began)

    def slow(requests: Any) -> Any:
        time.sleep(10 * one_takes)
        return recommend(requests)

    expected, stages, _ = shadowed(load, None, USERS)
    monkeypatch.setattr(second.recommender, "recommend", slow)
    answers, counts, shadow = shadowed(load, lane, USERS, capacity=4)
    assert answers == expected and counts == stages
    report = shadow.report()
    assert report["dropped"] > 0 and report["compared"] >= 1 and report["compared"] + report["dropped"] <= len(USERS)
    assert report["seconds"] > 10 * one_takes and report["version"] == 2


def test_a_shadow_is_compared_list_by_list(load: Load, second: Loaded, moves: Moves) -> None:
    moves.stage(MODEL, 2, "shadow", reason="watch")
    seen = []
    for loaded in (load(), second):
        lane = Lane(lambda: moves.log.shadow(MODEL), lambda target, loaded=loaded: loaded, most_rows=20)
        lane.follow()
        answers, _, shadow = shadowed(load, lane, USERS[:20])
        report = shadow.report()
        own = [loaded.recommender.recommend([work(user, k=10).request])[0] for user in USERS[:20]]
        shares = [len({i.item_id for i in a.items} & {i.item_id for i in b.items}) / 10 for a, b in zip(answers, own, strict=True)]
        assert report["compared"] == 20 and report["dropped"] == report["failed"] == 0
        moved = [
            {i.item_id: i.score for i in mine.items}[i.item_id] - i.score
            for given, mine in zip(answers, own, strict=True)
            for i in given.items
            if i.item_id in {i.item_id for i in mine.items}
        ]
        assert report["overlap"] == pytest.approx(sum(shares) / 20) and report["drift"] == pytest.approx(sum(moved) / len(moved), abs=1e-5)
        seen.append(report)
    assert seen[0]["overlap"] == 1 and seen[0]["drift"] == pytest.approx(0, abs=1e-5)
    assert seen[1]["overlap"] < 1 and seen[1]["drift"] > 0, "without the logarithm of a probability, scores are higher"


def test_a_shadow_that_fails_is_counted(load: Load, second: Loaded, moves: Moves, monkeypatch: pytest.MonkeyPatch) -> None:
    moves.stage(MODEL, 2, "shadow", reason="watch")
    lane = Lane(lambda: moves.log.shadow(MODEL), lambda target: second, most_rows=20)
    lane.follow()
    monkeypatch.setattr(second.recommender, "recommend", lambda requests: 1 / 0)
    answers, _, shadow = shadowed(load, lane, USERS[:3])
    assert shadow.report()["failed"] == 3 and shadow.report()["overlap"] is None and all(answer.items for answer in answers)


def test_the_lanes_of_a_server_follow_the_log_of_its_model_and_say_how_they_do(tiny_run: Any, tmp_path: Any, load: Load) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"steps": [10, 50]}')
    location = Location.under(tiny_run.home)
    given = settings(canary_policy=policy, shadow_requests=3)
    assert lanes_of(RegistrySource("models:/recsys/1", location), given, lambda loaded: loaded) is None
    canary, shadow = lanes_of(RegistrySource("models:/recsys@champion", location), given, lambda loaded: loaded)
    assert canary.policy.steps == (10.0, 50.0)
    canary.look()
    shadow.lane.follow()
    assert canary.verdict is None and canary.lane.now is None and shadow.lane.now is None, "the log names neither"
    live = LiveCatalogue(ChangeLog(tmp_path / "catalogue.sqlite"))
    engine = Engine(Switch(v1=load), given, on_answer=shadow, lanes=canary)
    with TestClient(create_app(engine, given, shadow.close, more=(admin.routes_of(live, canary, shadow),))) as client:
        assert client.get("/admin/canary").json() == {
            "version": None, "percent": None, "problem": None, "move": None, "problems": [], "figures": {}
        }  # fmt: skip
        report = client.get("/admin/shadow").json()
        assert report["version"] is None and report["compared"] == 0 and report["overlap"] is None
    policy.write_text('{"steps": [50, 10]}')
    with pytest.raises(ConfigError, match="ascending"):
        lanes_of(RegistrySource("models:/recsys@champion", location), given, lambda loaded: loaded)


def test_what_is_repeated_goes_on_after_a_failure() -> None:
    calls, enough = [], threading.Event()

    def call() -> None:
        calls.append(datetime.now(UTC))
        if len(calls) == 3:
            enough.set()
        raise RuntimeError("once more")

    repeating = Repeating(call, 0.01, "test")
    repeating.start()
    assert enough.wait(10)
    repeating.stop()


def test_the_canary_is_among_the_bundles_that_the_page_compares(load: Load, second: Loaded, moves: Moves) -> None:
    canary = canary_of(moves, second)
    engine = Engine(Switch(v1=load), settings(), lanes=canary)
    with TestClient(create_app(engine, engine.settings)) as client:

        def roles() -> list[tuple[int, bool, bool]]:
            bundles = client.get("/page/bundles").json()["bundles"]
            return [(bundle["model"]["version"], bundle["live"], bundle["canary"]) for bundle in bundles]

        wait_until(lambda: engine.loaded is not None)
        assert roles() == [(1, True, False)]
        moves.stage(MODEL, 2, "canary", percent=30.0, reason="try")
        wait_until(lambda: canary.lane.now is not None)
        assert roles() == [(1, True, False), (2, False, True)]
        lists = [client.post("/page/what-if", json={"user_id": USERS[0], "version": version}).json() for version in (1, 2)]
        assert [each["model"]["version"] for each in lists] == [1, 2] and lists[0]["items"] != lists[1]["items"]
        moves.withdraw(MODEL, 2, reason="enough")
        wait_until(lambda: canary.lane.now is None)
        assert roles() == [(1, True, False)]


def one_answer(client: TestClient, user: str) -> list[Any]:
    return list(client.post("/v1/recommend", json={"user_id": user, "k": 3, "explain": False}).json()["items"])


def test_events_that_name_a_request_label_its_list_and_a_canary_that_promises_too_much_is_withdrawn(
    tiny_run: Any, second: Loaded, moves: Moves
) -> None:
    """Every shown item gets a low rating, the positive label of nothing, but for a few: the ranker had expected more."""
    patient = CanaryPolicy(steps=(60.0,), judged_requests=10_000, p99_growth=1e6, psi=1e6, error_points=100)
    canary = canary_of(moves, second, patient)
    source = RegistrySource("models:/recsys@champion", Location.under(tiny_run.home), Hosting(events="held"))
    engine = Engine(source, settings(), lanes=canary)
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: engine.loaded is not None)

        def figures() -> dict[str, Any]:
            return {"requests": [0, 0]} if canary.verdict is None else canary.verdict.figures

        event = moves.stage(MODEL, 2, "canary", percent=60.0, reason="try")
        champions = next(user for user in USERS if not is_in(user, event))
        # What is counted begins anew with the first answer of a champion.
        wait_until(lambda: bool(one_answer(client, champions)) and figures()["requests"][1] > 0)
        expected = {True: [0.0, 0.0, 0], False: [0.0, 0.0, 0]}
        sent = 0

        def rate(user: str, item: str, request_id: str | None, **values: float) -> int:
            nonlocal sent
            sent += 1
            body = {"event_id": f"e{sent}", "user_id": user, "item_id": item, "time": "2026-01-01T12:00:00Z", "values": values}
            return client.post("/v1/events", json=body | ({} if request_id is None else {"request_id": request_id})).status_code

        for place, user in enumerate(USERS[:12]):
            answer = client.post("/v1/recommend", json={"user_id": user, "k": 3, "explain": False}, headers={"x-request-id": f"r{place}"})
            own = is_in(user, event)
            assert answer.json()["model"]["version"] == (2 if own else 1)
            for item in answer.json()["items"]:
                rating = 5.0 if sent % 20 == 0 else 1.0
                assert rate(user, item["item_id"], f"r{place}", rating=rating) == 200
                expected[own] = [a + b for a, b in zip(expected[own], (item["probability"], float(rating >= 4), 1), strict=True)]
                # None of these is a label: again, of another user's request, of no request, without the rating.
                assert rate(user, item["item_id"], f"r{place}", rating=5.0) == 200
                assert rate("somebody else", item["item_id"], f"r{place}", rating=5.0) == 200
                assert rate(user, item["item_id"], None, rating=5.0) == 200
        wait_until(lambda: figures()["labels"] == [expected[True][2], expected[False][2]])
        assert figures()["calibration"] == [pytest.approx(expected[own][0] / expected[own][1]) for own in (True, False)]
        assert expected[True][2] >= 15 and expected[True][0] > 1.1 * max(expected[True][1], 1)
        canary.policy = patient.model_copy(update={"judged_requests": 15})
        wait_until(lambda: moves.log.canary(MODEL) is None)
        last = moves.log.events(MODEL)[-1]
        assert (last.action, last.actor) == ("withdraw", "guardrail") and "calibration" in last.reason
        assert last.details["figures"]["labels"] == [expected[True][2], expected[False][2]]


def test_the_label_of_an_event_is_that_of_training() -> None:
    task = Task(name="like", feature="rating", threshold=">= 4")
    assert [label_of(task, {"rating": value}) for value in (5, 4.0, 3.9, None, "5", float("nan"))] == [1.0, 1.0, 0.0, None, None, None]
    assert label_of(task, {"other": 5}) is None and label_of(Task(name="watched", feature="share"), {"share": 0.25}) == 0.25
