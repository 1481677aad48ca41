# SPDX-License-Identifier: Apache-2.0
"""What the server answers goes into the decision log, and is computed again from there; and bundles that are kept in other ways."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from recsys.bundle.rules import Rules
from recsys.decisions.log import DecisionLog
from recsys.decisions.parts import read_decisions
from recsys.decisions.replay import replay
from recsys.inference.request import Request
from recsys.registry import Location
from serving.decided import Decided
from serving.engine import Hosting, Loaded, RegistrySource
from tests.serving.support import KNOWN, NOW, Faulty, Switch, one, running, work

Load = Callable[..., Loaded]


def test_a_served_decision_is_computed_again_to_the_bit(load: Load, tmp_path: Path) -> None:
    asked = [work(user, name=f"r{user}") for user in KNOWN[:5]]
    asked += [work("who?", name="new"), work(KNOWN[0], items=["5", "50", "99"], name="given")]
    decided = Decided(DecisionLog(tmp_path, share=1.0))
    with running(Switch(v1=load), on_answer=decided) as engine:
        answers = [one(engine, each) for each in asked]  # one by one: in a batch with others, sums may be made in another order
    decided.close()
    decisions = {decision.request_id: decision for decision in read_decisions(tmp_path)}
    assert decisions.keys() == {each.request_id for each in asked} and decided.log.dropped == 0
    for each, answer in zip(asked, answers, strict=True):
        decision = decisions[each.request_id]
        assert decision.shown.column("item_id").to_pylist() == [item.item_id for item in answer.response.items]
        assert (decision.user_id, decision.bundle, decision.version) == (each.request.user_id, answer.loaded.sha256, answer.loaded.version)
        assert decision.kind == ("rank" if each.item_ids else "recommend") and decision.time == NOW
    report = replay(answers[0].loaded.recommender.bundle, decisions.values())
    assert report.decisions == report.own == report.exact == len(asked) and report.largest_difference == 0


def test_exclusions_are_computed_again_and_lists_that_rules_chose_are_not(load: Load, tmp_path: Path) -> None:
    decided = Decided(DecisionLog(tmp_path, share=1.0))
    with running(Switch(v1=load), on_answer=decided) as engine:
        first = one(engine, work(KNOWN[0], name="plain")).response.items[0].item_id
        for name, rules in (("excluding", Rules(exclude=(first,))), ("diverse", Rules(diversity=0.9))):
            asked = work(KNOWN[0], name=name)
            answer = one(engine, replace(asked, request=replace(asked.request, rules=rules)))
            assert (first in [item.item_id for item in answer.response.items]) == (name == "diverse")
    decided.close()
    decisions = {decision.request_id: decision for decision in read_decisions(tmp_path)}
    assert decisions["diverse"].evidence is None and decisions["excluding"].evidence is not None
    report = replay(answer.loaded.recommender.bundle, [decisions["plain"], decisions["excluding"]])
    assert report.exact == 2


def test_a_list_of_a_fallback_is_logged_without_evidence(load: Load, faulty: Faulty, tmp_path: Path) -> None:
    decided = Decided(DecisionLog(tmp_path, share=1.0))
    with running(Switch(v1=lambda: load(reader=faulty)), on_answer=decided) as engine:
        faulty.error = OSError("the store is gone")
        answer = one(engine, work("nobody asked for before", name="in need"))
    decided.close()
    (decision,) = read_decisions(tmp_path)
    assert "popular" in decision.flags and decision.evidence is None
    assert decision.shown.column("item_id").to_pylist() == [item.item_id for item in answer.response.items]


@pytest.mark.parametrize("hosting", [Hosting(mmap=True), Hosting(mmap=True, quantize="int8")], ids=["mapped", "int8"])
def test_however_a_bundle_is_kept_its_scores_are_those_of_the_plain_one(tiny_run, hosting: Hosting) -> None:
    location = Location.under(tiny_run.home)
    plain, kept = (RegistrySource("models:/recsys@champion", location, how) for how in (Hosting(), hosting))
    expected, found = (source.load(source.target()).recommender for source in (plain, kept))
    near = 1e-6 if hosting.quantize is None else 0.05
    items = expected.view.take(range(50)).to_pylist()
    for user in (*KNOWN[:4], "who?"):
        request = Request(user_id=user, k=50, at=NOW)
        scores = {item.item_id: item.score for item in expected.rank_items(request, items).items}
        assert all(item.score == pytest.approx(scores[item.item_id], abs=near) for item in found.rank_items(request, items).items)


@pytest.mark.slow  # the compiler takes half a minute
def test_a_compiled_ranker_answers_where_it_agrees(tiny_run) -> None:
    location = Location.under(tiny_run.home)
    source = RegistrySource("models:/recsys@champion", location, Hosting(compile=True))
    loaded = source.load(source.target())
    assert loaded.recommender.ranker is not loaded.recommender.bundle.ranker
    assert loaded.remembered.ranker is loaded.recommender.ranker
    assert any((location.compiled / loaded.sha256).rglob("*.pt2"))
