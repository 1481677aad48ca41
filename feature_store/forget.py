# SPDX-License-Identifier: Apache-2.0
"""Erasing an entity, such as a user, from what the feature store keeps: online stores and the parts of served logs.

Neither a store nor a part says of which kind of entity its rows are, and a user and an item may have the same id. The definitions say it,
so those of every version that is found must be given.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from feature_store.compiled import compile_view
from feature_store.definitions import FeatureRepo
from feature_store.online.base import OnlineStore
from feature_store.served import ENTITY, PART, SERVICE, VERSION, read_served
from recsys.core.errors import DataError
from recsys.core.part_log import drop_rows, part_files, remove_leftovers


@dataclass(frozen=True)
class ForgottenOnline:
    """What `forget_online` found.

    Attributes:
        views: that held the entity, which they do no longer.
        keep: views of other entities that hold ids of this kind among their values. They are left as they are: only a full
            materialisation from tables without the entity makes them forget.
    """

    views: tuple[str, ...]
    keep: tuple[str, ...]


def forget_online(store: OnlineStore, repos: Iterable[FeatureRepo], key: str, entity: str, *, what: str) -> ForgottenOnline:
    """Erase an entity from an online store.

    Args:
        store: opened for writing.
        repos: definitions, among which are those of all that the store holds.
        key: the key column of this kind of entity, such as ``user_id``.
        entity: its id.
        what: to call the store in errors.

    Raises:
        DataError: the store holds a view that no definition explains; nothing was erased.
        FeatureStoreError: the store cannot be written.
    """
    known = {(view.name, repo.view_version(view.name)): compile_view(repo, view.name) for repo in repos for view in repo.views}
    with store.snapshot() as snapshot:
        held = {name: known.get((name, state.version)) for name, state in snapshot.states().items()}
    own, keep = [], []
    for name, view in held.items():
        if view is None:
            raise DataError(f"{what}: no known definition explains view {name!r}; name the recipe that it was materialised with")
        if view.view.entity == key:
            own.append(name)
        elif key in view.stored.names:
            keep.append(name)
    return ForgottenOnline(store.forget(own, entity), tuple(keep))


def forget_served(folder: Path, repos: Iterable[FeatureRepo], key: str, entity: str) -> int:
    """Take an entity's rows out of the parts of a served log; how many there were.

    Args:
        folder: of a `feature_store.served.ServedLog`.
        repos: definitions, among which are those of all that was served.
        key: the key column of this kind of entity.
        entity: its id.

    Raises:
        DataError: a part is damaged, or holds a service that no definition explains; names the file.
    """
    known = {(service.name, repo.version(service.name)): repo.entity(service.name) for repo in repos for service in repo.services}
    remove_leftovers(folder)
    return sum(drop_rows(path, partial(_rows_of, path=path, known=known, key=key, entity=entity)) for path in _whole(folder))


def _whole(folder: Path) -> list[Path]:
    """The parts, each of which is one: a damaged or foreign file is named before any other is rewritten."""
    files = part_files(folder)
    for path in files:
        read_served(path)
    return files


def _rows_of(part: pa.Table, path: Path, known: dict[tuple[str, str], str], key: str, entity: str) -> np.ndarray:
    """bool ``[N]``: the rows of a part that are the entity's."""
    mine = np.zeros(part.num_rows, bool)
    rows = zip(*(part.column(name).to_pylist() for name in (SERVICE, VERSION, ENTITY)), strict=True)
    for place, (service, version, found) in enumerate(rows):
        if found != entity:
            continue
        if (service, version) not in known:
            raise DataError(f"{PART} {path}: no known definition explains service {service!r} of version {version[:12]}")
        mine[place] = known[service, version] == key
    return mine
