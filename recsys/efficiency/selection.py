# SPDX-License-Identifier: Apache-2.0
"""What was chosen: the tokens that each row keeps, or the keys that each block of queries reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.core.errors import DataError
from recsys.efficiency.view import TokenView, held, offsets_of, row_of, row_sums, to_padded


@dataclass(frozen=True)
class Merge:
    """Which kept token each token goes into.

    Attributes:
        into: int64 ``[S]``, a place among the kept tokens, -1 for a token that goes into none.
        weights: float ``[S]``, its share in what it goes into; the shares of one kept token sum to 1.
    """

    into: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RowSelection:
    """Pruning: the tokens that each row keeps, in their original order; or into which its tokens are merged.

    Attributes:
        index: int64 ``[S']``, places among the ``source`` tokens, ascending.
        offsets: int64 ``[B + 1]``: row b keeps ``index[offsets[b]:offsets[b + 1]]``.
        source: int64 ``[B + 1]``, the offsets of the tokens that were chosen from.
        merge: how dropped tokens go into kept ones; None where they are gone.
    """

    index: Tensor
    offsets: Tensor
    source: Tensor
    merge: Merge | None = None

    @classmethod
    def all(cls, view: TokenView) -> "RowSelection":
        """The unit: everything is kept."""
        return cls(torch.arange(len(view.values), device=view.offsets.device), view.offsets, view.offsets)

    @classmethod
    def of_mask(cls, keep: Tensor, source: Tensor) -> "RowSelection":
        """What a bool mask ``[S]`` over tokens with these offsets keeps."""
        index = keep.nonzero()[:, 0]
        return cls(index, offsets_of(torch.bincount(row_of(source)[index], minlength=len(source) - 1)), source)

    @property
    def lengths(self) -> Tensor:
        """int64 ``[B]``: how many tokens each row keeps."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def size(self) -> int:
        """How many tokens there were to choose from."""
        return int(self.source[-1])

    def gather(self, x: Tensor) -> Tensor:
        """``[S, …]`` to ``[S', …]``: the kept tokens, or the weighted sums that they stand for."""
        if self.merge is None:
            return x[self.index]
        if not x.is_floating_point():
            raise DataError(f"gather: expected floating-point values, of which a merge makes weighted sums, got {x.dtype}")
        used = self.merge.into >= 0
        weighted = x[used] * self.merge.weights[used].to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        return x.new_zeros(len(self.index), *x.shape[1:]).index_add(0, self.merge.into[used], weighted)

    def scatter(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """``[S', …]`` back to ``[S, …]``, with ``fill`` in the place of what was dropped."""
        return y.new_full((self.size, *y.shape[1:]), fill).index_copy(0, self.index, y)

    def mask(self) -> Tensor:
        """bool ``[S]``: what is kept."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.index.device)
        mask[self.index] = True
        return mask

    def view(self, view: TokenView) -> TokenView:
        """The tokens of a view that are kept; their positions stay what they were."""
        groups, protected, ids = (None if x is None else x[self.index] for x in (view.groups, view.protected, view.ids))
        return TokenView(self.gather(view.values), self.offsets, view.positions[self.index], groups, protected, view.context, ids)

    def compose(self, then: "RowSelection") -> "RowSelection":
        """First this choice, then another one among what it kept: one choice among the original tokens."""
        if not torch.equal(then.source, self.offsets):
            raise DataError(f"compose: expected a choice among the {len(self.index)} kept tokens, got one among {then.size}")
        return RowSelection(self.index[then.index], then.offsets, self.source, _composed(self, then))

    def expanded(self, unit: Tensor, source: Tensor) -> "RowSelection":
        """The choice among units as one among their tokens; ``unit`` int64 ``[S]`` is the unit of each token, see `TokenView.units`."""
        if self.merge is not None:
            raise DataError("expanded: groups of tokens can be kept or dropped, not merged")
        return RowSelection.of_mask(self.mask()[unit], source)

    def iou(self, other: "RowSelection") -> Tensor:
        """float ``[B]``: kept by both over kept by one of them; 1 for a row of which neither keeps anything."""
        ours, theirs = self.mask(), other.mask()
        both, either = (row_sums(m.double(), self.source) for m in (ours & theirs, ours | theirs))
        return torch.where(either > 0, both / either.clamp(min=1), 1.0)

    def recall(self, weights: Tensor) -> Tensor:
        """float ``[B]``: the share of the ``weights`` ``[S]``, at least 0, that is kept; 1 for a row that has none."""
        kept, whole = row_sums(weights.double() * self.mask(), self.source), row_sums(weights.double(), self.source)
        return torch.where(whole > 0, kept / whole.clamp(min=torch.finfo(torch.float64).tiny), 1.0)

    def broadcast(self) -> "BlockSelection":
        """What attention over the kept tokens reads: one set of keys for all heads and queries of a row."""
        width = int(self.lengths.max()) if len(self.lengths) else 0
        inside = self.index - self.source[row_of(self.offsets)]
        index = to_padded(inside, self.offsets)[:, None, None]
        return BlockSelection(index.int(), held(self.lengths, width)[:, None, None])


@dataclass(frozen=True)
class BlockSelection:
    """Sparse attention: the keys that each group of heads and each block of queries reads. No key twice.

    Attributes:
        index: int32 ``[B, G, Q, K]`` places of keys. G is 1 where all heads share, or the number of heads or of key heads; Q is 1 where all
            queries share, or the number of blocks of adjacent queries (every query while decoding one).
        valid: bool, the same shape: which entries count.
    """

    index: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        if self.index.dim() != 4 or self.index.shape != self.valid.shape:
            raise DataError(f"index: expected [B, G, Q, K] as valid, got {tuple(self.index.shape)} and {tuple(self.valid.shape)}")

    @classmethod
    def of_mask(cls, keep: Tensor) -> "BlockSelection":
        """What a bool mask ``[B, G, Q, N]`` keeps, in ascending order; K is what the fullest block keeps."""
        width = int(keep.sum(-1).max()) if keep.numel() else 0
        index = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
        return cls(index.int(), keep.gather(-1, index))

    def mask(self, keys: int) -> Tensor:
        """bool ``[B, G, Q, keys]``: what is read."""
        counts = torch.zeros(*self.index.shape[:3], keys, dtype=torch.int32, device=self.index.device)
        return counts.scatter_add_(-1, self.index.long() * self.valid, self.valid.int()).bool()

    def sorted(self) -> "BlockSelection":
        """The same keys in ascending order, what does not count last."""
        last = torch.iinfo(torch.int32).max
        index = torch.where(self.valid, self.index, last).sort(dim=-1).values
        valid = index != last
        return BlockSelection(index.masked_fill(~valid, 0), valid)

    def iou(self, other: "BlockSelection", keys: int) -> Tensor:
        """float ``[B, G, Q]``: read in both over read in one of them; 1 where nothing is."""
        ours, theirs = self.mask(keys), other.mask(keys)
        both, either = (ours & theirs).sum(-1), (ours | theirs).sum(-1)
        return torch.where(either > 0, both / either.clamp(min=1), 1.0)

    def recall(self, weights: Tensor) -> Tensor:
        """float ``[B, G, Q]``: the share of the ``weights`` ``[B, G, Q, N]``, at least 0, that is read; 1 where there are none."""
        kept, whole = (weights * self.mask(weights.shape[-1])).sum(-1), weights.sum(-1)
        return torch.where(whole > 0, kept / whole.clamp(min=torch.finfo(weights.dtype).tiny), 1.0)


def _composed(first: RowSelection, then: RowSelection) -> Merge | None:
    """How the original tokens go into what two choices after one another keep."""
    if first.merge is None and then.merge is None:
        return None
    one, two = _merge_of(first), _merge_of(then)
    if not then.size:
        return one
    used = one.into >= 0
    middle = one.into.clamp(min=0)
    into = torch.where(used, two.into[middle], -1)
    return Merge(into, torch.where(into >= 0, one.weights * two.weights[middle], 0.0))


def _merge_of(selection: RowSelection) -> Merge:
    """A choice as a merge: what is kept goes into itself."""
    if selection.merge is not None:
        return selection.merge
    into = torch.full((selection.size,), -1, device=selection.index.device)
    into[selection.index] = torch.arange(len(selection.index), device=into.device)
    return Merge(into, (into >= 0).double())
