# SPDX-License-Identifier: Apache-2.0
"""From items to a table of codes, and what becomes of items that a tokenizer gives the same ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.retrieval.code_table import CodeTable, Repair
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import CodeTokenizer


class ItemCodes(Config):
    """The codes of items, as a recipe says what makes them.

    Attributes:
        tokenizer: what makes them of the items' text, fitted on the training period.
        repair: what becomes of items with the same codes, see `recsys.retrieval.code_table.Repair`.
        suffix_size: how many items ``suffix`` can tell apart.
    """

    tokenizer: component_config("item_tokenizer")  # type: ignore[valid-type]
    repair: Repair = "keep"
    suffix_size: int = Field(256, ge=1)

    @property
    def levels(self) -> int:
        """How many codes an item has."""
        levels: int = components.build("item_tokenizer", self.tokenizer).levels
        return levels + (self.repair == "suffix")


def code_items(tokenizer: CodeTokenizer, items: ItemTable, repair: Repair = "keep", suffix_size: int = 256) -> CodeTable:
    """The codes of a catalogue's items.

    Args:
        tokenizer: fitted.
        items: all rows.
        repair: of collisions; the smaller row keeps what it has.
        suffix_size: how many codes the level has that ``suffix`` adds.

    Raises:
        ConfigError: the tokenizer is not fitted, or the rule is unknown.
        DataError: more items share their codes than the rule can tell apart; or see `CodeTokenizer.encode`.
    """
    if repair not in get_args(Repair):
        raise ConfigError(f"repair: expected one of {', '.join(get_args(Repair))}, got {repair!r}")
    sizes = (*tokenizer.level_sizes, suffix_size) if repair == "suffix" else tokenizer.level_sizes
    nothing = CodeTable(torch.empty(0, len(sizes), dtype=torch.int64), sizes, tokenizer.fingerprint, repair)
    return extend(nothing, tokenizer, items)


def extend(table: CodeTable, tokenizer: CodeTokenizer, items: ItemTable) -> CodeTable:
    """Codes for the items that were appended to a catalogue; those of the first ``len(table)`` rows stay.

    Args:
        table: the codes of the first rows.
        tokenizer: the one that made them.
        items: all rows, the new ones last.

    Raises:
        BundleError: the tokenizer is another one.
        DataError: the catalogue has fewer rows than the table; or see `code_items`.
    """
    if tokenizer.fingerprint != table.tokenizer:
        raise BundleError(f"codes: made by the tokenizer {table.tokenizer}, but got the tokenizer {tokenizer.fingerprint}")
    first = len(table)
    if items.count < first:
        raise DataError(f"items: expected at least the {first} rows that have codes, got {items.count}")
    new = tokenizer.encode(items, first)
    if table.repair == "suffix":
        new = _numbered(table, new)
    elif table.repair == "nearest_free":
        new = _moved(table.codes, new, tokenizer, tokenizer.features(items, first))
    return replace(table, codes=torch.cat((table.codes, new)))


def prefix_ids(codes_nl: Tensor, level_sizes: Sequence[int]) -> np.ndarray:
    """int64 ``[N]``: equal numbers for equal rows, from 0, in the lexicographic order of the rows."""
    ids = np.zeros(len(codes_nl), np.int64)
    for level, size in enumerate(level_sizes):
        ids = np.unique(ids * size + codes_nl[:, level].numpy(), return_inverse=True)[1].reshape(-1)
    return ids


def _numbered(table: CodeTable, new_ml: Tensor) -> Tensor:
    """``[M, L + 1]``: the new codes, and how many items had the same before."""
    *sizes, size = table.level_sizes
    ids = prefix_ids(torch.cat((table.codes[:, :-1], new_ml)), sizes)
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    number = np.empty(len(ids), np.int64)
    number[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(starts, append=len(ids)))
    number = number[len(table) :]
    if len(number) and number.max() >= size:
        most = int(number.argmax())
        raise DataError(f"suffix: {int(number.max()) + 1} items share the codes {new_ml[most].tolist()}, expected at most {size}")
    return torch.cat((new_ml, torch.from_numpy(number)[:, None]), 1)


def _moved(old_nl: Tensor, new_ml: Tensor, tokenizer: CodeTokenizer, features_md: Tensor) -> Tensor:
    """``[M, L]``: the new codes, the last one changed where somebody has them already."""
    level, first = new_ml.shape[1] - 1, len(old_nl)
    codes_nl = torch.cat((old_nl, new_ml))
    groups = prefix_ids(codes_nl[:, :level], tokenizer.level_sizes[:level])  # rows of different ones are never in each other's way
    repeated = _repeated(codes_nl, tokenizer.level_sizes)
    order = np.argsort(groups, kind="stable")
    crowded = np.unique(groups[first:][repeated[first:]])
    for begin, end in zip(*(np.searchsorted(groups[order], crowded, side) for side in ("left", "right")), strict=True):
        rows = order[begin:end]
        _spread(codes_nl, rows[rows < first], rows[rows >= first], repeated, tokenizer, features_md)
    return codes_nl[first:]


def _repeated(codes_nl: Tensor, level_sizes: Sequence[int]) -> np.ndarray:
    """bool ``[N]``: whether an earlier row has the same codes."""
    repeated = np.ones(len(codes_nl), bool)
    repeated[np.unique(prefix_ids(codes_nl, level_sizes), return_index=True)[1]] = False
    return repeated


def _spread(
    codes_nl: Tensor, old: np.ndarray, new: np.ndarray, repeated: np.ndarray, tokenizer: CodeTokenizer, features_md: Tensor
) -> None:
    """Move the new rows among those that share all codes but the last, in place: first come, first served.

    Args:
        codes_nl: of all rows.
        old: the rows that stay, ascending.
        new: the rows that may move, ascending.
        repeated: bool ``[N]``, see `_repeated`: rows that will surely move.
        tokenizer: which says where to.
        features_md: ``[M, D]`` of the last M rows.
    """
    level, first = codes_nl.shape[1] - 1, len(codes_nl) - len(features_md)

    def rank(rows: np.ndarray) -> Tensor:
        return tokenizer.nearest_codes(features_md[rows - first], codes_nl[new[0]], level)

    sure = new[repeated[new]]
    ranked = dict(zip(sure.tolist(), rank(sure), strict=True))
    taken = set(codes_nl[old, level].tolist())
    for row, code in zip(new.tolist(), codes_nl[new, level].tolist(), strict=True):
        if code in taken:
            wanted = ranked[row] if row in ranked else rank(np.array([row]))[0]
            code = next((nearest for nearest in wanted.tolist() if nearest not in taken), None)
            if code is None:
                before = codes_nl[row, :level].tolist()
                raise DataError(
                    f"nearest_free: all {len(wanted)} codes of level {level} after {before} are taken; use the rule 'suffix' instead"
                )
            codes_nl[row, level] = code
        taken.add(code)
