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
        mask_number: 0 causal, 1 grouped, 2 prefix.
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
        if self.mask == "prefix":
            return sum(map(sum, self.seen)) + sum(self.lengths)
        return sum(seen_pairs(length, self.mask, self.group) for length in self.lengths)

    @property
    def seen(self) -> list[list[int]]:
        """Of the prefix mask, how many of its row's first tokens each token sees, as SETRec has it.

        The first half of a row are items, whose tokens see the items before their own; then come groups of queries, the first of which
        sees nothing, and each one item more than the one before.
        """
        return [self._seen(length) for length in self.lengths]

    def _seen(self, length: int) -> list[int]:
        items = length // 2 // self.group * self.group
        return [(place if place < items else min(place - items, items)) // self.group * self.group for place in range(length)]


def seen_pairs(length: int, mask: str, group: int) -> int:
    """How many pairs of tokens of a row see each other under a mask that says so by itself."""
    items, left = divmod(length, group)
    before = group**2 * items * (items - 1) // 2 + left * items * group
    if mask == "causal":
        return length * (length + 1) // 2
    return before + items * group**2 + left**2
