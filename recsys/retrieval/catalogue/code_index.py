# SPDX-License-Identifier: Apache-2.0
"""What the indexes over the codes of items share: a table with a row of codes for each of the catalogue's."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import new_directory
from recsys.retrieval.base import CodeRetriever, Retriever
from recsys.retrieval.catalogue.index import Index, IndexMeta, parts, same
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs

_CODES = "codes.safetensors"


class CodeIndex(Index):
    """An index over a `CodeTable`.

    Args:
        config: the subclass's own.
        table: the codes of all rows.
        meta: what they were made from.
    """

    def __init__(self, config: BaseConfig, table: CodeTable, meta: IndexMeta) -> None:
        super().__init__(config, meta)
        self.table = table

    @classmethod
    def over(cls, config: BaseConfig, retriever: Retriever, view: CatalogueView) -> Self:
        """See `Index.over`."""
        if not isinstance(retriever, CodeRetriever):
            raise ConfigError(f"index {vars(config)['name']!r} holds codes of items, and {type(retriever).__name__} has none")
        return cls.build(config, retriever.table, view)

    @classmethod
    def build(cls, config: BaseConfig, table: CodeTable, view: CatalogueView) -> Self:
        """An index over the codes of a catalogue's rows.

        Raises:
            ConfigError: the configuration does not fit the codes.
            DataError: there is not one row of codes for each of the catalogue's.
        """
        _check_table(table, view)
        return cls(config, table, cls._meta(view, table.tokenizer, table.levels))

    def extended(self, table: CodeTable, view: CatalogueView) -> Self:
        """An index with the rows that were appended since; the present one stays as it is, for those who read it.

        There is no delta beside a main part, as a `DenseIndex` has: the table is the caller's, whole and not copied, and what is made of it
        anew is less work than one search (of 10^6 rows with 4 codes: .02 s to compare the codes, .04 s for the bags, .3 s for a search).

        Args:
            table: the codes of all rows, those of the present ones unchanged (`recsys.retrieval.codes.extend`).
            view: the catalogue with its new rows.

        Raises:
            BundleError: the table is of another tokenizer, or of other levels.
            DataError: it has not one row for each of the catalogue's, or present rows have other codes.
        """
        _check_table(table, view)
        same("extended", "tokenizer", self.table.tokenizer, table.tokenizer)
        same("extended", "levels", self.table.level_sizes, table.level_sizes)
        if len(table) < len(self.table) or not torch.equal(table.codes[: len(self.table)], self.table.codes):
            raise DataError(f"codes: expected those of the {len(self.table)} present rows unchanged, and new ones after them")
        return self._extended(table, self._meta(view, table.tokenizer, table.levels))

    def _extended(self, table: CodeTable, meta: IndexMeta) -> Self:
        return type(self)(self.config, table, meta)

    def save(self, directory: Path) -> None:
        """See `Index.save`."""
        with new_directory(directory) as root:
            self.table.save(root / _CODES)
            self._save_meta(root)

    @classmethod
    def load(cls, directory: Path, view: CatalogueView, *, content_hash: str | None = None, mmap: bool = False) -> Self:
        """See `Index.load`."""
        try:
            config, meta = cls._load_meta(directory, view, content_hash)
            table = CodeTable.load(directory / _CODES)
            same(directory, "codes", tuple(table.codes.shape), (meta.rows, meta.width))
            same(directory, "tokenizer", table.tokenizer, meta.content_hash)
            return cls(config, table, meta)
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise BundleError(f"{directory}: cannot read the index: {error}") from None

    @cached_property
    def _bags(self) -> Tensor:
        """int32 ``[N, K]``: where each item's codes stand among those of all slots, which have as many as the largest level."""
        return (self.table.codes + torch.arange(self.table.levels) * max(self.table.level_sizes)).to(torch.int32)

    def _check_tokenizer(self, state: Any) -> None:
        """Hold that a state speaks of the codes that the table holds."""
        self._require(state)
        same("state", "tokenizer", self.table.tokenizer, state.tokenizer)

    def _log_probs(self, state: SlotLogProbs) -> Tensor:
        """float32 ``[B, K, V]`` on the host; V is the largest level's size."""
        self._check_tokenizer(state)
        values, widest = state.values.detach().float().cpu(), max(self.table.level_sizes)
        if values.ndim != 3 or values.shape[1] != self.table.levels or values.shape[2] < widest:
            raise ConfigError(f"state: expected [B, {self.table.levels}, {widest}] log-probabilities, got {list(values.shape)}")
        for slot, size in enumerate(self.table.level_sizes):
            check_log_probs(values[:, slot, :size], f"slot {slot}")
        return values[:, :, :widest]

    def _slot_log_partition(self, values_bkv: Tensor, allowed: np.ndarray) -> np.ndarray:
        """float32 ``[B]``: ``log Σ_i exp Σ_k values[k, c_k(i)]`` over the rows of a mask."""
        weights = users_of_codes(values_bkv)
        total = torch.full((len(values_bkv),), -torch.inf)
        for part in parts(np.flatnonzero(allowed), max(len(values_bkv), 1)):
            scores_nb = functional.embedding_bag(self._bags[torch.from_numpy(part)], weights, mode="sum")
            total = torch.logaddexp(total, scores_nb.logsumexp(0))
        return total.numpy()

    def _codes_of(self, rows: np.ndarray) -> Tensor:
        """int64 ``[B, C, L]``: the codes of rows ``[B, C]``; any for the row -1."""
        codes = self.table.codes if len(self.table) else torch.zeros(1, self.table.levels, dtype=torch.int64)
        return codes[torch.from_numpy(np.maximum(rows, 0))]


def users_of_codes(values_bkv: Tensor) -> Tensor:
    """``[K V, B]``: the users' log-probabilities of each code of each slot, for the bags of an index."""
    return values_bkv.flatten(1).T.contiguous()


def check_log_probs(values: Tensor, where: str, users: np.ndarray | None = None) -> None:
    """Hold that ``[B, ...]`` are log-probabilities, of which -inf is one.

    Args:
        values: the log-probabilities.
        where: they belong, for errors.
        users: int64 ``[B]`` the users' numbers, where they are not 0 to B - 1.
    """
    if values.numel() and not bool(values.amax() < torch.inf):
        wrong = ~(values < torch.inf).flatten(1).all(1)
        row = int(wrong.long().argmax())
        row = row if users is None else int(users[row])
        raise DataError(f"state: row {row}: {where} holds NaN or infinity, expected log-probabilities")


def _check_table(table: CodeTable, view: CatalogueView) -> None:
    if len(table) != view.count:
        raise DataError(f"codes: expected one row for each of the catalogue's {view.count}, got {len(table)}")
