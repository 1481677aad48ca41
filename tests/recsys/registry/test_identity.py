# SPDX-License-Identifier: Apache-2.0
"""A rollback brings back the very answers: the same requests, of the restored bundle, have the same ids and the same bits of scores."""

import shutil
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.core.errors import BundleError
from recsys.core.files import read_json, write_json
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request
from recsys.registry import Bound, Location, Registry, load
from tests.recsys.registry.small import BETTER, promote, register

AT = datetime(2030, 1, 1, tzinfo=UTC)
USERS = [str(user) for user in range(0, 60, 4)] + ["never seen"]
GATES = (Bound(metric="ranking.ranker.auc", at_least=0.1),)

Answers = list[tuple[list[str], bytes]]


@pytest.fixture(scope="module")
def registry(tiny_run, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two bundles of the same run, of which the second ranks otherwise."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "home").mkdir()
    shutil.copy(mlflow_database, folder / "home" / "mlflow.db")
    registry = Registry(Location.under(folder / "home"))
    first = tiny_run.directory / "bundle"
    other = Bundle.load(first)
    weight = other.settings.rank_weight + 3.0
    other.settings = other.settings.model_copy(update={"rank_weight": weight})
    other.save(folder / "other")
    for directory in (first, folder / "other"):
        register(registry, directory)
    return registry


@pytest.fixture
def answer(tiny_run, registry: Registry) -> Callable[[], Answers]:
    """What the champion answers, with time and features as they were."""

    def ask() -> Answers:
        bundle = load("models:/m@champion", registry.location)
        store = SQLiteStore.open(Location.under(tiny_run.home).online_store(bundle.manifest.feature_versions))
        recommender = Recommender(bundle, OnlineReader(parse(FeatureRepo, bundle.features, source="features.json"), store))
        try:
            responses = recommender.recommend([Request(user_id=user, k=10, at=AT) for user in USERS])
        finally:
            store.close()
        return [([i.item_id for i in r.items], struct.pack(f"<{len(r.items)}d", *(i.score for i in r.items))) for r in responses]

    return ask


def test_after_a_rollback_the_answers_are_those_of_before_to_the_bit(registry: Registry, answer: Callable[[], Answers]) -> None:
    promote(registry, 1, None, None, GATES)
    before, sha256 = answer(), registry.log.champion("m").sha256
    promote(registry, 2, 1, BETTER, GATES)
    meanwhile = answer()
    assert meanwhile != before
    registry.rollback("m", reason="x")
    assert answer() == before
    assert load("models:/m@champion", registry.location).manifest.sha256 == sha256
    registry.rollback("m", reason="x")
    assert answer() == meanwhile, "and forth again"


def test_a_tampered_champion_is_not_loaded(registry: Registry) -> None:
    stored = registry.download("m", registry.log.champion("m").to_version)
    content = read_json(stored / "settings.json")
    modes = {path: path.stat().st_mode for path in (stored, stored / "settings.json")}
    for path in modes:
        path.chmod(0o755)
    write_json(stored / "settings.json", content | {"candidates": 7})
    try:
        with pytest.raises(BundleError, match=r"settings\.json was changed"):
            registry.load("models:/m@champion")
    finally:
        write_json(stored / "settings.json", content)
        for path, mode in modes.items():
            path.chmod(mode)
    assert registry.load("models:/m@champion")[0].settings.candidates == content["candidates"]
