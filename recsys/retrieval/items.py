# SPDX-License-Identifier: Apache-2.0
"""What a retriever knows of the catalogue's items when it is built."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.core.errors import DataError
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


def joined(tables: Sequence[ItemTable]) -> ItemTable:
    """Several catalogues side by side, in the order of `recsys.data.domains.joined`; of features, the texts.

    Raises:
        DataError: there is no table, or their texts do not all have one width.
    """
    texts = [table.text for table in tables if table.text is not None]
    if not tables or len(texts) < len(tables) or len({text.shape[1] for text in texts}) > 1:
        got = [None if table.text is None else table.text.shape[1] for table in tables]
        raise DataError(f"items: expected catalogues with text embeddings of one width, got widths {got}")
    return ItemTable(sum(table.count for table in tables), torch.cat([table.warm for table in tables]), torch.cat(texts))
