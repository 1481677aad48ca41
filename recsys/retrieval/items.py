# SPDX-License-Identifier: Apache-2.0
"""What a retriever knows of the catalogue's items when it is built."""

from dataclasses import dataclass

from torch import Tensor

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
