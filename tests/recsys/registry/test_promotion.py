# SPDX-License-Identifier: Apache-2.0
"""Registering, promoting on evidence, staging, and going back: what the log, the aliases and MLflow's pages say afterwards."""

import json
import shutil
import time
from pathlib import Path

import pytest

from recsys.bundle.manifest import MANIFEST, Manifest
from recsys.core.errors import BundleError, ConfigError, RegistryError
from recsys.core.files import read_json, write_json
from recsys.registry import Bound, Override, Registry, State
from recsys.training.tracking import start_run
from tests.recsys.registry.small import BETTER, GATE, NOT_WORSE, WORSE, evidence, promote, register, write_bundle

STRICT = Bound(metric="auc", at_least=2)


def aliases(registry: Registry) -> dict[str, int]:
    """As MLflow has them."""
    return {alias: int(version) for alias, version in registry._client.get_registered_model("m").aliases.items()}


def actions(registry: Registry) -> list[tuple[str, int]]:
    """What the log has, without the registrations."""
    return [(event.action, event.to_version) for event in registry.log.events("m") if event.action != "register"]


def test_promote_refuse_and_roll_back(three: Registry) -> None:
    assert promote(three, 1, None)[0].action == "promote"
    event, results = promote(three, 2, 1, BETTER, (STRICT,))
    assert (event.action, event.reason, results[0].passed) == ("refuse", "failed gates: auc", False)
    assert aliases(three) == {"champion": 1}
    promote(three, 2, 1, BETTER)
    assert aliases(three) == {"champion": 2, "previous": 1}
    three.rollback("m", actor="test", reason="because")
    assert aliases(three) == {"champion": 1, "previous": 2}
    assert actions(three) == [
        ("validate", 1),
        ("promote", 1),
        ("refuse", 2),
        ("validate", 2),
        ("promote", 2),
        ("rollback", 1),
    ]


def test_a_second_rollback_undoes_the_first_and_each_is_quick(three: Registry) -> None:
    promote(three, 1, None)
    promote(three, 2, 1, BETTER)
    for expected in (1, 2, 1):
        started = time.perf_counter()
        three.rollback("m", reason="x")
        assert time.perf_counter() - started < 1
        assert three.resolve("models:/m@champion")[1] == expected


def test_there_is_nothing_to_go_back_to(three: Registry) -> None:
    promote(three, 1, None)
    with pytest.raises(RegistryError, match="there is no previous champion"):
        three.rollback("m", reason="x")


def test_a_champion_is_compared_with(three: Registry) -> None:
    assert promote(three, 1, None, None, (NOT_WORSE,))[0].action == "promote"
    with pytest.raises(RegistryError, match="must be compared with it"):
        promote(three, 2, 1, None, (NOT_WORSE,))
    assert promote(three, 2, 1, WORSE, (NOT_WORSE,))[0].action == "refuse"
    event, _ = promote(three, 3, 1, BETTER, (NOT_WORSE,))
    assert (event.action, event.details["comparison"], event.details["against"]) == ("promote", BETTER, 1)
    with pytest.raises(RegistryError, match="expected champion 1, but it is 3"):
        promote(three, 2, 1, BETTER)


def test_the_gates_see_what_is_registered_whatever_the_caller_says(three: Registry, tmp_path: Path) -> None:
    write_bundle(tmp_path / "other", auc=0.99)
    given = evidence(directory=tmp_path / "other")
    _, (result,) = three.promote("m", 1, gates=(GATE,), evidence=given, expected=None)
    assert result.value == 0.61


def test_the_verdict_stands_with_the_version(three: Registry) -> None:
    promote(three, 1, None, None, (STRICT,))
    promote(three, 2, None)
    promote(three, 3, 2, None, (STRICT, NOT_WORSE), override=Override("ann", "the site is down"))
    tags = [three.version("m", version).tags["gates"] for version in (1, 2, 3)]
    assert tags == ["failed", "passed", "overridden"]
    found = three.version("m", 3)
    report = json.loads(Path(three._client.download_artifacts(found.run_id, "gates/m-3.json")).read_text())
    assert [gate["passed"] for gate in report] == [False, False]


