# SPDX-License-Identifier: Apache-2.0
"""What a retriever knows of the catalogue's items when it is built."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.core.errors import DataError
from recsys.core.files import sha256_json
from recsys.retrieval.code_table import CodeTable


@dataclass(frozen=True)
class ItemTable:
    """The N rows of a catalogue, as a retriever's input.

    Attributes:
        count: N.
        warm: bool ``[N]``: the items that occur in the training period.
        text: float32 ``[N, D_text]`` frozen text embeddings, or None.
        collaborative: float32 ``[N, D_cf]`` frozen vectors of a collaborative model, or None; the rows of items that are not warm are zero.
        codes: of an item tokenizer, or None.
    """

    count: int
    warm: Tensor
    text: Tensor | None = None
    collaborative: Tensor | None = None
    codes: CodeTable | None = None

    def digest(self) -> str:
        """SHA-256 of all that a model is told of its items, so that no checkpoint goes on with other texts or codes."""
        codes = None if self.codes is None else self.codes.codes
        parts = [None if x is None else x.contiguous().numpy().tobytes() for x in (self.warm, self.text, self.collaborative, codes)]
        return sha256_json([part and hashlib.sha256(part).hexdigest() for part in parts])


def joined(tables: Sequence[ItemTable]) -> ItemTable:
    """Several catalogues side by side, in the order of `recsys.data.domains.joined`; of features, the texts and the codes that all have.

    Raises:
        DataError: there is no table, their texts do not all have one width, or their codes are not of one tokenizer.
    """
    texts = [table.text for table in tables if table.text is not None]
    if not tables or len(texts) < len(tables) or len({text.shape[1] for text in texts}) > 1:
        got = [None if table.text is None else table.text.shape[1] for table in tables]
        raise DataError(f"items: expected catalogues with text embeddings of one width, got widths {got}")
    warm, count = torch.cat([table.warm for table in tables]), sum(table.count for table in tables)
    return ItemTable(count, warm, torch.cat(texts), codes=_joined_codes([table.codes for table in tables]))


def _joined_codes(tables: Sequence[CodeTable | None]) -> CodeTable | None:
    """The codes of one catalogue after those of another, as they are alone: items of two catalogues are never in each other's way."""
    codes = [table for table in tables if table is not None]
    if len(codes) < len(tables):
        return None
    first = codes[0]
    for table in codes[1:]:
        if (table.tokenizer, table.level_sizes, table.repair) != (first.tokenizer, first.level_sizes, first.repair):
            expected, got = (f"{own.tokenizer} ({own.repair}, {own.level_sizes})" for own in (first, table))
            raise DataError(f"codes: expected those of one tokenizer, {expected}, got {got}")
    return CodeTable(torch.cat([table.codes for table in codes]), first.level_sizes, first.tokenizer, first.repair)
