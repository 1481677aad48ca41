# SPDX-License-Identifier: Apache-2.0
"""Rules of a request and of a bundle, and similar items, over a real bundle: on every rung of the ladder."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from feature_store.online import FeatureStoreError
from recsys.bundle.bundle import Bundle
from recsys.bundle.bundle import Settings as BundleSettings
from recsys.bundle.rules import Quota, Rules
from recsys.inference.request import Request
from serving.app import create_app
from serving.engine import Engine, Loaded
from tests.serving.support import Faulty, Switch, settings, wait_until

Load = Callable[..., Loaded]
BODY = {"user_id": "3", "k": 5, "explain": False}


@pytest.fixture(scope="module")
def made(bundle: Bundle, online: Any) -> Loaded:
    return Loaded.of(bundle, online, name="recsys", version=1)


@pytest.fixture(scope="module")
def client(made: Loaded) -> Iterator[TestClient]:
    engine = Engine(Switch(v1=lambda: made), settings())
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: engine.loaded is not None)
        yield client


def ids(client: TestClient, rules: dict[str, Any] | None = None, **changed: Any) -> list[str]:
    answer = client.post("/v1/recommend", json={**BODY, "rules": rules or {}, **changed})
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def attribute_of(made: Loaded) -> str:
    """An attribute that several items of a list share."""
    names = [name for name in made.recommender.bundle.items.column_names if name not in ("item_id", "title")]
    assert names
    return names[0]


def values(made: Loaded, attribute: str, items: list[str]) -> Counter[Any]:
    """Counted from the table of items itself."""
    table = made.recommender.bundle.items.to_pylist()
    own = {row["item_id"]: row[attribute] for row in table}
    return Counter(value for item in items for value in (own[item] if isinstance(own[item], list) else [own[item]]) if value is not None)


def test_what_is_excluded_is_never_shown_and_others_take_its_place(client: TestClient) -> None:
    before = ids(client, k=10)
    after = ids(client, {"exclude": [*before[:4], "no such item"]})
    assert after == before[4:9]


def test_quotas_hold_and_the_list_is_full(client: TestClient, made: Loaded) -> None:
    attribute = attribute_of(made)
    plain, held = ids(client, k=10), ids(client, {"quotas": [{"attribute": attribute, "most": 1}]}, k=3)
    assert max(values(made, attribute, plain).values()) > 1, "else there would be nothing to hold"
    assert max(values(made, attribute, held).values()) == 1 and len(held) == 3


def test_no_diversity_changes_nothing_and_much_changes_something(client: TestClient) -> None:
    assert ids(client, {"diversity": 0.0}) == ids(client)
    most = ids(client, {"diversity": 1.0})
    assert len(most) == 5 and most[0] == ids(client)[0] and most != ids(client)


def test_a_served_list_under_rules_is_the_recommenders(client: TestClient, made: Loaded) -> None:
    rules = {"quotas": [{"attribute": attribute_of(made), "most": 2}], "diversity": 0.4, "exclude": ["1", "2"]}
    asked = Rules(exclude=("1", "2"), quotas=(Quota(attribute=attribute_of(made), most=2),), diversity=0.4)
    (expected,) = made.recommender.recommend([Request("3", 5, datetime.now(UTC), rules=asked)])
    assert ids(client, rules) == [item.item_id for item in expected.items]


@pytest.mark.parametrize(("services", "flag"), [({"item"}, "retriever_only"), ({"user", "seen", "item"}, "popular")])
def test_rules_hold_on_the_lower_rungs(load: Load, faulty: Faulty, services: set[str], flag: str) -> None:
    loaded = load(reader=faulty)
    attribute = attribute_of(loaded)
    engine = Engine(Switch(v1=lambda: loaded), settings(breaker_failures=1000))
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: engine.loaded is not None)
        faulty.services, faulty.error = services, FeatureStoreError("gone")
        plain = client.post("/v1/recommend", json=BODY).json()
        assert flag in plain["flags"]
        first = [item["item_id"] for item in plain["items"]][:2]
        held = ids(client, {"exclude": first, "quotas": [{"attribute": attribute, "most": 1}]}, k=3)
        assert not set(first) & set(held) and max(values(loaded, attribute, held).values()) == 1


def test_a_bundle_has_defaults_which_given_items_are_not_held_to(bundle: Bundle, online: Any, made: Loaded) -> None:
    (plain,) = made.recommender.recommend([Request("3", 5, datetime.now(UTC))])
    first = plain.items[0].item_id
    changed = replace(bundle, settings=bundle.settings.model_copy(update={"rules": Rules(exclude=(first,), diversity=0.9)}))
    loaded = Loaded.of(changed, online, name="recsys", version=1)
    (held,) = loaded.recommender.recommend([Request("3", 5, datetime.now(UTC))])
    assert first not in [item.item_id for item in held.items] and len(held.items) == 5
    given = [item.item_id for item in plain.items]
    assert [item.item_id for item in loaded.recommender.rank_items(Request("3", 5, datetime.now(UTC)), given).items] == given


def test_settings_of_older_bundles_have_no_rules(bundle: Bundle) -> None:
    stored = bundle.settings.model_dump(mode="json")
    del stored["rules"]
    assert BundleSettings.model_validate(stored) == bundle.settings and not bundle.settings.rules.choose


def test_an_attribute_that_no_item_has_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={**BODY, "rules": {"quotas": [{"attribute": "colour", "most": 1}]}})
    assert answer.status_code == 422 and answer.json()["message"].startswith("quotas: unknown item attribute 'colour'")


def test_similar_items_are_those_of_the_largest_cosine(client: TestClient, made: Loaded) -> None:
    answer = client.post("/v1/similar", json={"item_id": "5", "k": 7})
    assert answer.status_code == 200
    found = answer.json()["items"]
    recommender = made.recommender
    vectors = recommender.bundle.retriever.item_vectors().detach().numpy().astype(np.float64)
    (row,) = recommender.view.rows(["5"])
    allowed = [r for r in range(recommender.view.count) if recommender.view.live[r] and recommender.scorable[r] and r != row]
    cosine = {r: vectors[r] @ vectors[row] / np.linalg.norm(vectors[r]) / np.linalg.norm(vectors[row]) for r in allowed}
    best = sorted(cosine.values(), reverse=True)[:7]
    assert [item["similarity"] for item in found] == pytest.approx(best, abs=1e-5)
    assert "5" not in [item["item_id"] for item in found] and all(item["title"] for item in found)


def test_similar_leaves_out_what_is_not_live_and_says_where_the_list_is_short(bundle: Bundle, online: Any, made: Loaded) -> None:
    loaded = Loaded.of(bundle, online, name="recsys", version=1)
    likeness, view = loaded.recommender.likeness, loaded.recommender.view
    rows, _ = likeness.similar("5", 3)
    live = view.live.copy()
    live[rows[0]] = False
    likeness._view = replace(view, live=live)
    after, _ = likeness.similar("5", 2)
    assert after.tolist() == rows[1:].tolist()
    everything, _ = likeness.similar("5", 1000)
    assert len(everything) == int((live & loaded.recommender.scorable).sum()) - 1


@pytest.mark.parametrize("item", ["no such item", "\ud800", ""])
def test_an_item_that_is_none_is_refused(client: TestClient, item: str) -> None:
    body = f'{{"item_id": "{item}"}}'.encode("utf-8", "surrogatepass")
    answer = client.post("/v1/similar", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"] == "invalid_input"
