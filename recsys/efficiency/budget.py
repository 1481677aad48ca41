# SPDX-License-Identifier: Apache-2.0
"""How many tokens each row keeps, and how a row's tokens are shared out among its groups: whole numbers with exact sums."""

import torch
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.efficiency.selectors import ranks
from recsys.efficiency.view import TokenView, held, row_of, row_sums, to_padded


def keep_counts(view: TokenView, share: float | None = None, count: int | None = None) -> Tensor:
    """int64 ``[B]``: the k of `Selector.select` with which a budget is met, protected units counted as kept.

    At least one unit of a row that has any is kept, at least the protected ones, and at most all.

    Args:
        view: the tokens; see `TokenView.units` for what is counted.
        share: of each row's units, in (0, 1], rounded to the nearest.
        count: of units, in the place of a share.

    Raises:
        ConfigError: not exactly one of ``share`` and ``count`` is given, or it is out of its range.
    """
    if (share is None) == (count is None):
        raise ConfigError(f"budget: expected either share or count, got share={share!r} and count={count!r}")
    units, _ = view.units()
    lengths = units.lengths
    if share is not None:
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"budget: share: expected above 0 and at most 1, got {share!r}")
        wanted = (lengths.double() * share).round().long().clamp(min=1)
    else:
        assert count is not None
        if count < 1:
            raise ConfigError(f"budget: count: expected at least 1, got {count!r}")
        wanted = torch.full_like(lengths, count)
    forced = torch.zeros_like(lengths)
    if units.protected is not None:
        forced = forced.index_add(0, units.rows, units.protected.long())
    return (torch.minimum(wanted, lengths) - forced).clamp(min=0)


def allocate(weights: Tensor, offsets: Tensor, totals: Tensor, caps: Tensor, floors: Tensor | None = None) -> Tensor:
    """Share out whole tokens in proportion to weights, between floors and caps, so that each row's sum is exact.

    Water-filling: shares grow in proportion to the weights until a group is full, and what it cannot take goes to the others; then the
    largest remainders are rounded up (ties go to the later group). Groups without weight get their floor, and what is left over when all
    others are full.

    Args:
        weights: float ``[G]``, at least 0, of the groups of all rows, one row after another.
        offsets: int64 ``[B + 1]`` of the groups.
        totals: int64 ``[B]``, the tokens of each row.
        caps: int64 ``[G]``: the most that a group can take.
        floors: int64 ``[G]``: the least that it gets; 0 if None.

    Returns:
        int64 ``[G]``; its sum over row b is ``totals[b]``, or the sum of the caps where that is less.

    Raises:
        ConfigError: a weight is negative or not a number, a floor is above its cap, or a row's total below the sum of its floors.
    """
    floors = torch.zeros_like(caps) if floors is None else floors
    count = int(offsets[-1])
    for name, given, length in (
        ("weights", weights, count),
        ("caps", caps, count),
        ("floors", floors, count),
        ("totals", totals, len(offsets) - 1),
    ):
        if given.shape != (length,):
            raise ConfigError(f"allocate: {name}: expected {length} values, got {tuple(given.shape)}")
    if bool((~(weights >= 0) | weights.isinf()).any()):
        raise ConfigError(f"allocate: weights: expected numbers of at least 0, got {float(weights[~(weights >= 0) | weights.isinf()][0])}")
    if bool((floors > caps).any()):
        raise ConfigError("allocate: floors: expected at most the caps")
    rows = row_of(offsets)
    least, most = (row_sums(x, offsets) for x in (floors, caps))
    if bool((totals < least).any()):
        b = int((totals < least).long().argmax())
        raise ConfigError(f"allocate: totals: row {b}: expected at least {int(least[b])}, the sum of its floors, got {int(totals[b])}")
    totals = torch.minimum(totals, most)
    shares = _filled(_relative(weights.double(), offsets), offsets, totals.double(), caps.double(), floors.double())
    whole = shares.floor().long().clamp(min=floors, max=caps)
    left = totals - row_sums(whole, offsets)
    remainders = (shares - whole).masked_fill(whole >= caps, -1.0)
    return whole + (ranks(remainders, offsets) < left[rows]).long()


def _filled(weights: Tensor, offsets: Tensor, totals: Tensor, caps: Tensor, floors: Tensor) -> Tensor:
    """Real shares ``[G]``: first of the groups with weight; of the others, evenly, where those are full."""
    padded_w, padded_c, padded_f = (to_padded(x, offsets) for x in (weights, caps, floors))
    positive = padded_w > 0
    full = torch.where(positive, padded_c, padded_f)
    short = full.sum(1, keepdim=True) > totals[:, None]
    filling = torch.where(short, positive, ~positive)
    rest = full.masked_fill(filling, 0.0)
    level_w = torch.where(short, padded_w, 1.0) * filling
    filled = _leveled(level_w, totals - rest.sum(1), padded_c * filling, padded_f * filling)
    return (rest + filled)[held(offsets[1:] - offsets[:-1], padded_w.shape[1])]


def _relative(weights: Tensor, offsets: Tensor) -> Tensor:
    """Weights as shares of their row's largest; 0 for what is too small beside it to be told from none."""
    highest = weights.new_zeros(len(offsets) - 1).scatter_reduce(0, row_of(offsets), weights, "amax")
    shares = weights / highest.clamp(min=torch.finfo(weights.dtype).smallest_normal)[row_of(offsets)]
    return torch.where(shares < 1e-200, 0.0, shares)


def _leveled(weights: Tensor, totals: Tensor, caps: Tensor, floors: Tensor) -> Tensor:
    """``clamp(level_b * weight, floor, cap)``, ``[B, G]``, where the level of each row makes its sum the total.

    The sum is piecewise linear and rises with the level: the level lies between two of its corners, cap / weight and floor / weight.
    """
    if not weights.shape[1]:
        return weights
    inverse = torch.where(weights > 0, 1.0 / weights, 0.0)
    corners = torch.cat((torch.zeros_like(inverse[:, :1]), caps * inverse, floors * inverse), 1).sort(1).values
    sums = torch.clamp(corners[..., None] * weights[:, None], floors[:, None], caps[:, None]).sum(2)
    after = torch.searchsorted(sums, totals[:, None], right=True).clamp(max=corners.shape[1] - 1)
    low, high = (corners.gather(1, i) for i in ((after - 1).clamp(min=0), after))
    below, above = (sums.gather(1, i) for i in ((after - 1).clamp(min=0), after))
    part = torch.where(above > below, (totals[:, None] - below) / (above - below), 0.0).clamp(0.0, 1.0)
    return torch.clamp((low + (high - low) * part) * weights, floors, caps)
