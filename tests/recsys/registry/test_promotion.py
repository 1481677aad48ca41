# SPDX-License-Identifier: Apache-2.0
"""Registering, promoting on evidence, loading what the log confirms, and going back."""

import shutil
from pathlib import Path

import pytest

from recsys.core.errors import RegistryError
from recsys.core.files import read_json, write_json
from recsys.registry import AgainstChampion, Bound, Location, Registry, load
from recsys.training.tracking import start_run

GATE = Bound(metric="ranking.tokenmixer_large.auc", at_least=0.1)
BETTER = {"ndcg": {"estimate": 0.1, "low": 0.05, "high": 0.15}}
WORSE = {"ndcg": {"estimate": -0.1, "low": -0.15, "high": -0.05}}


@pytest.fixture(scope="module")
def home(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with three registered versions of one bundle's content."""
    folder = tmp_path_factory.mktemp("registry")
    registry = Registry(Location.under(folder))
    for _ in range(3):
        with start_run(registry.location.tracking_uri, registry.location.artifacts, "e", "r") as tracker:
            registry.register(tiny_run.directory / "bundle", "m", tracker.run_id)
    return folder


@pytest.fixture
def registry(home: Path) -> Registry:
    """The registry with an empty log."""
    (home / "promotions.db").unlink(missing_ok=True)
    return Registry(Location.under(home))


def promote(registry: Registry, version: int, expected: int | None, gates=(GATE,), comparison=None):
    return registry.promote("m", version, gates=gates, comparison=comparison, expected=expected, actor="test")


def test_promote_refuse_roll_back_and_load(registry: Registry, home: Path) -> None:
    promote(registry, 1, None)
    assert registry.resolve("models:/m@champion")[1] == 1
    event, results = promote(registry, 2, 1, gates=(Bound(metric="ranking.tokenmixer_large.auc", at_least=2),), comparison=BETTER)
    assert event.action == "refuse"
    assert "failed gates: ranking.tokenmixer_large.auc" in event.reason
    assert not results[0].passed
    assert registry.resolve("models:/m@champion")[1] == 1
    promote(registry, 2, 1, comparison=BETTER)
    assert (registry.resolve("models:/m@champion")[1], registry.resolve("models:/m@previous")[1]) == (2, 1)
    registry.rollback("m", actor="test", reason="because")
    assert registry.resolve("models:/m@champion")[1] == 1
    bundle = load("models:/m@champion", Location.under(home))
    assert bundle.manifest.sha256 == registry.log.champion("m").sha256
    assert [e.action for e in registry.log.events("m")] == ["promote", "refuse", "promote", "rollback"]


def test_a_champion_is_compared_with(registry: Registry) -> None:
    gates = (AgainstChampion(metric="ndcg"),)
    assert promote(registry, 1, None, gates)[0].action == "promote"
    with pytest.raises(RegistryError, match="must be compared with it"):
        promote(registry, 2, 1, gates)
    assert promote(registry, 2, 1, gates, WORSE)[0].action == "refuse"
    assert promote(registry, 3, 1, gates, BETTER)[0].action == "promote"


def test_an_alias_moved_by_hand_is_refused(registry: Registry) -> None:
    promote(registry, 1, None)
    registry._client.set_registered_model_alias("m", "champion", "3")
    with pytest.raises(RegistryError, match="the alias points at version 3, but the promotion log says 1: refused"):
        registry.load("models:/m@champion")
    registry.project("m")
    assert registry.load("models:/m@champion")[1] == 1


def test_tampered_artifacts_are_refused(registry: Registry) -> None:
    promote(registry, 3, None)
    stored = registry.download("m", 3)
    saved = Path(shutil.copy(stored / "metrics.json", stored.parent / "saved"))
    try:
        write_json(stored / "metrics.json", read_json(stored / "metrics.json") | {"better": 1})
        with pytest.raises(Exception, match=r"metrics\.json was changed"):
            registry.load("models:/m@champion")
    finally:
        shutil.move(saved, stored / "metrics.json")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("m@champion", "expected models:/<name>@<alias> or models:/<name>/<version>"),
        ("models:/m@nothing", "not in the registry"),
        ("models:/other@champion", "not in the registry"),
        ("models:/m/99", "not in the registry"),
    ],
)
def test_addresses_that_name_nothing(registry: Registry, uri: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.resolve(uri)


def test_there_is_nothing_to_go_back_to(registry: Registry) -> None:
    promote(registry, 1, None)
    with pytest.raises(RegistryError, match="there is no previous champion"):
        registry.rollback("m", reason="x")
