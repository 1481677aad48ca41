# SPDX-License-Identifier: Apache-2.0
"""The item tokenizer that knows nothing of the items: one code each, the catalogue row."""

from typing import Literal, Self

import torch
from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import CannotScoreNewItems
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress


@register("item_tokenizer", "atomic")
class Atomic(CodeTokenizer):
    """One level with one code for each of the N items that it was fitted on, warm or not; its features are the row numbers.

    Other than the rest it cannot name items that came later, so that encoding a longer catalogue raises `CannotScoreNewItems`.
    `decode` gives the row numbers, in float32 and so exact for the first 2^24 rows.
    """

    class Config(BaseConfig):
        """Configuration: the name alone."""

        name: Literal["atomic"] = "atomic"

    config: Config
    count: Tensor
    _items: int = 0

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """N.

        Raises:
            ConfigError: it is not fitted.
        """
        self._require_fitted()
        return (int(self.count),)

    @property
    def levels(self) -> int:
        """1."""
        return 1

    def features(self, items: ItemTable, first: int = 0) -> Tensor:
        """int64 ``[N - first, 1]``: the row numbers."""
        return torch.arange(first, items.count)[:, None]

    def fit(self, items: ItemTable, seed: int = 0, progress: Progress | None = None) -> Self:
        """Take note of N; see `CodeTokenizer.fit`."""
        self._items = items.count
        return super().fit(items, seed, progress)

    def _build(self, width: int) -> None:
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        self.count.fill_(self._items)

    def _encode(self, features_nd: Tensor) -> Tensor:
        count = int(self.count)
        later = features_nd[features_nd >= count]
        if len(later):
            raise CannotScoreNewItems(f"items: row {int(later[0])}: item tokenizer 'atomic' knows the catalogue rows 0 to {count - 1} only")
        return features_nd

    def _decode(self, codes_nl: Tensor) -> Tensor:
        return codes_nl.float()
