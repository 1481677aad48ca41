# SPDX-License-Identifier: Apache-2.0
"""Where a sequence's chunks begin: a predictor that reads keys, and the labels that dense attention gives it."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError

_GAPS = 1024  # gaps that are judged at once


class BoundaryPredictor(nn.Module):
    """Judges each gap between two tokens by the keys around it (DHSA, §7 of the specification).

    The ``window`` keys on either side, heads concatenated, go through one encoder; an MLP reads its means over the left and the right side,
    ``[e_L, e_R, |e_L − e_R|, e_L e_R, cos]``. The paper is silent on a sequence's ends; here its first and last key are
    repeated there, since zeros would look like a change.

    Boundaries are then picked (see `begins`). Not causal, as in the paper: the best gaps of the row, none within ``separation`` of a better
    one, as many as make ``chunks_per_block`` chunks for each block of queries. Causal: from the left, every gap above the threshold that
    lies further than ``separation`` behind the last picked one; no later gap has a say, and the number follows from the threshold. A causal
    boundary is known ``window`` tokens after the chunk began, since the predictor reads them; who chooses earlier must not see it.
    """

    class Config(BaseConfig):
        """The predictor.

        Attributes:
            width: H_kv e, of all key heads together.
            window: keys on each side of a gap, w.
            encoder: ``attention`` over the 2 w keys, or a depthwise ``conv`` of them; a layer norm behind it.
            heads: of the attention; they divide the width.
            hidden: width of the MLP.
            separation: gaps that lie so near to a picked one are left out.
            threshold: of a gap's probability, below which it is never picked.
            chunks_per_block: see the class.
        """

        width: int = Field(ge=1)
        window: int = Field(4, ge=1)
        encoder: Literal["attention", "conv"] = "attention"
        heads: int = Field(1, ge=1)
        hidden: int = Field(64, ge=1)
        separation: int = Field(8, ge=0)
        threshold: float = Field(0.5, ge=0.0, lt=1.0)
        chunks_per_block: float = Field(2.0, gt=0.0)

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ConfigError(f"heads: expected a divisor of the width {config.width}, got {config.heads}")
        self.config = config
        width = config.width
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True) if config.encoder == "attention" else None
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width) if config.encoder == "conv" else None
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(4 * width + 1, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1))

    def forward(self, k: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, N - 1]``: whether a chunk ends with token i and the next begins with i + 1.

        Args:
            k: keys ``[B, H_kv, N, e]``.
            lengths: int64 ``[B]``, the keys that each right-padded row has.
        """
        keys = k.transpose(1, 2).flatten(2)
        if keys.shape[2] != self.config.width:
            raise ConfigError(f"width: expected {keys.shape[2]}, that of all key heads together, got {self.config.width}")
        count = keys.new_full((len(keys),), keys.shape[1], dtype=torch.long) if lengths is None else lengths
        last, rows = (count - 1).clamp(0, keys.shape[1] - 1).view(-1, 1, 1), torch.arange(len(keys), device=k.device).view(-1, 1, 1)
        window, found = self.config.window, [keys.new_zeros(len(keys), 0)]
        for gaps in torch.arange(keys.shape[1] - 1, device=k.device).split(_GAPS):
            places = gaps[:, None] + torch.arange(1 - window, window + 1, device=k.device)
            found.append(self._logits(keys[rows, torch.minimum(places.clamp(min=0), last)]))
        return torch.cat(found, 1)

    def _logits(self, windows_bgwc: Tensor) -> Tensor:
        batch, window = len(windows_bgwc), self.config.window
        x = windows_bgwc.flatten(0, 1)
        if self.attention is not None:
            seen = x + self.attention(x, x, x, need_weights=False)[0]
        else:
            assert self.conv is not None
            seen = self.conv(x.transpose(1, 2)).transpose(1, 2)
        seen = self.norm(seen)
        left, right = seen[:, :window].mean(1), seen[:, window:].mean(1)
        cosine = F.cosine_similarity(left, right, dim=-1)[:, None]
        logits: Tensor = self.mlp(torch.cat((left, right, (left - right).abs(), left * right, cosine), -1))
        return logits.view(batch, -1)

    @torch.no_grad()
    def begins(self, k: Tensor, lengths: Tensor | None, block: int, causal: bool) -> Tensor:
        """bool ``[B, N]``: where chunks begin; the first token of a row is no pick, but begins one in any case.

        Args:
            k: keys ``[B, H_kv, N, e]``.
            lengths: int64 ``[B]``, the keys that each right-padded row has.
            block: queries of a block.
            causal: see the class.
        """
        chance = self(k, lengths).sigmoid()
        count = torch.full((len(k),), k.shape[2], device=k.device) if lengths is None else lengths.clamp(max=k.shape[2])
        open_ = (chance >= self.config.threshold) & (torch.arange(chance.shape[1], device=k.device) < count[:, None] - 1)
        if causal:
            picked = spaced(open_, self.config.separation)
        else:
            chunks = (count * self.config.chunks_per_block / block).ceil().long()
            picked = best_gaps(chance, open_, self.config.separation, (chunks - 1).clamp(min=0))
        return F.pad(picked, (1, 0), value=False) | (torch.arange(k.shape[2], device=k.device) == 0)


