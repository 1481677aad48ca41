# SPDX-License-Identifier: Apache-2.0
"""Gates and evidence of a version that was judged before, so that it moves on without the pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from recsys.bundle.bundle import Bundle
from recsys.core.errors import RegistryError
from recsys.core.files import read_json
from recsys.registry.evidence import Evidence
from recsys.registry.gates import Gate, ParityBound
from recsys.registry.gates.measuring import parity
from recsys.registry.gates.parity import replay_own
from recsys.registry.gates.served import PARITY
from recsys.registry.store import Store

_GATES: TypeAdapter[tuple[Gate, ...]] = TypeAdapter(tuple[Gate, ...])


def recorded_gates(store: Store, model: str, version: int) -> tuple[Gate, ...]:
    """The gates of the recipe that a bundle was made by.

    Raises:
        RegistryError: they are not gates of today.
    """
    manifest = store.artifacts.manifest(store.version(model, version).source, store.sha256(model, version))
    try:
        return _GATES.validate_python(manifest["recipe"].get("gates", []))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RegistryError(f"{model}: version {version}: recipe.gates.{where}: {first['msg']}, got {first['input']!r}") from None


def with_parity(evidence: Evidence, gates: Sequence[Gate], decisions: Path | None) -> Evidence:
    """The evidence with the parity of a bundle as it is measured now, where a gate asks for it.

    What is recorded of it stays, unless a decision log is given.

    Raises:
        BundleError: the bundle is incomplete or was changed.
        DataError: the log is damaged.
    """
    wanted = any(isinstance(gate, ParityBound) for gate in gates)
    if not wanted or (decisions is None and PARITY in evidence.measured):
        return evidence
    replayed = None if decisions is None else partial(replay_own, folder=decisions)
    found = parity(Bundle.load(evidence.directory), replayed)
    return evidence if found is None else replace(evidence, measured={**evidence.measured, PARITY: found})


def recorded_evidence(store: Store, model: str, version: int, champion: int | None) -> Evidence:
    """What the log holds of the last judgement of a version beside this champion; without a comparison where there was none."""
    directory = store.download(model, version)
    judged = [
        event
        for event in store.log.events(model)
        if event.to_version == version and "measured" in event.details and event.details["against"] == champion
    ]
    details = judged[-1].details if judged else {"comparison": None, "measured": {}}
    return Evidence(
        directory=directory,
        metrics=read_json(directory / "metrics.json"),
        comparison=details["comparison"],
        champion=None if champion is None else store.download(model, champion),
        measured=details["measured"],
    )
