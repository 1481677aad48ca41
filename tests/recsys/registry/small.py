# SPDX-License-Identifier: Apache-2.0
"""Bundles that hold no models: what the registry needs of one, and no more."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recsys.bundle.manifest import MANIFEST, PARTS, Manifest, hash_files
from recsys.bundle.signature import Signature
from recsys.core.files import write_json
from recsys.registry import AgainstChampion, Bound, Event, Evidence, Gate, GateResult, Registry
from recsys.training.tracking import start_run

GATE = Bound(metric="auc", at_least=0.5)
NOT_WORSE = AgainstChampion(metric="ndcg")
BETTER = {"ndcg": {"estimate": 0.1, "low": 0.05, "high": 0.15}}
WORSE = {"ndcg": {"estimate": -0.1, "low": -0.15, "high": -0.05}}


def write_bundle(directory: Path, *, auc: float = 0.7, features: str = "f", gates: tuple[Gate, ...] = (GATE, NOT_WORSE)) -> Manifest:
    """A directory that `verify` accepts."""
    for name in PARTS:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(bytes(100))
    write_json(directory / "metrics.json", {"auc": auc})
    manifest = Manifest(
        name="m",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        code_commit="unknown",
        data_snapshot="d",
        feature_versions={"user": features},
        encoder="e",
        tokenizer=None,
        signature=Signature(tasks=("like",), services={"user": "user_id"}, request={}, item_id="string"),
        seed=0,
        environment={},
        recipe={"gates": [gate.model_dump() for gate in gates]},
        files=hash_files(directory),
    )
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def register(registry: Registry, directory: Path, model: str = "m") -> int:
    """From a run of its own."""
    with start_run(registry.location.tracking_uri, registry.location.artifacts, "e", "r") as tracker:
        return registry.register(directory, model, tracker.run_id)


def evidence(comparison: Mapping[str, Mapping[str, float]] | None = None, directory: Path = Path()) -> Evidence:
    """What a caller gives; the registry looks at its own bundles."""
    return Evidence(directory, {}, comparison, None, {})


def promote(
    registry: Registry, version: int, expected: int | None, comparison: Any = None, gates: tuple[Gate, ...] = (GATE,), **more: Any
) -> tuple[Event, list[GateResult]]:
    """Version ``version`` of the model m."""
    return registry.promote("m", version, gates=gates, evidence=evidence(comparison), expected=expected, **{"actor": "test", **more})
