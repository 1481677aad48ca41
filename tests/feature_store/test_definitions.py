# SPDX-License-Identifier: Apache-2.0
"""Definitions: what is refused and how it is said, the schema of a service, and when a version changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from feature_store.definitions import FeatureRepo
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.core.schema import Column, Dtype, Kind


def _change(definitions: dict[str, Any], path: list[str | int], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(definitions)
    node = changed
    for part in path[:-1]:
        node = node[part]  # type: ignore[index]
    node[path[-1]] = value  # type: ignore[index]
    return changed


ACTIVITY, PROFILE = ["views", 1], ["views", 0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ([*ACTIVITY, "source"], "event", r"repo: views\.1\.source: unknown source 'event'; did you mean 'events'\?"),
        ([*ACTIVITY, "entity"], "user", r"views\.1\.entity: unknown key of source 'events' 'user'; did you mean 'user_id'"),
        (["services", 0, "views"], ["profil"], r"services\.0\.views: unknown view 'profil'; did you mean 'profile'"),
        (["services", 0, "views"], ["profile", "popularity"], "the views of one service must share an entity, got item_id, user_id"),
        (["services", 0, "views"], ["profile", "profile"], "each view at most once"),
        (["services", 0, "views"], [], "services.0.views: .* at least 1 item"),
        (["services", 1, "name"], "user", "services: every service must have a name of its own, but 'user' occurs twice"),
        ([*ACTIVITY, "features", 0, "name"], "item_rating", "every feature must have a name of its own, but 'item_rating' occurs twice"),
        ([*ACTIVITY, "features", 0, "name"], "item_id", "a feature cannot be named 'item_id'"),
        ([*ACTIVITY, "features", 0, "name"], "a__status", "a feature cannot be named 'a__status'"),
        ([*ACTIVITY, "features", 0, "name"], "a b", r"views\.1\.features\.0\.name: String should match"),
        (
            [*ACTIVITY, "features", 0, "kind"],
            "cuont",
            r"views\.1\.features\.0\.kind: unknown kind of feature 'cuont'; did you mean 'count'",
        ),
        ([*ACTIVITY, "features", 0, "windw"], 3, r"views\.1\.features\.0\.windw: unknown key 'windw'; did you mean 'window'"),
        ([*ACTIVITY, "features", 0], {"name": "x"}, "expected a mapping with the key 'kind', one of attribute, count"),
        ([*ACTIVITY, "features", 1, "window"], 0, "window: Input should be greater than 0, got 0"),
        ([*ACTIVITY, "ttl"], 0, "ttl: Input should be greater than 0"),
        ([*PROFILE, "ttl"], 5, r"views\.0\.ttl: source 'people' is static: its rows have no age"),
        ([*PROFILE, "features", 0], {"kind": "age", "name": "x"}, "feature 'x' of kind 'age' needs events, but source 'people' is static"),
        ([*PROFILE, "features", 0, "type"], "label", r"views\.0\.features\.0\.type: "),
        ([*PROFILE, "features", 1, "column"], "job", "column 'job' is read by 'job' as string and by 'years' as int64; expected one type"),
        (
            [*ACTIVITY, "features", 4, "column"],
            "item_id",
            "column 'item_id' is read by 'items_4' as string and by 'rating_mean' as double; expected one type",
        ),
        ([*ACTIVITY, "features", 4, "column"], "event_time", "column 'event_time' is the entity or a time, not a value"),
        ([*ACTIVITY, "features", 4, "column"], "user_id", "column 'user_id' is the entity or a time, not a value"),
    ],
)
def test_what_is_refused(world: Callable[..., Any], path: list[str | int], value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(FeatureRepo, _change(world().definitions, path, value), source="repo")


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ([*ACTIVITY, "features", 1, "window"], 61, {"user"}),
        ([*ACTIVITY, "features", 2, "where", 0, "value"], 4.5, {"user"}),
        ([*ACTIVITY, "ttl"], 10, {"user"}),
        (["views", 3, "features", 2, "n"], 3, {"item"}),
        (["sources", 0, "table"], "clicks", {"user", "item"}),
        (["sources", 1, "table"], "members", {"user"}),
        (["services", 1, "views"], ["popularity"], set()),
        ([*ACTIVITY, "features", 0, "window"], None, set()),
    ],
)
def test_a_version_changes_with_what_the_service_uses(
    world: Callable[..., Any], path: list[str | int], value: Any, changed: set[str]
) -> None:
    w = world()
    other = FeatureRepo.model_validate(_change(w.definitions, path, value))
    assert {name for name in ("user", "item") if other.version(name) != w.repo.version(name)} == changed


def test_a_version_is_a_hash_of_content_not_of_the_process(world: Callable[..., Any]) -> None:
    w = world()
    assert len(w.repo.version("user")) == 64
    assert FeatureRepo.model_validate_json(w.repo.model_dump_json()).version("user") == w.repo.version("user")


def test_schema(world: Callable[..., Any]) -> None:
    schema = world().repo.schema("user")
    assert schema.names()[:4] == ("job", "years", "likes", "events")
    assert schema.by_name["years"] == Column(name="years", kind=Kind.DENSE, dtype=Dtype.INT)
    assert schema.by_name["likes"].kind is Kind.BAG
    assert str(schema.by_name["events"].arrow) == "int64"
    assert schema.names(Kind.SEQUENCE) == ("items_4", "ratings_4", "elapsed_4", "items_all", "recent_items")
    assert {str(schema.by_name[name].arrow) for name in ("ratings_4", "elapsed_4")} == {"list<item: double>"}
    assert set(schema.names(Kind.DENSE)) >= {"events", "rating_mean", "amount_300", "age", "recent_rating"}


def test_unknown_names_when_asked(world: Callable[..., Any]) -> None:
    repo = world().repo
    assert repo.entity("item") == "item_id"
    with pytest.raises(ConfigError, match="unknown feature service 'items'; did you mean 'item'"):
        repo.schema("items")
    with pytest.raises(ConfigError, match="unknown view 'activty'; did you mean 'activity'"):
        repo.view_version("activty")
