# SPDX-License-Identifier: Apache-2.0
"""The interface of tokenizers: from the vectors of input fields to tokens ``[B, T, D]``."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from recsys.ranking.part import Part


class Tokenizer(Part):
    """Fields to tokens. Built as ``cls(config, widths, dim)`` and registered with ``@register("tokenizer", name)``.

    Args:
        widths: the width of each field's vector, in the order of the fields.
        dim: D.

    Attributes:
        tokens: T, set by the subclass.
    """

    tokens: int

    def __init__(self, widths: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.widths, self.dim = dict(widths), dim

    @abstractmethod
    def forward(self, x_bw: Tensor) -> Tensor:
        """The tokens.

        Args:
            x_bw: ``[B, W]``, the fields' vectors one after another, in the order of ``widths``.

        Returns:
            ``[B, T, D]``, tokens-outermost in memory.
        """