def test_an_override_promotes_and_says_so(three: Registry) -> None:
    promote(three, 1, None)
    event, results = promote(three, 2, 1, None, (STRICT, NOT_WORSE), override=Override("ann", "the site is down"))
    assert (event.action, event.actor, event.reason) == ("promote", "ann", "the site is down")
    assert event.details["override"] == {"actor": "ann", "reason": "the site is down", "failed": ["auc", "champion:ndcg"]}
    assert [gate["passed"] for gate in event.gates] == [result.passed for result in results] == [False, False]
    assert aliases(three) == {"champion": 2, "previous": 1}


def test_an_override_that_was_not_needed_is_no_part_of_the_event(three: Registry) -> None:
    event, _ = promote(three, 1, None, override=Override("ann", "to be sure"))
    assert (event.actor, "override" in event.details) == ("test", False)


@pytest.mark.parametrize(
    ("actor", "reason", "named"), [("", "why", "actor"), (" ", "why", "actor"), ("ann", "", "reason"), ("ann", "\n", "reason")]
)
def test_an_override_needs_somebody_and_a_reason(actor: str, reason: str, named: str) -> None:
    with pytest.raises(RegistryError, match=rf"override\.{named}: expected who answers for it and why"):
        Override(actor, reason)


def test_the_whole_road_by_shadow_and_canary(three: Registry) -> None:
    promote(three, 1, None)
    with pytest.raises(RegistryError, match="version 2 is registered: registered → shadow is not legal"):
        three.stage("m", 2, "shadow", reason="x")
    three.validate("m", 2, gates=(GATE, NOT_WORSE), evidence=evidence(BETTER), expected=1)
    assert three.log.state("m", 2) is State.VALIDATED
    three.stage("m", 2, "shadow", reason="x")
    assert aliases(three) == {"champion": 1, "challenger": 2}
    three.stage("m", 2, "canary", percent=5, reason="x")
    three.stage("m", 2, "canary", percent=25, reason="x", details={"requests": 1000})
    assert three.log.canary("m").details == {"requests": 1000, "percent": 25.0}
    assert three.resolve("models:/m@challenger")[1] == 2
    promote(three, 2, 1, BETTER)
    assert aliases(three) == {"champion": 2, "previous": 1}
    assert actions(three)[2:] == [("validate", 2), ("shadow", 2), ("canary", 2), ("canary", 2), ("promote", 2)]


def test_a_canary_is_withdrawn_and_a_version_retired(three: Registry) -> None:
    three.validate("m", 1, gates=(GATE,), evidence=evidence(), expected=None)
    three.stage("m", 1, "canary", percent=1, reason="x")
    event = three.withdraw("m", 1, actor="guardrail", reason="errors", details={"errors": 0.02})
    assert (event.actor, event.details) == ("guardrail", {"errors": 0.02})
    assert (three.log.state("m", 1), aliases(three)) == (State.VALIDATED, {})
    three.retire("m", 1, reason="x")
    assert three.log.state("m", 1) is State.RETIRED
    assert promote(three, 1, None)[0].action == "promote", "it comes back through the gates"


@pytest.mark.parametrize(
    ("to", "percent"), [("canary", None), ("canary", 0), ("canary", 100), ("canary", -1), ("canary", float("nan")), ("shadow", 5)]
)
def test_only_a_canary_has_a_share_of_the_users(three: Registry, to: str, percent: float | None) -> None:
    three.validate("m", 1, gates=(GATE,), evidence=evidence(), expected=None)
    with pytest.raises(RegistryError, match=f"percent: expected .*, got {percent}"):
        three.stage("m", 1, to, percent=percent, reason="x")


