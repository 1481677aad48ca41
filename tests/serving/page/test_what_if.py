# SPDX-License-Identifier: Apache-2.0
"""Suppositions, held against the recommender that is asked for the same."""

from collections.abc import Callable

import numpy as np
import pytest

from recsys.inference.recommender import Recommender
from recsys.inference.request import InvalidRequest, Request
from serving.engine import Loaded
from serving.engine.verify import NOBODY
from serving.page.what_if import Supposed, suppose
from tests.serving.support import NOW

USER = "10"
ALL = 100


@pytest.fixture(scope="module")
def recommender(bundle, online) -> Recommender:
    return Recommender(bundle, online)


@pytest.fixture(scope="module")
def own(recommender: Recommender) -> Supposed:
    return suppose(recommender, USER, None, ALL, NOW)


def scores(supposed: Supposed) -> dict[str, float]:
    return {item.item_id: item.score for item in supposed.response.items}


def test_nothing_supposed_is_the_recommenders_list_with_its_reasons(recommender: Recommender) -> None:
    supposed = suppose(recommender, USER, None, 5, NOW)
    (expected,) = recommender.recommend([Request(user_id=USER, k=5, at=NOW, explain=True)])
    assert [item.item_id for item in supposed.response.items] == [item.item_id for item in expected.items]
    assert [item.score for item in supposed.response.items] == pytest.approx([item.score for item in expected.items], abs=1e-5)
    assert any(item.reasons for item in expected.items)
    for item, effects in zip(expected.items, supposed.effects.T, strict=True):
        assert sorted(effects[effects > 0])[::-1][:3] == pytest.approx([reason.weight for reason in item.reasons], abs=1e-5)


def test_the_own_history_supposed_changes_nothing(recommender: Recommender, own: Supposed) -> None:
    same = suppose(recommender, USER, own.history, ALL, NOW)
    assert same.history == own.history
    assert scores(same) == pytest.approx(scores(own), abs=1e-5)
    np.testing.assert_allclose(same.effects, own.effects, atol=1e-5)


@pytest.mark.parametrize("place", [0, -1])
def test_without_an_event_each_score_falls_by_the_events_effect(recommender: Recommender, own: Supposed, place: int) -> None:
    gone = own.history[place]
    kept = [item for item in own.history if item != gone]
    assert len(kept) == len(own.history) - 1
    without = scores(suppose(recommender, USER, kept, ALL, NOW))
    effects = dict(zip(scores(own), own.effects[place], strict=True))
    assert any(abs(effect) > 1e-3 for effect in effects.values())
    assert {item: without[item] for item in effects} == pytest.approx(
        {item: score - effects[item] for item, score in scores(own).items()}, abs=1e-4
    )


def test_what_is_taken_out_may_be_recommended_and_what_is_in_may_not(recommender: Recommender, own: Supposed) -> None:
    gone, added = own.history[-1], next(iter(scores(own)))
    assert gone not in scores(own)
    listed = scores(suppose(recommender, USER, [*own.history[:-1], added], ALL, NOW))
    assert gone in listed and added not in listed
    assert listed.keys() ^ scores(own).keys() == {gone, added}


def test_the_order_of_the_history_matters(recommender: Recommender, own: Supposed) -> None:
    reversed_ = suppose(recommender, USER, own.history[::-1], ALL, NOW)
    assert reversed_.history == own.history[::-1]
    assert scores(reversed_).keys() == scores(own).keys()
    assert scores(reversed_) != pytest.approx(scores(own), abs=1e-4)


def test_an_event_keeps_its_rating_where_it_moves_and_an_added_one_has_none(recommender: Recommender, own: Supposed) -> None:
    # Moved there and back again is where it was, which holds only if values move with their events.
    there = [own.history[-1], *own.history[:-1]]
    assert scores(suppose(recommender, USER, there, ALL, NOW)) != pytest.approx(scores(own), abs=1e-5)
    back = [*there[1:], there[0]]
    assert scores(suppose(recommender, USER, back, ALL, NOW)) == pytest.approx(scores(own), abs=1e-5)


def test_a_history_can_be_assembled_for_nobody(recommender: Recommender) -> None:
    empty = suppose(recommender, NOBODY, [], 5, NOW)
    assert empty.response.flags == ("new_user",) and empty.effects.shape == (0, 5)
    one = suppose(recommender, NOBODY, ["3", "3", "5"], 5, NOW)
    assert one.response.flags == () and one.effects.shape == (3, 5)
    assert not {"3", "5"} & scores(one).keys()


def test_an_unknown_item_is_named(recommender: Recommender, own: Supposed) -> None:
    with pytest.raises(InvalidRequest, match=r"history: 'no such' is not in the catalogue"):
        suppose(recommender, USER, [*own.history, "no such"], 5, NOW)


def test_stages_are_those_of_a_list(load: Callable[..., Loaded]) -> None:
    assert list(suppose(load().recommender, USER, None, 3, NOW).stages) == ["features", "retrieve", "items", "rank", "explain"]
