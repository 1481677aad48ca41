# SPDX-License-Identifier: Apache-2.0
"""The tokens of a batch as scorers and selectors see them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import fbgemm_gpu  # noqa: F401  registers its operators
import torch
from torch import Tensor

from recsys.core.errors import DataError

_FBGEMM = (torch.float32, torch.bfloat16, torch.float16)  # what its jagged operators take; a tenth of the time of a masked copy


@dataclass(frozen=True)
class TokenView:
    """The tokens of B rows, one row after another. Every row is treated by itself: nothing here depends on its batch mates.

    Attributes:
        values: float ``[S, d]``.
        offsets: int64 ``[B + 1]``: row b holds the tokens ``offsets[b]`` to ``offsets[b + 1] - 1``.
        positions: int64 ``[S]``, where each token stood before anything was removed; ascending within a row.
        groups: int64 ``[S]``, the item or session that each token belongs to, which is kept or dropped whole; equal and adjacent within a
            row. None where each token stands for itself.
        protected: bool ``[S]``, tokens that are always kept, or None.
        context: float ``[B, M, d]``, what the tokens are judged for: target, query or candidates. None where there is none.
        ids: int64 ``[S]``, what each token is, such as a row of the catalogue; None where that is not known.
    """

    values: Tensor
    offsets: Tensor
    positions: Tensor
    groups: Tensor | None = None
    protected: Tensor | None = None
    context: Tensor | None = None
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of(cls, values: Tensor, offsets: Tensor, **others: Tensor | None) -> Self:
        """A view whose positions are counted from 0 in every row; ``others`` are further attributes."""
        _check_offsets(offsets, len(values))
        return cls(values, offsets, torch.arange(len(values), device=values.device) - offsets[row_of(offsets)], **others)

    @classmethod
    def padded(cls, values_bld: Tensor, lengths_b: Tensor, **others: Tensor | None) -> Self:
        """A view of right-padded rows ``[B, L, d]`` of which row b holds ``lengths_b[b]`` tokens; see `to_padded` for the way back."""
        if lengths_b.shape != values_bld.shape[:1] or bool(((lengths_b < 0) | (lengths_b > values_bld.shape[1])).any()):
            raise DataError(f"lengths: expected 0 to {values_bld.shape[1]} for each of {len(values_bld)} rows, got {lengths_b.tolist()}")
        offsets = offsets_of(lengths_b)
        return cls.of(from_padded(values_bld, offsets, int(offsets[-1])), offsets, **others)

    def __len__(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 ``[B]``: tokens of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def rows(self) -> Tensor:
        """int64 ``[S]``: the row of each token."""
        return row_of(self.offsets)

    @property
    def from_end(self) -> Tensor:
        """int64 ``[S]``: 1 for the last token of each row, 2 for the one before it, and so on."""
        return self.offsets[1:][self.rows] - torch.arange(len(self.values), device=self.offsets.device)

    def with_values(self, values: Tensor) -> Self:
        """The same tokens with other vectors ``[S, d']``."""
        return replace(self, values=values)

    def units(self) -> tuple["TokenView", Tensor]:
        """What is kept or dropped whole, as tokens of a view of their own, and int64 ``[S]``: the unit of each token.

        A group's vector is the mean of its tokens', its position the first one's; it is protected where one of its tokens is.
        """
        if self.groups is None:
            return self, torch.arange(len(self.values), device=self.values.device)
        begins = torch.ones_like(self.groups, dtype=torch.bool)
        rows = self.rows
        begins[1:] = (self.groups[1:] != self.groups[:-1]) | (rows[1:] != rows[:-1])
        unit = begins.long().cumsum(0) - 1
        count = int(begins.sum())
        protected = None
        if self.protected is not None:
            protected = torch.zeros(count, dtype=torch.bool, device=unit.device).index_put(
                (unit[self.protected],), self.protected.new_tensor(True)
            )
        offsets = offsets_of(torch.bincount(rows[begins], minlength=len(self)))
        return TokenView(group_means(self.values, unit, count), offsets, self.positions[begins], None, protected, self.context), unit


def group_sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sums ``[count, …]`` of the ``values`` ``[S, …]`` of each group, in single precision at least: a long sum in bf16 stands still."""
    wide = values if not values.is_floating_point() else values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.new_zeros(count, *values.shape[1:]).index_add(0, group, wide)


def group_means(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Means ``[count, …]`` of the ``values`` ``[S, …]`` of each group; zero for a group without any."""
    sizes = torch.bincount(group, minlength=count).clamp(min=1)
    return (group_sums(values, group, count) / sizes.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)


def row_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums ``[B, …]`` of each row, as `group_sums` makes them."""
    return group_sums(values, row_of(offsets), len(offsets) - 1)


def free_tokens(view: "TokenView") -> Tensor:
    """bool ``[S]``: the tokens that may be dropped: those of groups of which no token is protected."""
    units, unit = view.units()
    if units.protected is None:
        return torch.ones(len(view.values), dtype=torch.bool, device=view.offsets.device)
    return ~units.protected[unit]


def free_units(view: "TokenView") -> Tensor:
    """int64 ``[B]``: the unprotected units of each row, see `TokenView.units`."""
    units, _ = view.units()
    if units.protected is None:
        return units.lengths
    return row_sums((~units.protected).long(), units.offsets)


def offsets_of(lengths_b: Tensor) -> Tensor:
    """int64 ``[B + 1]`` of int64 lengths ``[B]``."""
    return torch.cat((lengths_b.new_zeros(1), lengths_b.cumsum(0)))


def row_of(offsets: Tensor) -> Tensor:
    """int64 ``[S]``: the row of each token."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets[1:] - offsets[:-1])


def held(lengths_b: Tensor, width: int) -> Tensor:
    """bool ``[B, width]``: the places of right-padded rows that hold a token."""
    return torch.arange(width, device=lengths_b.device) < lengths_b[:, None]


def to_padded(values: Tensor, offsets: Tensor, fill: float = 0.0, width: int | None = None) -> Tensor:
    """Right-padded rows ``[B, L, …]`` of jagged ``values`` ``[S, …]``; L is ``width`` or the longest row's length."""
    lengths = offsets[1:] - offsets[:-1]
    longest = int(lengths.max()) if len(lengths) else 0
    width = longest if width is None else width
    if width < longest:
        raise DataError(f"width: expected at least {longest}, the longest row, got {width}")
    shape = (len(lengths), width, *values.shape[1:])
    if values.dtype in _FBGEMM and values.numel():
        padded: Tensor = torch.ops.fbgemm.jagged_to_padded_dense(
            values.flatten(1) if values.dim() > 1 else values[:, None], [offsets], [width], fill
        )
        return padded.view(shape)
    return values.new_full(shape, fill).index_put(held(lengths, width).nonzero(as_tuple=True), values)


def from_padded(x_bld: Tensor, offsets: Tensor, count: int) -> Tensor:
    """The ``count`` tokens ``[S, …]`` of right-padded rows ``[B, L, …]``, none of which is longer than L."""
    if x_bld.dtype in _FBGEMM and x_bld.numel():
        flat = x_bld.flatten(2) if x_bld.dim() > 2 else x_bld[..., None]
        values: Tensor = torch.ops.fbgemm.dense_to_jagged(flat, [offsets], count)[0]
        return values.view(count, *x_bld.shape[2:])
    return x_bld[held(offsets.diff(), x_bld.shape[1])]


def through_tokens(x_bld: Tensor, lengths_b: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What ``run`` makes of the tokens ``[S, …]`` of right-padded rows and their offsets, padded as they were; zero where there is none."""
    offsets = offsets_of(lengths_b)
    return to_padded(run(from_padded(x_bld, offsets, int(offsets[-1])), offsets), offsets, width=x_bld.shape[1])


def _check(view: TokenView) -> None:
    count = len(view.values)
    _check_offsets(view.offsets, count)
    for name in ("positions", "groups", "protected", "ids"):
        given = getattr(view, name)
        if given is not None and given.shape != (count,):
            raise DataError(f"{name}: expected one for each of the {count} tokens, got {tuple(given.shape)}")
    if view.context is not None and (view.context.dim() != 3 or len(view.context) != len(view)):
        raise DataError(f"context: expected [B, M, d] with B={len(view)}, got {tuple(view.context.shape)}")


def _check_offsets(offsets: Tensor, count: int) -> None:
    if offsets.dim() != 1 or not len(offsets) or int(offsets[0]) != 0 or int(offsets[-1]) != count:
        raise DataError(f"offsets: expected int64 [B + 1] from 0 to the number of tokens, {count}, got {offsets.tolist()}")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise DataError(f"offsets: expected values that do not fall, got {offsets.tolist()}")