def boundary_ratios(attention: Tensor, window: int, eps: float = 1e-6) -> Tensor:
    """How differently later queries look at the two sides of each gap: float ``[B, N - 1]``, at least 1.

    ``(max(P, F) + eps) / (min(P, F) + eps)``, where P and F are what the queries from i + ``window`` + 1 on give to the ``window`` keys
    left and right of gap i, by two-dimensional prefix sums. 1 where there are no such queries.

    Args:
        attention: ``[B, N, N]`` of queries to keys, the mean over heads; zeros for padding.
        window: w.
        eps: keeps the ratio finite.
    """
    if attention.dim() != 3 or attention.shape[1] != attention.shape[2]:
        raise DataError(f"attention: expected [B, N, N], the mean over heads, got {tuple(attention.shape)}")
    length = attention.shape[1]
    sums = F.pad(attention.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    gap = torch.arange(length - 1, device=attention.device)
    top = (gap + window + 1).clamp(max=length)
    left, middle, right = (gap + 1 - window).clamp(min=0), gap + 1, (gap + 1 + window).clamp(max=length)

    def mass(start: Tensor, end: Tensor) -> Tensor:
        """Of the rows from ``top`` and the columns from ``start`` to ``end``."""
        return (sums[:, -1, end] - sums[:, -1, start] - sums[:, top, end] + sums[:, top, start]).clamp(min=0.0)

    past, future = mass(left, middle), mass(middle, right)
    return ((torch.maximum(past, future) + eps) / (torch.minimum(past, future) + eps)).to(attention.dtype)


def boundary_targets(ratios: Tensor, alpha: float = 2.0, beta: float = 2.0) -> Tensor:
    """Soft labels ``sigmoid(alpha (log r - log beta))``: one half where the ratio is ``beta``."""
    return (alpha * (ratios.log() - torch.tensor(beta, dtype=ratios.dtype).log())).sigmoid()


def focal_loss(logits: Tensor, targets: Tensor, held: Tensor | None = None, gamma: float = 2.0, positive: float = 1.3) -> Tensor:
    """Focal binary cross-entropy with soft targets, the mean over the gaps.

    The paper does not say what takes the place of 1 − p_t where a target is soft; here it is ``|target − p|``, the same for hard ones.

    Args:
        logits: ``[B, N - 1]``.
        targets: in [0, 1], the same shape.
        held: bool, the gaps that count; all if None.
        gamma: what is nearly right counts less, the more the higher.
        positive: weight of the positive part.
    """
    weight = torch.tensor(positive, dtype=logits.dtype, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    losses = (targets - logits.sigmoid()).abs() ** gamma * losses
    return losses.mean() if held is None else losses[held].sum() / held.sum().clamp(min=1)


def spaced(open_: Tensor, separation: int) -> Tensor:
    """bool ``[B, G]``: from the left each open gap that lies more than ``separation`` behind the last picked one.

    From each gap the next that could be picked after it is known; the picked ones are what is reached from the first, found in
    log₂ G doublings.
    """
    batch, gaps = open_.shape
    place = torch.arange(gaps, device=open_.device)
    here = torch.where(open_, place, gaps)
    following = (
        torch.cat((here, here.new_full((batch, separation + 2), gaps)), 1).flip(1).cummin(1).values.flip(1)
    )  # the first from there on
    jump = torch.cat((following[:, separation + 1 : separation + 1 + gaps], here.new_full((batch, 1), gaps)), 1)
    picked = torch.zeros(batch, gaps + 1, dtype=torch.bool, device=open_.device).scatter_(1, following[:, :1], True)
    for _ in range(max(gaps, 1).bit_length()):
        reached = torch.zeros_like(picked, dtype=torch.int8).scatter_reduce_(1, jump, picked.to(torch.int8), "amax").bool()
        picked, jump = picked | reached, jump.gather(1, jump)
    return picked[:, :gaps]


def best_gaps(scores: Tensor, open_: Tensor, separation: int, most: Tensor) -> Tensor:
    """bool ``[B, G]``: the open gaps in falling order of their scores, none within ``separation`` of a picked one, ``most`` int64 ``[B]``.

    Of equal scores the later gap goes first. In each step every gap is picked that is the best of its neighbourhood, which is what the
    greedy order comes to.
    """
    gaps = scores.shape[1]
    if not gaps:
        return open_
    order = gaps - 1 - scores.masked_fill(~open_, -torch.inf).flip(1).sort(dim=1, descending=True, stable=True).indices
    merit = torch.empty_like(order).scatter_(1, order, torch.arange(gaps, 0, -1, device=order.device).expand_as(order)).double()
    left, picked = open_, torch.zeros_like(open_)
    while bool(left.any()):
        peak = left & (merit == _near(torch.where(left, merit, 0.0), separation))
        picked, left = picked | peak, left & (_near(peak.double(), separation) == 0)
    found = picked.gather(1, order)
    within = found & (found.cumsum(1) <= most[:, None])
    return torch.zeros_like(picked).scatter_(1, order, within)


def _near(x: Tensor, separation: int) -> Tensor:
    return F.max_pool1d(x[:, None], 2 * separation + 1, stride=1, padding=separation)[:, 0]
