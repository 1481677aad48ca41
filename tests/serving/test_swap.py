# SPDX-License-Identifier: Apache-2.0
"""Another bundle goes live while requests come: none fails, none is answered by two bundles, and what is no longer needed is freed."""

import asyncio
import gc
import os
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from recsys.core.errors import BundleError, RecsysError
from recsys.registry import Evidence, Location, Registry
from serving.engine import Answer, Engine, Loaded, RegistrySource
from serving.engine.verify import check_answers, warm_up
from tests.serving.support import KNOWN, Switch, one, running, wait_until, work

Load = Callable[..., Loaded]
WEIGHTS = {1: 0.0, 2: 1.0}


def swapped_under_load(load: Load, swaps: int, keep: float) -> tuple[Switch, list[Answer], Engine]:
    """Answers of a steady load, while the wanted bundle changes so many times."""
    source = Switch(**{f"v{version}": lambda v=version: load(v, rank_weight=WEIGHTS[v]) for version in WEIGHTS})
    answers: list[Answer] = []

    async def client(engine: Engine, users: list[str], stopped: asyncio.Event) -> None:
        while not stopped.is_set():
            for user in users:
                answers.append(await engine.answer(work(user)))

    async def ask(engine: Engine) -> None:
        stopped = asyncio.Event()
        clients = [asyncio.ensure_future(client(engine, KNOWN[place::4], stopped)) for place in range(4)]
        for swap in range(swaps):
            source.wanted = 2 - swap % 2
            before = len(answers)
            while engine.loaded is None or engine.loaded.version != source.wanted or len(answers) < before + 8:
                await asyncio.sleep(0.005)
                assert not any(task.done() for task in clients), "a request failed"
        stopped.set()
        await asyncio.gather(*clients)

    with running(source, keep_previous_seconds=keep, max_batch_rows=200) as engine:
        wait_until(lambda: engine.loaded is not None)
        asyncio.run(ask(engine))
        return source, answers, engine


def holds_together(load: Load, answers: list[Answer]) -> None:
    """Every answer is wholly that of the bundle that it names."""
    expected = {}
    for version, weight in WEIGHTS.items():
        recommender = load(version, rank_weight=weight).recommender
        for user in KNOWN:
            (expected[version, user],) = recommender.recommend([work(user).request])
    assert {answer.loaded.version for answer in answers} == set(WEIGHTS)
    for answer in answers:
        whole = expected[answer.loaded.version, answer.response.user_id]
        assert answer.response.bundle == whole.bundle == answer.loaded.sha256 and answer.response.flags == whole.flags
        np.testing.assert_allclose([i.score for i in answer.response.items], [i.score for i in whole.items], atol=1e-5)


@pytest.mark.slow
def test_twenty_swaps_under_load(load: Load) -> None:
    source, answers, engine = swapped_under_load(load, 20, keep=0.0)
    holds_together(load, answers)
    assert source.loads.total() == 21 or source.loads.total() == 20
    assert engine.problem is None


@pytest.mark.slow
def test_a_hundred_swaps_under_load(load: Load) -> None:
    _, answers, _ = swapped_under_load(load, 100, keep=0.0)
    holds_together(load, answers)


def test_the_thread_that_loads_goes_behind_the_others_once_there_is_a_bundle(load: Load) -> None:
    with running(Switch(v1=lambda: load(1))) as engine:
        wait_until(lambda: engine.loaded is not None)
        loads, computes = (thread.native_id for thread in (engine._follower._thread, engine._thread))
        wait_until(lambda: os.getpriority(os.PRIO_PROCESS, loads) > os.getpriority(os.PRIO_PROCESS, computes))
        assert os.getpriority(os.PRIO_PROCESS, computes) == os.getpriority(os.PRIO_PROCESS, os.getpid())


def test_the_former_champion_is_kept_warm_and_flips_back_without_loading(load: Load) -> None:
    source, answers, _ = swapped_under_load(load, 20, keep=600.0)
    holds_together(load, answers)
    assert source.loads == {1: 1, 2: 1}


def test_a_flip_back_takes_well_under_a_second(load: Load) -> None:
    source = Switch(v1=load, v2=lambda: load(2, rank_weight=1.0))
    with running(source) as engine:
        first, source.wanted = engine.loaded, 2
        wait_until(lambda: engine.loaded.version == 2)
        source.wanted, began = 1, time.monotonic()
        wait_until(lambda: engine.loaded is first)
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_former_champion_is_freed_when_its_time_is_over(load: Load, keep: float) -> None:
    source = Switch(v1=load, v2=lambda: load(2, rank_weight=1.0))
    with running(source, keep_previous_seconds=keep) as engine:
        one(engine, work("2", explain=True))
        former, source.wanted = weakref.ref(engine.loaded), 2
        wait_until(lambda: engine.loaded.version == 2)
        one(engine, work("2", explain=True))
        assert keep == 0.0 or former() is not None

        def freed() -> bool:
            gc.collect()
            return former() is None

        wait_until(freed, 20)


