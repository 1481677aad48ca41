# SPDX-License-Identifier: Apache-2.0
"""The interface of tokenizers: from the vectors of input fields to tokens ``[B, T, D]``."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from recsys.ranking.part import Part


@dataclass(frozen=True)
class Fields:
    """What a tokenizer reads.

    Attributes:
        widths: the width of each field's vector, in the order of the fields.
        groups: which fields belong together, as the inputs say; empty where they say nothing.
    """

    widths: Mapping[str, int]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Tokenizer(Part):
    """Fields to tokens. Built as ``cls(config, fields, dim)`` and registered with ``@register("tokenizer", name)``.

    Args:
        fields: what it reads.
        dim: D.

    Attributes:
        tokens: T, set by the subclass.
    """

    tokens: int

    def __init__(self, fields: Fields, dim: int) -> None:
        super().__init__()
        self.widths, self.dim = dict(fields.widths), dim

    @abstractmethod
    def forward(self, x_bw: Tensor) -> Tensor:
        """The tokens.

        Args:
            x_bw: ``[B, W]``, the fields' vectors one after another, in the order of ``widths``.

        Returns:
            ``[B, T, D]``, tokens-outermost in memory.
        """
