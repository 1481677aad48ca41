# SPDX-License-Identifier: Apache-2.0
"""Removing what nothing refers to: old bundles with their MLflow versions, online stores, downloads, and what was compiled from bundles.

Kept are, of every registered model, the champion, the previous one, the canary, the shadow, what the last promotion names, and the last
versions that were registered; and whatever those need. A version is written off in the log before its files go, so that nobody promotes
what is half gone, and its record in MLflow goes last, so that a run that was killed is taken up by the next one.
"""

import getpass
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.core.errors import RegistryError
from recsys.registry.artifacts import remove
from recsys.registry.events import Entry
from recsys.registry.location import Location
from recsys.registry.states import Standing, State
from recsys.registry.store import Store

_STORE_SUFFIX, _SIDECARS = ".sqlite", ("-wal", "-shm", "-journal")


@dataclass(frozen=True)
class Garbage:
    """What was removed, or would be.

    Attributes:
        kind: ``bundle``, ``online store``, ``download`` or ``compiled``.
        name: a model with a version, or the name of a file or folder.
        bytes: that it takes.
    """

    kind: str
    name: str
    bytes: int


@dataclass(frozen=True)
class _Model:
    """A registered model's versions, divided, and the log's last event when that was done."""

    name: str
    kept: list[Any]
    others: list[Any]
    standing: Standing


@dataclass(frozen=True)
class _Needed:
    """What the kept versions need."""

    sources: set[str]
    bundles: set[str]
    stores: set[Path]


def collect(store: Store, keep: int, *, dry_run: bool = False, actor: str | None = None) -> Iterator[Garbage]:
    """Remove what nothing refers to; each thing is given once it is gone. Nothing is removed where a kept bundle cannot be read.

    Do not call it while a pipeline is between its online store and its registration: the store of a bundle that is not registered is one
    that nothing refers to.

    Args:
        store: the registry.
        keep: how many of the last registered versions of each model stay.
        dry_run: tells what would go, and changes nothing.
        actor: for the log; the user of this process by default.

    Raises:
        RegistryError: ``keep`` is below 1, a kept bundle cannot be read, or the log has gone on meanwhile.
    """
    if keep < 1:
        raise RegistryError(f"keep: expected at least 1, since the last version may not have been judged yet; got {keep}")
    models = [_divide(store, name, keep) for name in store.models()]
    for model in models:
        if not dry_run:
            store.project(model.name)  # an alias that a crash left behind the log
    needed = _needed(store, models)
    sources = set(needed.sources)
    for model in models:
        for record in model.others:
            yield _bundle(store, model, record, shared=record.source in sources, dry_run=dry_run, actor=actor or getpass.getuser())
            sources.add(record.source)
    for kind, path in _local(store.location, needed):
        garbage = Garbage(kind, path.name, _bytes(path))
        if not dry_run:
            _remove(path)
        yield garbage


def _divide(store: Store, name: str, keep: int) -> _Model:
    standing, records = store.log.standing(name), store.versions(name)
    alive = [record for record in records if int(record.version) not in standing.removed]
    wanted = {int(record.version) for record in alive[-keep:]} | {standing.champion, standing.previous}
    wanted |= {standing.only(State.CANARY), standing.only(State.SHADOW)}
    champion = store.log.champion(name)
    if champion is not None:
        wanted |= {champion.from_version, champion.to_version}
    kept = [record for record in alive if int(record.version) in wanted]
    return _Model(name, kept, [record for record in records if record not in kept], standing)


def _needed(store: Store, models: list[_Model]) -> _Needed:
    needed = _Needed(set(), set(), set())
    for model in models:
        for record in model.kept:
            sha256 = store.sha256(model.name, int(record.version))
            manifest = store.artifacts.manifest(record.source, sha256)
            needed.sources.add(record.source)
            needed.bundles.add(sha256)
            needed.stores.add(store.location.online_store(manifest["feature_versions"]))
    return needed


def _bundle(store: Store, model: _Model, record: Any, *, shared: bool, dry_run: bool, actor: str) -> Garbage:
    """Remove one version: from the log's choices, then its files, unless another version has the same, then MLflow's record."""
    version = int(record.version)
    garbage = Garbage("bundle", f"{model.name}/{version}", 0 if shared else store.artifacts.size(record.source))
    if dry_run:
        return garbage
    if version not in model.standing.removed:
        entry = Entry("remove", version, store.sha256(model.name, version), "nothing refers to it")
        (event,) = store.log.append(model.name, entry, actor=actor, after=model.standing.latest)
        model.standing.apply(event.id, event.action, version)
    if not shared:
        store.artifacts.delete(record.source)
    store.forget(model.name, version)
    return garbage


def _local(location: Location, needed: _Needed) -> Iterator[tuple[str, Path]]:
    """What is on this machine and not needed."""
    for path in _children(location.online):
        if path.suffix == _STORE_SUFFIX and path not in needed.stores:
            yield "online store", path
    for kind, folder in (("download", location.cache), ("compiled", location.compiled)):
        for path in _children(folder):
            if path.name not in needed.bundles:
                yield kind, path


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _parts(path: Path) -> list[Path]:
    """A path and what SQLite keeps beside a database of this name, which goes first, so that it is not left alone."""
    return [*(path.with_name(path.name + suffix) for suffix in _SIDECARS), path] if path.suffix == _STORE_SUFFIX else [path]


def _bytes(path: Path) -> int:
    files = [file for part in _parts(path) for file in (part, *part.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _remove(path: Path) -> None:
    for part in _parts(path):
        remove(part)
