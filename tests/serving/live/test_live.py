# SPDX-License-Identifier: Apache-2.0
"""A catalogue that changes while requests come: the next request sees it, whatever the index, and no dead item is ever shown."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from feature_store.online import OnlineReader
from recsys.bundle.bundle import Bundle
from recsys.core.errors import CannotScoreNewItems, DataError
from recsys.inference.request import InvalidRequest
from recsys.retrieval.catalogue import BeamIndex, CodeIndex, DenseIndex, GatherIndex
from recsys.retrieval.codes import code_items
from recsys.retrieval.models.rpg import RPG
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.models.tiger import TIGER
from recsys.retrieval.tokenizers.residual_kmeans import ResidualKMeans
from serving.app import create_app
from serving.engine import Engine, Loaded
from serving.live import ChangeLog, LiveCatalogue, Wanted
from serving.live.log import ChangeLogError, LogHasGoneOn
from serving.routes import admin
from tests.serving.support import KNOWN, Faulty, Switch, one, running, settings, wait_until, work

Load = Callable[..., Loaded]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def log(tmp_path: Path) -> ChangeLog:
    return ChangeLog(tmp_path / "catalogue.sqlite")


@contextmanager
def serving(source: Any, live: LiveCatalogue, **changed: Any) -> Iterator[Engine]:
    with running(source, keep_up=live.kept_up, catalogue_seconds=0.05, **changed) as engine:
        yield engine


def shown(engine: Engine, user: str, k: int = 200) -> list[str]:
    return [item.item_id for item in one(engine, work(user, k=k)).response.items]


def change(engine: Engine, live: LiveCatalogue, *wanted: Wanted) -> None:
    live.change(engine.loaded, wanted, actor="somebody", reason="a test")
    engine.renew()


def like(loaded: Loaded, item: str, new: str) -> Wanted:
    """To add an item that says of itself what a present one does."""
    (row,) = loaded.recommender.view.rows([item])
    attributes = loaded.recommender.bundle.items.slice(int(row), 1).to_pylist()[0]
    return Wanted(action="add", item_id=new, attributes={name: v for name, v in attributes.items() if name != "item_id"})


def over_codes(bundle: Bundle, kind: str) -> Bundle:
    """The bundle with an untrained model over codes in the place of its retriever."""
    tokenizer = ResidualKMeans(ResidualKMeans.Config(levels=3, codes=8, iterations=4)).fit(bundle.item_table)
    items, view = replace(bundle.item_table, codes=code_items(tokenizer, bundle.item_table)), bundle.catalogue.snapshot()
    torch.manual_seed(0)
    model, index = (RPG, GatherIndex) if kind == "gather" else (TIGER, BeamIndex)
    retriever = model(model.Config(dim=16, heads=2, dropout=0.0, max_length=8), items).eval()
    made = index.over(index.Config(), retriever, view)
    return replace(bundle, retriever=retriever, index=made, item_table=items, tokenizer=tokenizer, golden=None)


def test_what_is_removed_or_blocked_is_gone_in_the_next_request_and_comes_back(load: Load, log: ChangeLog) -> None:
    clock = Clock()
    live = LiveCatalogue(log, clock)
    with serving(Switch(v1=load), live) as engine:
        before = shown(engine, KNOWN[0])
        first, second, third = before[:3]
        soon = clock.now + timedelta(hours=1)
        change(
            engine,
            live,
            Wanted(action="remove", item_id=first),
            Wanted(action="block", item_id=second),
            Wanted(action="block", item_id=third, until=soon),
        )
        assert set(before) - set(shown(engine, KNOWN[0])) == {first, second, third}
        clock.now = soon
        wait_until(lambda: third in shown(engine, KNOWN[0]))
        assert not {first, second} & set(shown(engine, KNOWN[0]))
        change(engine, live, Wanted(action="restore", item_id=first), Wanted(action="unblock", item_id=second))
        assert shown(engine, KNOWN[0]) == before


def test_an_item_like_another_stands_beside_it_and_can_be_ranked(load: Load, log: ChangeLog) -> None:
    live = LiveCatalogue(log)
    with serving(Switch(v1=load), live) as engine:
        old = engine.loaded
        twin = shown(engine, "nobody", k=1)[0]
        change(engine, live, like(old, twin, "new"))
        answer = one(engine, work("nobody", k=200)).response.items
        assert "new" in [item.item_id for item in answer] and len(answer) == old.recommender.view.live_count + 1
        assert engine.loaded.titles["new"] == engine.loaded.titles[twin] and "new" not in old.titles
        ranked = one(engine, work("nobody", items=[twin, "new"]))
        assert {item.item_id for item in ranked.response.items} == {twin, "new"}
        text = engine.loaded.recommender.bundle.item_table.text
        rows = engine.loaded.recommender.view.rows([twin, "new"])
        assert text[rows[0]].tolist() == pytest.approx(text[rows[1]].tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["gather", "beam"])
def test_every_kind_of_index_takes_changes(bundle: Bundle, online: OnlineReader, log: ChangeLog, kind: str) -> None:
    live, own = LiveCatalogue(log), over_codes(bundle, kind)
    with serving(Switch(v1=lambda: Loaded.of(own, online, name="recsys", version=1)), live) as engine:
        assert isinstance(engine.loaded.recommender.bundle.index, CodeIndex)
        before = shown(engine, KNOWN[0])
        change(engine, live, like(engine.loaded, "5", "new"), Wanted(action="remove", item_id=before[0]))
        assert set(shown(engine, KNOWN[0])) == {*before[1:], "new"}
        by_id = {item.item_id: item for item in one(engine, work(KNOWN[0], items=["5", "new"])).response.items}
        assert by_id["5"].log_probability == pytest.approx(by_id["new"].log_probability, abs=1e-5), "the same text has the same codes"
        grown = engine.loaded.recommender.bundle
        anew = type(grown.index).over(grown.index.config, grown.retriever, grown.catalogue.snapshot())
        assert torch.equal(anew.table.codes, grown.index.table.codes)


def test_a_model_bound_to_its_items_says_that_it_cannot_take_others(bundle: Bundle, online: OnlineReader, log: ChangeLog) -> None:
    live, view = LiveCatalogue(log), bundle.catalogue.snapshot()
    retriever = SASRec(SASRec.Config(dim=8, blocks=1, heads=1, max_length=8), bundle.item_table).eval()
    bound = replace(bundle, retriever=retriever, index=DenseIndex.over(DenseIndex.Config(), retriever, view), golden=None)
    loaded = Loaded.of(bound, online, name="recsys", version=1)
    with pytest.raises(CannotScoreNewItems, match="SASRec is bound to the"):
        live.change(loaded, [like(loaded, "5", "new")], actor="a", reason="r")
    assert log.since("recsys") == []
    able = Loaded.of(bundle, online, name="recsys", version=2)
    live.change(able, [like(able, "5", "new"), Wanted(action="remove", item_id="5")], actor="a", reason="r")
    kept = live.kept_up(loaded)
    assert kept.recommender.view.rows(["new"])[0] == -1 and not kept.recommender.view.live[kept.recommender.view.rows(["5"])[0]]
    assert "SASRec is bound" in live.refused(kept)["new"] and live.refused(live.kept_up(able)) == {}


def test_the_bundle_that_was_loaded_and_its_readers_stay_as_they_were(load: Load, log: ChangeLog) -> None:
    live = LiveCatalogue(log)
    with serving(Switch(v1=load), live) as engine:
        old = engine.loaded
        expected = old.recommender.recommend([work(user, k=50).request for user in KNOWN[:5]])
        change(engine, live, like(old, "5", "new"), Wanted(action="remove", item_id=expected[0].items[0].item_id))
        assert engine.loaded is not old and engine.loaded.recommender.bundle.catalogue is not old.recommender.bundle.catalogue
        assert old.recommender.recommend([work(user, k=50).request for user in KNOWN[:5]]) == expected
        grown = engine.loaded.recommender.bundle
        shared = {name: tensor.data_ptr() for name, tensor in grown.retriever.named_parameters()}
        assert shared == {name: tensor.data_ptr() for name, tensor in old.recommender.bundle.retriever.named_parameters()}
        for user in KNOWN[:3]:
            request = work(user, k=3).request
            own, later = (loaded.recommender.rank_items(request, ["7", "9", "11"]).items for loaded in (old, engine.loaded))
            assert [item.probability for item in own] == pytest.approx([item.probability for item in later], abs=1e-5)
            # The logarithm of the live catalogue's share is the same for all items.
            moved = [item.log_probability - then.log_probability for item, then in zip(own, later, strict=True)]
            assert moved == pytest.approx([moved[0]] * 3, abs=1e-4)


def test_the_next_bundle_and_the_next_process_have_what_was_changed(load: Load, log: ChangeLog) -> None:
    live = LiveCatalogue(log)
    source = Switch(v1=load, v2=lambda: load(2, rank_weight=1.0))
    with serving(source, live) as engine:
        gone = shown(engine, KNOWN[0])[0]
        change(engine, live, like(engine.loaded, "5", "new"), Wanted(action="remove", item_id=gone))
        source.wanted = 2
        wait_until(lambda: engine.loaded.version == 2)
        assert gone not in shown(engine, KNOWN[0]) and "new" in shown(engine, KNOWN[0])
        change(engine, live, Wanted(action="remove", item_id="new"))
        source.wanted = 1
        wait_until(lambda: engine.loaded.version == 1)
        assert not {gone, "new"} & set(shown(engine, KNOWN[0])), "the bundle that was kept warm is kept up, too"
        assert source.loads == {1: 1, 2: 1}
    with serving(Switch(v1=load), LiveCatalogue(log)) as engine:
        assert not {gone, "new"} & set(shown(engine, KNOWN[0]))


def test_another_worker_sees_it_within_a_second(load: Load, log: ChangeLog) -> None:
    live, other = LiveCatalogue(log), LiveCatalogue(log)
    with serving(Switch(v1=load), live) as engine, serving(Switch(v1=load), other) as beside:
        item = shown(beside, KNOWN[0])[0]
        change(engine, live, Wanted(action="block", item_id=item))
        wait_until(lambda: not beside.loaded.recommender.view.live[beside.loaded.recommender.view.rows([item])[0]], 1.0)
        assert item not in shown(beside, KNOWN[0])
        change(beside, other, Wanted(action="unblock", item_id=item))
        wait_until(lambda: item in shown(engine, KNOWN[0]))


def test_an_answer_that_was_begun_before_is_given_without_what_was_removed(load: Load, log: ChangeLog, monkeypatch: Any) -> None:
    live, loaded, reached, release = LiveCatalogue(log), load(), threading.Event(), threading.Event()
    with serving(Switch(v1=lambda: loaded), live) as engine:
        item, rank = shown(engine, KNOWN[0], k=5)[0], loaded.recommender.rank

        def held(*arguments: Any) -> Any:
            reached.set()
            assert release.wait(30)
            return rank(*arguments)

        monkeypatch.setattr(loaded.recommender, "rank", held)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(one(engine, work(KNOWN[0], k=5))))
        asking.start()
        assert reached.wait(30)
        change(engine, live, Wanted(action="remove", item_id=item))
        release.set()
        asking.join(30)
        assert item not in [found.item_id for found in answers[0].response.items]
        assert len(answers[0].response.items) == 4 and "short_list" in answers[0].response.flags


def test_the_popular_list_knows_of_changes(load: Load, log: ChangeLog, faulty: Faulty) -> None:
    live = LiveCatalogue(log)
    with serving(Switch(v1=lambda: load(reader=faulty)), live) as engine:
        faulty.error = OSError("the store is gone")
        before = shown(engine, "never seen", k=20)
        change(engine, live, Wanted(action="block", item_id=before[0]), like(engine.loaded, "5", "new"))
        answer = one(engine, work("never seen", k=200)).response
        after = [item.item_id for item in answer.items]
        assert "popular" in answer.flags and before[0] not in after and after[:19] == before[1:20] and "new" in after
        assert one(engine, work("never seen", items=["new", "5"])).response.items[0].item_id in ("new", "5")


def dead_items(load: Load, log: ChangeLog, requests: int) -> tuple[int, int]:
    """Requests beside adds, removals, blocks and their ends: how many answers there were, and how many changes.

    No answer to a request that came after a change was acknowledged may show what the change took away.
    """
    live = LiveCatalogue(log)
    answered, changes = 0, 0
    dead: dict[str, int] = {}  # the request number from which on an item is dead
    with serving(Switch(v1=load), live, max_batch_rows=400) as engine:
        victims = [item.item_id for item in one(engine, work("nobody", k=30)).response.items]
        stopped = threading.Event()

        def meddle() -> None:
            nonlocal changes
            while not stopped.is_set():
                victim, new = victims[changes % len(victims)], f"new {changes}"
                change(engine, live, Wanted(action="remove" if changes % 2 else "block", item_id=victim), like(engine.loaded, victim, new))
                dead[victim] = answered
                time.sleep(0.005)
                dead.pop(victim)
                change(
                    engine,
                    live,
                    Wanted(action="restore" if changes % 2 else "unblock", item_id=victim),
                    Wanted(action="remove", item_id=new),
                )
                dead[new] = answered
                changes += 1

        async def ask(users: list[str], count: int) -> None:
            nonlocal answered
            for number in range(count):
                gone = set(dead)
                answer = await engine.answer(work(users[number % len(users)], k=10))
                items = {item.item_id for item in answer.response.items}
                assert not items & gone & set(dead), "a dead item was shown"
                assert len(items) == 10 or "short_list" in answer.response.flags
                answered += 1

        async def everybody() -> None:
            await asyncio.gather(*(ask([*KNOWN[place::4], f"nobody {place}"], requests // 4) for place in range(4)))

        meddler = threading.Thread(target=meddle)
        meddler.start()
        try:
            asyncio.run(everybody())
        finally:
            stopped.set()
            meddler.join(60)
    return answered, changes


def test_no_dead_item_in_four_hundred_answers_beside_changes(load: Load, log: ChangeLog) -> None:
    answered, changes = dead_items(load, log, 400)
    assert answered == 400 and changes >= 2


@pytest.mark.slow
def test_no_dead_item_in_ten_thousand_answers_beside_changes(load: Load, log: ChangeLog) -> None:
    answered, changes = dead_items(load, log, 10_000)
    assert answered == 10_000 and changes >= 20


def test_a_change_that_makes_no_sense_changes_nothing(load: Load, log: ChangeLog) -> None:
    live, loaded = LiveCatalogue(log), load()
    past = datetime(2000, 1, 1, tzinfo=UTC)
    for wanted, message in [
        (Wanted(action="remove", item_id="what?"), "not in the catalogue"),
        (like(loaded, "5", "7"), "in the catalogue already"),
        (Wanted(action="block", item_id="7", until=past), "until: expected a time to come"),
        (Wanted(action="remove", item_id="7", until=past), "until: expected for 'block' only"),
        (Wanted(action="block", item_id="7", attributes={"title": "x"}), "attributes: expected none"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            live.change(loaded, [Wanted(action="block", item_id="7"), wanted], actor="a", reason="r")
    for attributes, message in [({"titel": "x"}, "did you mean 'title'"), ({"title": 5}, "attribute 'title': expected")]:
        with pytest.raises(DataError, match=message):
            live.change(loaded, [Wanted(action="add", item_id="x", attributes=attributes)], actor="a", reason="r")
    assert log.since("recsys") == [] and live.kept_up(loaded) is loaded


def test_the_log_only_grows_and_holds_who_has_seen_what(log: ChangeLog, tmp_path: Path) -> None:
    block = Wanted(action="block", item_id="7", until=datetime(2030, 1, 1, tzinfo=UTC))
    (first,) = log.append("m", [block], after=0, actor="a", reason="r")
    with pytest.raises(LogHasGoneOn, match="expected change 0 to be the last"):
        log.append("m", [block], after=0, actor="b", reason="r")
    (second,) = log.append("m", [Wanted(action="add", item_id="x", attributes={"title": "X"})], after=first.id, actor="a", reason="r")
    log.append("other", [block], after=0, actor="a", reason="r")
    again = ChangeLog(tmp_path / "catalogue.sqlite")
    assert again.since("m") == [first, second] and again.since("m", first.id) == [second] and first.until == block.until
    for statement in ("UPDATE catalogue_changes SET actor = 'c'", "DELETE FROM catalogue_changes"):
        with sqlite3.connect(tmp_path / "catalogue.sqlite") as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    (tmp_path / "broken").write_bytes(b"no database" * 100)
    with pytest.raises(ChangeLogError, match="broken"):
        ChangeLog(tmp_path / "broken")


def test_changes_over_http(load: Load, log: ChangeLog) -> None:
    live = LiveCatalogue(log)
    engine = Engine(Switch(v1=load), settings(), keep_up=live.kept_up)
    with TestClient(create_app(engine, engine.settings, more=(admin.routes_of(live),))) as client:
        assert client.get("/admin/catalogue").status_code in (200, 503)
        wait_until(lambda: client.get("/readyz").status_code == 200)
        before = client.get("/admin/catalogue").json()
        body = {"actor": "me", "reason": "why not", "changes": [{"action": "add", "item_id": "new", "attributes": {"title": "A New One"}}]}
        after = client.post("/admin/catalogue", json=body).json()
        assert (after["items"], after["live"], after["refused"]) == (before["items"] + 1, before["live"] + 1, {}) and after["changes"]
        ranked = client.post("/v1/rank", json={"user_id": "3", "item_ids": ["new"]}).json()
        assert ranked["items"][0]["title"] == "A New One"
        again = client.post("/admin/catalogue", json=body)
        assert again.status_code == 422 and "in the catalogue already" in again.json()["message"]
        assert client.post("/admin/catalogue", json={**body, "actor": ""}).status_code == 422
    plain = Engine(Switch(), settings())
    assert TestClient(create_app(plain, plain.settings)).post("/admin/catalogue", json=body).status_code == 404
