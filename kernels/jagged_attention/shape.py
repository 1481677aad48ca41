# SPDX-License-Identifier: Apache-2.0
"""One shape of jagged attention: sizes, and which form and mask, as whole numbers."""

from typing import NamedTuple, get_args

from kernels.jagged_attention.reference import Form, Mask


class Case(NamedTuple):
    """A shape, for tests, benchmarks and compilation.

    Attributes:
        rows: B.
        longest: tokens of the longest row.
        heads: H.
        width: e.
        form_number: 0 softmax, 1 SiLU.
        mask_number: 0 causal, 1 grouped, 2 grouped apart.
        group: tokens of an item.
        biases: H or 1; 0 for no bias.
        distances: D; 0 for no bias.
    """

    rows: int
    longest: int
    heads: int
    width: int
    form_number: int
    mask_number: int
    group: int
    biases: int
    distances: int

    @property
    def form(self) -> str:
        """Its name."""
        return str(get_args(Form)[self.form_number])

    @property
    def mask(self) -> str:
        """Its name."""
        return str(get_args(Mask)[self.mask_number])

    @property
    def lengths(self) -> list[int]:
        """Of the rows: evenly from none to the longest; the only row is the longest."""
        return [self.longest * (row + 1 if self.rows == 1 else row) // max(1, self.rows - 1) for row in range(self.rows)]

    @property
    def pairs(self) -> int:
        """How many pairs of tokens see each other."""
        return sum(seen_pairs(length, self.mask, self.group) for length in self.lengths)


def seen_pairs(length: int, mask: str, group: int) -> int:
    """How many pairs of tokens of a row see each other."""
    items, left = divmod(length, group)
    before = group**2 * items * (items - 1) // 2 + left * items * group
    if mask == "causal":
        return length * (length + 1) // 2
    return before + (length if mask == "grouped_apart" else items * group**2 + left**2)
