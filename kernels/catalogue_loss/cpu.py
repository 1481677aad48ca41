# SPDX-License-Identifier: Apache-2.0
"""The log-partition over a catalogue without its S·C logits, in two ways; both hold a tile of logits and nothing else of them.

*At once*, for catalogues of up to `LIMIT` items: some states with all items, so that a state's sum is complete while its logits are still
there, and the gradients are formed along with the value: three products of S·C·d. They are kept until the upstream gradient scales them.

*Twice*, for larger ones: the states of a tile meet the items tile by tile, first for the largest logit and the sum, and again for the
gradients: four products, but no more memory than the gradients themselves. So few states as could then be held with all items make slow
products, and adding their share to the gradient of so many items would take longer than the product that it spares.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LIMIT = 1 << 15  # items, up to which gradients are formed along with the value
_LOGITS = 1 << 23  # held at a time, if that is _ROWS states or more: larger products are faster than logits that stay in the cache
_ROWS = 64  # states at least, since the gradient of the items is read and written once for each group of them
_TILES = {"cpu": (512, 1024)}  # states and items of a tile; on another device fewer, larger products are faster
_LARGE_TILE = (4096, 16384)


def _below_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest, and the sum of the exponentials below it that take the logits' place."""
    top = logits.amax(1)
    return top, logits.sub_(top[:, None]).exp_().sum(1)


def _below(logits: Tensor, top: Tensor) -> Tensor:
    """Exponentials below ``top`` in the place of the logits."""
    return logits.sub_(top[:, None]).exp_()


def at_once(
    states: Tensor, items: Tensor, weights: Tensor, below_top: Callable[[Tensor], tuple[Tensor, Tensor]] = _below_top
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[n]``, what `statistics_of` gives, and the gradients of ``states`` and ``items`` for an upstream one of 1, in float32 at least."""
    wide = torch.promote_types(states.dtype, torch.float32)
    statistics = torch.empty(2, states.shape[1], len(states), dtype=wide)
    dstates, ditems = torch.empty(states.shape, dtype=wide), torch.zeros(items.shape, dtype=wide)
    rows = max(_ROWS, _LOGITS // len(items))
    held = torch.empty(min(rows, len(states)), len(items), dtype=wide)
    weights_s1 = weights.to(wide)[:, None]
    for k in range(states.shape[1]):
        items_cd = items[:, k].to(wide)
        for row in _slices(len(states), rows):
            states_rd = states[row, k].to(wide)
            logits = torch.mm(states_rd, items_cd.T, out=held[: len(states_rd)])
            statistics[0, k, row], total = below_top(logits)
            statistics[1, k, row] = total
            share = weights_s1[row] / total[:, None]
            dstates[row, k] = (logits @ items_cd).mul_(share)
            ditems[:, k].addmm_(logits.T, states_rd * share)
    return log_partition(statistics, weights), statistics, dstates, ditems


def statistics_of(states: Tensor, items: Tensor, below_top: Callable[[Tensor], tuple[Tensor, Tensor]] = _below_top) -> Tensor:
    """``[2, n, S]`` in float32 at least: each state's largest logit, and the sum of all exponentials of what they are below it.

    Apart, since the logarithm of the sum would be rounded away beside a large logit.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    tops, totals = (torch.empty(states.shape[1], len(states), dtype=wide, device=states.device) for _ in range(2))
    tops.fill_(-torch.inf)
    totals.zero_()
    rows, cols = _TILES.get(states.device.type, _LARGE_TILE)
    for k in range(states.shape[1]):
        states_sd = states[:, k].to(wide)
        for col in _slices(len(items), cols):
            items_cd = items[col, k].to(wide)
            for row in _slices(len(states), rows):
                top, total = tops[k, row], totals[k, row]
                own_top, own_total = below_top(states_sd[row] @ items_cd.T)
                higher = torch.maximum(top, own_top)
                total.mul_(top.sub_(higher).exp_()).add_(own_total.mul_(own_top.sub_(higher).exp_()))
                top.copy_(higher)
    return torch.stack((tops, totals))


def log_partition(statistics: Tensor, weights: Tensor) -> Tensor:
    """``[n]``: the weighted sum, in the dtype of the weights, of log-sum-exps whose statistics are ``statistics [2, n, S]``."""
    top, total = statistics
    lse_ns: Tensor = top + total.log()
    return (lse_ns * weights.to(lse_ns.dtype)).sum(1).to(weights.dtype)


def backward(
    grad: Tensor,
    states: Tensor,
    items: Tensor,
    weights: Tensor,
    statistics: Tensor,
    below: Callable[[Tensor, Tensor], Tensor] = _below,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``states [S, n, d]`` and ``items [C, n, d]`` for ``grad [n]``.

    With the softmax p and g_s = grad · w_s: d states_s = g_s Σ_c p_sc · items_c, d items_c = Σ_s g_s · p_sc · states_s.
    """
    tops, totals = statistics
    shares_ns = grad.to(statistics.dtype)[:, None] * weights.to(statistics.dtype) / totals
    dstates, ditems = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (states, items))
    rows, cols = _TILES.get(states.device.type, _LARGE_TILE)
    for k in range(states.shape[1]):
        states_sd = states[:, k].to(statistics.dtype)
        scaled_sd = states_sd * shares_ns[k, :, None]
        dstates_sd = torch.zeros_like(states_sd)
        for col in _slices(len(items), cols):
            items_cd = items[col, k].to(statistics.dtype)
            ditems_cd = torch.zeros_like(items_cd)
            for row in _slices(len(states), rows):
                exps = below(states_sd[row] @ items_cd.T, tops[k, row])
                dstates_sd[row].addmm_(exps, items_cd)
                ditems_cd.addmm_(exps.T, scaled_sd[row])
            ditems[col, k] = ditems_cd
        dstates[:, k] = dstates_sd.mul_(shares_ns[k, :, None])
    return dstates, ditems


def _slices(length: int, step: int) -> Iterator[slice]:
    """What divides ``length`` into parts of ``step``."""
    return (slice(start, start + step) for start in range(0, length, step))
