# SPDX-License-Identifier: Apache-2.0
"""Gates and evidence of a version that was judged before, so that it moves on without the pipeline."""

from pydantic import TypeAdapter, ValidationError

from recsys.core.errors import RegistryError
from recsys.core.files import read_json
from recsys.registry.evidence import Evidence
from recsys.registry.gates import Gate
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