def test_a_refused_validation_changes_no_state(three: Registry) -> None:
    event, _ = three.validate("m", 1, gates=(STRICT,), evidence=evidence(), expected=None)
    assert (event.action, three.log.state("m", 1)) == ("refuse", State.REGISTERED)
    assert three.version("m", 1).tags["gates"] == "failed"


def test_the_champion_is_not_promoted_again(three: Registry) -> None:
    promote(three, 1, None)
    with pytest.raises(RegistryError, match="version 1 is champion: champion → champion is not legal"):
        promote(three, 1, 1, BETTER)


@pytest.mark.parametrize("alias", ["champion", "previous", "challenger"])
def test_an_alias_moved_by_hand_is_refused(three: Registry, alias: str) -> None:
    promote(three, 1, None)
    promote(three, 2, 1, BETTER)
    three._client.set_registered_model_alias("m", alias, "3")
    with pytest.raises(RegistryError, match=r"the alias points at version 3, but the promotion log says (2|1|none): refused"):
        three.load(f"models:/m@{alias}")
    three.project("m")
    assert aliases(three) == {"champion": 2, "previous": 1}


def test_an_alias_that_the_log_cannot_confirm_is_refused(three: Registry) -> None:
    three._client.set_registered_model_alias("m", "staging", "3")
    with pytest.raises(RegistryError, match="confirms the aliases champion, previous, challenger only: refused"):
        three.resolve("models:/m@staging")


def test_the_tag_of_a_version_cannot_vouch_for_another_bundle(three: Registry) -> None:
    three._client.set_model_version_tag("m", "3", "bundle_sha256", "0" * 64)
    assert three.resolve("models:/m/3")[2] == three.log.events("m")[2].sha256 != "0" * 64


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("m@champion", "expected models:/<name>@<alias> or models:/<name>/<version>"),
        ("models:/m@nothing", "not in the registry"),
        ("models:/other@champion", "not in the registry"),
        ("models:/m/99", "not in the registry"),
    ],
)
def test_addresses_that_name_nothing(three: Registry, uri: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        three.resolve(uri)


@pytest.mark.parametrize("name", Manifest.model_fields)
def test_a_bundle_whose_manifest_lacks_a_field_is_not_registered(registry: Registry, tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / "bundle")
    content = read_json(tmp_path / "bundle" / MANIFEST)
    if Manifest.model_fields[name].is_required():
        write_json(tmp_path / "bundle" / MANIFEST, {key: value for key, value in content.items() if key != name})
        with pytest.raises(ConfigError, match=f"{name}: is required, but missing"):
            register(registry, tmp_path / "bundle")
        assert registry.models() == []


def test_what_is_registered_is_read_only_and_tampering_is_refused(three: Registry) -> None:
    stored = three.download("m", 1)
    files = [path for path in stored.rglob("*") if path.is_file()]
    assert files and not any(path.stat().st_mode & 0o222 for path in (stored, *files))
    stored.chmod(0o755)
    (stored / "metrics.json").chmod(0o644)
    write_json(stored / "metrics.json", {"auc": 1.0})
    with pytest.raises(BundleError, match=r"metrics\.json was changed"):
        promote(three, 1, None)


def test_another_bundle_in_its_place_is_refused(three: Registry, tmp_path: Path) -> None:
    stored = three.download("m", 1)
    stored.parent.chmod(0o755)
    stored.chmod(0o755)
    shutil.move(stored, tmp_path / "away")
    write_bundle(stored, auc=0.9)
    with pytest.raises(RegistryError, match="was registered: refused"):
        promote(three, 1, None)


def test_one_run_may_register_one_bundle_twice(registry: Registry, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with start_run(registry.location.tracking_uri, registry.location.artifacts, "e", "r") as tracker:
        versions = [registry.register(tmp_path / "bundle", "m", tracker.run_id) for _ in range(2)]
    assert versions == [1, 2]
    assert registry.download("m", 1) == registry.download("m", 2)
    assert promote(registry, 2, None)[0].action == "promote"
