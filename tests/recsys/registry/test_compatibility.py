# SPDX-License-Identifier: Apache-2.0
"""Clients of the champion can go on with the candidate, or the gate says which field stops them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from recsys.bundle.manifest import MANIFEST, verify
from recsys.bundle.signature import Signature, signature_of
from recsys.core.files import read_json, write_json
from recsys.registry import Evidence, run_gates
from recsys.registry.gates import SchemaCompatibility
from recsys.registry.gates.compatibility import additions, breaks

THEIRS = Signature(
    tasks=("like", "buy"), services={"user": "user_id", "item": "item_id"}, request={"device": "categorical"}, item_id="string"
)


def changed(**fields: Any) -> Signature:
    return THEIRS.model_copy(update=fields)


@pytest.mark.parametrize(
    ("ours", "broken"),
    [
        (THEIRS, []),
        (changed(tasks=("buy", "like", "share")), []),
        (changed(services={**THEIRS.services, "seen": "user_id"}), []),
        (changed(request={**THEIRS.request, "country": "categorical"}), []),
        (changed(tasks=("like",)), ["tasks.buy: is gone"]),
        (changed(services={"user": "user_id"}), ["services.item: is gone"]),
        (changed(services={**THEIRS.services, "user": "account"}), ["services.user: its entity key was user_id, is account"]),
        (changed(request={}), ["request.device: is gone"]),
        (changed(request={"device": "dense of int"}), ["request.device: its type was categorical, is dense of int"]),
        (changed(item_id="int64"), ["item_id: its type was string, is int64"]),
    ],
)
def test_additions_pass_and_removals_and_changes_do_not(ours: Signature, broken: list[str]) -> None:
    assert breaks(ours, THEIRS) == broken
    assert bool(additions(ours, THEIRS)) == (ours != THEIRS and not broken)


def test_the_signature_is_read_off_the_definitions() -> None:
    features = {
        "sources": [{"name": "log", "kind": "events"}, {"name": "request", "kind": "request"}],
        "views": [
            {"name": "activity", "source": "log", "entity": "user_id", "features": [{"kind": "count", "name": "n"}]},
            {
                "name": "context",
                "source": "request",
                "entity": "user_id",
                "features": [
                    {"kind": "attribute", "name": "device", "column": "device_name", "type": "categorical", "dtype": None},
                    {"kind": "attribute", "name": "width", "column": "width", "type": "dense", "dtype": "int"},
                    {"kind": "clock", "name": "hour", "unit": "hour"},
                ],
            },
        ],
        "services": [{"name": "user", "views": ["activity", "context"]}],
    }
    assert signature_of(features, ["like"]) == Signature(
        tasks=("like",), services={"user": "user_id"}, request={"device_name": "categorical", "width": "dense of int"}, item_id="string"
    )


@pytest.fixture
def champion(tiny_run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.directory / "bundle", tmp_path / "champion"))


def with_signature(directory: Path, **fields: Any) -> Path:
    content = read_json(directory / MANIFEST)
    content["signature"] |= fields
    write_json(directory / MANIFEST, content)
    return directory


def test_bundles_are_compared_by_what_their_manifests_say(tiny_run, champion: Path) -> None:
    candidate, gates = tiny_run.directory / "bundle", (SchemaCompatibility(),)
    found = verify(candidate).signature
    assert found.tasks == ("like",) and found.services == {"user": "user_id", "item": "item_id", "seen": "user_id"}
    (result,) = run_gates(gates, Evidence.of(candidate, {}, champion))
    assert result.passed and result.value == 0 and result.note == ""
    with_signature(champion, tasks=["like", "buy"])
    (result,) = run_gates(gates, Evidence.of(candidate, {}, champion))
    assert not result.passed and result.value == 1 and result.note == "tasks.buy: is gone"
    with_signature(champion, tasks=[])
    (result,) = run_gates(gates, Evidence.of(candidate, {}, champion))
    assert result.passed and result.note == "new: tasks.like"


def test_a_champion_that_cannot_be_read_fails_the_gate(tiny_run, champion: Path) -> None:
    (champion / "settings.json").unlink()
    (result,) = run_gates((SchemaCompatibility(),), Evidence.of(tiny_run.directory / "bundle", {}, champion))
    assert not result.passed and "settings.json is absent" in result.note
