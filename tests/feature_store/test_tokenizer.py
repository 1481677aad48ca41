# SPDX-License-Identifier: Apache-2.0
"""FS-13: a history of codes says of which tokenizer, and a model of another one is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from feature_store.definitions import FeatureRepo
from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json

STAMPED = (1, 8)  # items_4 of the view activity


def _stamp(w: Any, *stamps: tuple[int, int, str | None]) -> dict[str, Any]:
    definitions: dict[str, Any] = copy.deepcopy(w.definitions)
    for view, feature, stamp in stamps:
        definitions["views"][view]["features"][feature]["tokenizer"] = stamp
    return definitions


def test_versions_tell_tokenizers_apart_and_older_ones_stay(world: Callable[..., Any]) -> None:
    w = world()
    repos = [FeatureRepo.model_validate(_stamp(w, (*STAMPED, stamp))) for stamp in ("abc", "xyz", None)]
    assert len({repo.version("user") for repo in repos}) == 3
    assert repos[2].version("user") == w.repo.version("user") and repos[0].version("item") == w.repo.version("item")
    # As the version of a view was made before there was `tokenizer`.
    dump = w.repo.view("recent").model_dump(mode="json")
    assert "tokenizer" not in dump["features"][3]
    source = w.repo.source("events").model_dump(mode="json")
    assert w.repo.view_version("recent") == sha256_json({"semantics": 1, "view": dump, "source": source})
    assert FeatureRepo.model_validate_json(repos[0].model_dump_json()) == repos[0]


def test_the_stamp_is_on_the_column_offline_and_online(world: Callable[..., Any]) -> None:
    w = world(1)
    repo = FeatureRepo.model_validate(_stamp(w, (*STAMPED, "abc")))
    store = MemoryStore()
    materialize(repo, w.tables, store)
    for reader in (OfflineReader(repo, w.tables), OnlineReader(repo, store)):
        schema = reader.read("user", w.spine("user", 5)).schema
        assert schema.field("items_4").metadata == {b"tokenizer": b"abc"}
        assert {field.name for field in schema if field.metadata} == {"items_4"}


def test_a_model_of_another_tokenizer_is_refused(world: Callable[..., Any]) -> None:
    w = world(2)
    repo = FeatureRepo.model_validate(_stamp(w, (*STAMPED, "abc")))
    assert (repo.tokenizer("user"), repo.tokenizer("item")) == ("abc", None)
    store, spine = MemoryStore(), w.spine("user", 5)
    materialize(repo, w.tables, store)
    for reader in (OfflineReader(repo, w.tables), OnlineReader(repo, store)):
        assert reader.read("user", spine, tokenizer="abc").equals(reader.read("user", spine))
        with pytest.raises(ConfigError, match="service 'user': its histories are codes of the tokenizer abc, but the model expects xyz"):
            reader.read("user", spine, tokenizer="xyz")
        reader.read("item", w.spine("item", 5), tokenizer="xyz")  # whose histories hold no codes


def test_one_service_has_one_tokenizer(world: Callable[..., Any]) -> None:
    w = world()
    with pytest.raises(ConfigError, match=r"services\.0\.views: histories of one service must share a tokenizer, got abc, xyz"):
        parse(FeatureRepo, _stamp(w, (*STAMPED, "abc"), (2, 3, "xyz")), source="repo")
    assert FeatureRepo.model_validate(_stamp(w, (*STAMPED, "abc"), (2, 3, "abc"))).tokenizer("user") == "abc"
    with pytest.raises(ConfigError, match="tokenizer: String should have at least 1 character"):
        parse(FeatureRepo, _stamp(w, (*STAMPED, "")), source="repo")
