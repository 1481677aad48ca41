# SPDX-License-Identifier: Apache-2.0
"""What every index over a catalogue offers, and what all of them hold to: which rows may come back, and which belongs together."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.config import parse
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import read_json, write_json
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue.live import CatalogueView

Exclude: TypeAlias = JaggedTensor | tuple[np.ndarray, np.ndarray]
Array: TypeAlias = np.ndarray | torch.Tensor

INDEX_FILE = "index.json"
_SCORES_AT_ONCE = 1 << 22


class IndexMeta(BaseConfig):
    """What an index was built from, kept beside its content.

    Attributes:
        accepts: the names of the user states that it searches with.
        content_hash: what its content came from: the retriever whose item vectors these are, or the tokenizer whose codes.
        rows: the catalogue's N.
        width: numbers held for each row: K · d, or the number of codes.
        catalogue_version: number of the catalogue's version; live bits may change later.
        ids_digest: the ids by row; these may not.
    """

    accepts: tuple[str, ...]
    content_hash: str
    rows: int
    width: int
    catalogue_version: int
    ids_digest: str


@dataclass(frozen=True)
class Excluded:
    """Pairs (query, row) that must not come back: distinct, sorted by query, then row; int64 ``[E]`` each."""

    query: np.ndarray
    row: np.ndarray

    def of(self, queries: np.ndarray, batch: int) -> "Excluded":
        """The pairs of these queries (ascending), numbered by their places in ``queries``."""
        place = np.full(batch, -1, np.int64)
        place[queries] = np.arange(len(queries))
        chosen = place[self.query] >= 0
        return Excluded(place[self.query[chosen]], self.row[chosen])


class Index(ABC):
    """An index over all rows of a catalogue; registered with ``@register("index", name)``.

    Ties are broken by row: the order of a list is score descending, then row ascending.

    Args:
        config: the subclass's own.
        meta: what the content was made from.

    Attributes:
        accepts: the user states that it searches with.
    """

    accepts: ClassVar[tuple[type, ...]]
    Config: ClassVar[type[BaseConfig]]

    def __init__(self, config: BaseConfig, meta: IndexMeta) -> None:
        self.config, self.meta = config, meta

    @classmethod
    @abstractmethod
    def over(cls, config: Any, retriever: Retriever, view: CatalogueView) -> Self:
        """An index over what a retriever has of a catalogue's items.

        Raises:
            ConfigError: the retriever has none of what this index holds, or the configuration does not fit it.
            DataError: it has not one for each row of the catalogue.
        """

    @abstractmethod
    def search(
        self, state: Any, k: int, view: CatalogueView, exclude: Exclude | None = None, scorable: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best live items of each user, without those to be excluded.

        Args:
            state: B users, of one of the classes in ``accepts``.
            k: length of the lists, at least 1.
            view: the catalogue; only its live rows come back.
            exclude: rows not wanted for each user: a jagged tensor, or ``(values [E], offsets [B + 1])``. Repeats are harmless; -1
                (an unknown item) excludes nothing.
            scorable: bool ``[N]``: rows that the model can score at all, such as those of items that it was trained on; default all.

        Returns:
            ``(rows int64 [B, k], scores float32 [B, k])``, best first. Wherever k such items exist, k come back; otherwise the rest is
            filled with row -1 and score -inf.

        Raises:
            ConfigError: the state is of another class, or does not fit what the index holds.
            BundleError: the view is not of the catalogue that the index was built for.
            DataError: k, ``exclude`` or ``scorable`` is malformed, or the state is not finite.
        """

    @abstractmethod
    def score(self, state: Any, rows: np.ndarray) -> np.ndarray:
        """float32 ``[B, C]``: the scores of given catalogue rows ``[B, C]``, live or not; -inf for the row -1.

        Raises:
            ConfigError: as for `search`.
            DataError: there are not as many lists as users, or a row is not one of the catalogue's.
        """

    @abstractmethod
    def log_partition(self, state: Any, view: CatalogueView, scorable: Array | None = None) -> np.ndarray:
        """float32 ``[B]``: what turns a score into the log-probability of an item among the live (and scorable) ones, when subtracted.

        For independent slots that is ``log Σ_i exp s(u, i)``; -inf where there is no such item. Errors as for `search`.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write ``directory``, whole or not at all.

        Raises:
            FileExistsError: it is there already.
        """

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, view: CatalogueView, *, content_hash: str | None = None, mmap: bool = False) -> Self:
        """Read what `save` wrote, and hold that it fits.

        Args:
            directory: the index's directory.
            view: the catalogue that it is to be searched with. Its live bits may have changed since, its rows not.
            content_hash: what the content must have come from, where it is to be compared.
            mmap: use the file's own pages for what is only read, where the index has a form for that.

        Raises:
            BundleError: files are absent or broken, or belong to another state, content or catalogue; names both sides.
        """

    @classmethod
    def _meta(cls, view: CatalogueView, content_hash: str, width: int) -> IndexMeta:
        return IndexMeta(
            accepts=tuple(state.__name__ for state in cls.accepts),
            content_hash=content_hash,
            rows=view.count,
            width=width,
            catalogue_version=view.version.number,
            ids_digest=view.ids_digest,
        )

    def _save_meta(self, root: Path) -> None:
        write_json(root / INDEX_FILE, {"config": self.config.model_dump(mode="json"), "meta": self.meta.model_dump(mode="json")})

    @classmethod
    def _load_meta(cls, directory: Path, view: CatalogueView, content_hash: str | None) -> tuple[Any, IndexMeta]:
        source = str(directory / INDEX_FILE)
        stored = read_json(directory / INDEX_FILE)
        config, meta = parse(cls.Config, stored["config"], source=source), parse(IndexMeta, stored["meta"], source=source)
        same(directory, "user state", meta.accepts, tuple(state.__name__ for state in cls.accepts))
        same(directory, "content", meta.content_hash, meta.content_hash if content_hash is None else content_hash)
        check_view(meta, view, str(directory))
        return config, meta

    def _require(self, state: Any) -> None:
        if not isinstance(state, self.accepts):
            names = " or ".join(accepted.__name__ for accepted in self.accepts)
            raise ConfigError(f"index {vars(self.config)['name']!r} accepts {names}, got {type(state).__name__}")

    def _allowed(self, view: CatalogueView, scorable: Array | None) -> np.ndarray:
        """bool ``[N]``: the rows that may come back."""
        check_view(self.meta, view, f"index {vars(self.config)['name']!r}")
        if scorable is None:
            return view.live
        mask = host(scorable)
        if mask.shape != view.live.shape or mask.dtype != np.bool_:
            raise DataError(f"scorable: expected bool [{view.count}], got {mask.dtype} {list(mask.shape)}")
        allowed: np.ndarray = view.live & mask
        return allowed

    def _excluded(self, exclude: Exclude | None, batch: int, allowed: np.ndarray) -> Excluded:
        """The distinct pairs to exclude, without those that cannot come back anyway."""
        if exclude is None:
            return Excluded(np.zeros(0, np.int64), np.zeros(0, np.int64))
        values, offsets = (exclude.values(), exclude.offsets()) if isinstance(exclude, JaggedTensor) else exclude
        values, offsets = host(values).astype(np.int64), host(offsets).astype(np.int64)
        lengths = np.diff(offsets)
        if len(offsets) != batch + 1 or offsets[0] != 0 or offsets[-1] != len(values) or (lengths < 0).any():
            raise DataError(f"exclude: expected {batch + 1} ascending offsets from 0 to {len(values)}, got {offsets[:3]}...{offsets[-1:]}")
        self._check_rows("exclude", values)
        query = np.repeat(np.arange(batch), lengths)
        kept = values >= 0
        kept[kept] = allowed[values[kept]]
        pairs = np.unique(query[kept] * len(allowed) + values[kept])
        return Excluded(pairs // max(len(allowed), 1), pairs % max(len(allowed), 1))

    def _check_lists(self, rows: np.ndarray, batch: int) -> np.ndarray:
        """int64 ``[B, C]`` catalogue rows, as `score` takes them."""
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 2 or len(rows) != batch:
            raise DataError(f"rows: expected shape [{batch}, C], got {list(rows.shape)}")
        self._check_rows("rows", rows)
        return rows

    def _check_rows(self, name: str, rows: np.ndarray) -> None:
        wrong = (rows < -1) | (rows >= self.meta.rows)
        if wrong.any():
            raise DataError(f"{name}: {rows[wrong][0]} is not a catalogue row: expected -1 to {self.meta.rows - 1}")


def check_k(k: int) -> None:
    """Hold that a list has a length."""
    if k < 1:
        raise DataError(f"k: expected at least 1, got {k}")


def check_view(meta: IndexMeta, view: CatalogueView, where: str) -> None:
    """Hold that a catalogue has the rows that an index was built for."""
    if view.count != meta.rows:
        raise BundleError(f"{where}: built for {meta.rows} catalogue rows, but the catalogue has {view.count}: build it anew")
    same(where, "catalogue ids", meta.ids_digest, view.ids_digest)


def same(where: object, what: str, got: object, expected: object) -> None:
    """Hold that an index has what is expected of it."""
    if got != expected:
        raise BundleError(f"{where}: {what}: the index has {got}, expected {expected}")


def host(values: Array) -> np.ndarray:
    """An array on the host."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def matrix(values: Array, name: str) -> np.ndarray:
    """A finite float32 C-contiguous matrix on the host."""
    found = np.ascontiguousarray(host(values.float() if isinstance(values, torch.Tensor) else values), np.float32)
    if found.ndim != 2:
        raise DataError(f"{name}: expected 2 dimensions, got shape {list(found.shape)}")
    finite = np.isfinite(found).all(axis=1)
    if not finite.all():
        raise DataError(f"{name}: row {int(np.argmin(finite))} is not finite")
    return found


def parts(indices: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Cut ``indices`` so that ``len(part) * width`` stays bounded."""
    size = max(1, _SCORES_AT_ONCE // max(width, 1))
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