def unsorted(response: Any) -> Any:
    return replace(response, items=response.items[::-1])


def not_finite(response: Any) -> Any:
    return replace(response, items=tuple(replace(item, probability=float("nan")) for item in response.items))


def dead(response: Any) -> Any:
    return replace(response, items=tuple(replace(item, item_id=f"{item.item_id}?") for item in response.items))


def empty(response: Any) -> Any:
    return replace(response, items=())


@pytest.mark.parametrize(("fault", "message"), [(unsorted, "sorted"), (not_finite, "finite"), (dead, "not live"), (empty, "empty")])
def test_a_bundle_whose_lists_make_no_sense_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str) -> None:
    def broken() -> Loaded:
        loaded = load(2)
        respond = loaded.recommender.respond
        monkeypatch.setattr(loaded.recommender, "respond", lambda *arguments: fault(respond(*arguments)))
        return loaded

    with pytest.raises(BundleError, match=message):
        check_answers(broken())
    source = Switch(v1=load, v2=broken)
    with running(source) as engine:
        source.wanted = 2
        wait_until(lambda: engine.problem is not None)
        assert message in engine.problem and engine.not_ready is None
        assert one(engine, work("2")).loaded.version == 1
        source.wanted = 1
        wait_until(lambda: engine.problem is None)


def test_a_bundle_that_cannot_be_loaded_leaves_the_old_one_and_is_tried_again(load: Load) -> None:
    attempts = []

    def late() -> Loaded:
        attempts.append(time.monotonic())
        if len(attempts) < 3:
            raise BundleError("ranker/model.safetensors was changed")
        return load(2)

    source = Switch(v1=load, v2=late)
    with running(source, retry_seconds=0.2) as engine:
        source.wanted = 2
        wait_until(lambda: engine.problem is not None)
        assert "was changed" in engine.problem and engine.loaded.version == 1
        wait_until(lambda: engine.loaded.version == 2)
        assert engine.problem is None and np.diff(attempts).min() >= 0.2
        with pytest.raises(BundleError):
            engine.swap(lambda: (_ for _ in ()).throw(BundleError("not this one")))
        assert "not this one" in engine.problem and engine.loaded.version == 2


def test_every_size_of_batch_is_warm_before_the_first_request(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, sizes, explained = load(), [], []
    retrieve, respond = loaded.recommender.retrieve, loaded.recommender.respond

    def counted(users: Any, count: int) -> Any:
        sizes.append(users.table.num_rows)
        return retrieve(users, count)

    def responded(request: Any, *arguments: Any) -> Any:
        response = respond(request, *arguments)
        explained.extend(item.reasons for item in response.items if request.explain)
        return response

    monkeypatch.setattr(loaded.recommender, "retrieve", counted)
    monkeypatch.setattr(loaded.recommender, "respond", responded)
    seen = warm_up(loaded, 200)
    assert set(sizes) == {1, 2, 4, 8, 10} and any(explained)
    assert [rows for rows, _ in seen] == [20, 40, 80, 160, 200] and all(seconds > 0 for _, seconds in seen)


def test_the_promotion_log_is_followed_and_a_rollback_flips_back(tiny_run: Any, tmp_path: Path) -> None:
    for name in ("mlflow.db", "online"):
        (shutil.copytree if name == "online" else shutil.copy)(tiny_run.home / name, tmp_path / name)
    registry = Registry(Location.under(tmp_path))
    champion = registry.log.champion("recsys")
    client = MlflowClient(registry.location.tracking_uri, registry.location.tracking_uri)
    first = client.get_model_version("recsys", str(champion.to_version))
    version = int(client.create_model_version("recsys", first.source, first.run_id, tags=first.tags).version)
    source = RegistrySource("models:/recsys@champion", registry.location)
    comparison = {"list.ndcg@10": {"estimate": 0.0, "low": 0.0, "high": 0.0}}
    with running(source, poll_seconds=0.1) as engine:
        assert engine.loaded.key == (champion.to_version, champion.sha256)
        evidence = Evidence.of(registry.download("recsys", version), comparison)
        registry.promote("recsys", version, gates=(), evidence=evidence, expected=champion.to_version)
        wait_until(lambda: engine.loaded.version == version)
        registry.rollback("recsys", reason="a test")
        began = time.monotonic()
        wait_until(lambda: engine.loaded.version == champion.to_version)
        assert time.monotonic() - began < 1.0
        outcomes = {s.labels["outcome"]: s.value for s in engine.metrics.swaps.collect()[0].samples if s.name.endswith("_total")}
        assert outcomes == {"loaded": 2, "flipped_back": 1, "failed": 0}


def test_an_address_that_names_nothing_says_so(tiny_run: Any) -> None:
    location = Location.under(tiny_run.home)
    with pytest.raises(RecsysError, match="the promotion log knows no champion"):
        RegistrySource("models:/nothing@champion", location).target()
    with pytest.raises(RecsysError, match="expected models:"):
        RegistrySource("recsys", location).target()
    assert RegistrySource("models:/recsys/1", location).target().version == 1
