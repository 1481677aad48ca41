# SPDX-License-Identifier: Apache-2.0
"""Parameters and floating-point operations of the published rankers, in closed form.

A multiply-add counts as two operations. Norms, activations and residuals are left out of operations and kept in parameters. Training
costs three times the forward pass. Embedding tables are left out; so are the history encoders, except where a function says otherwise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from recsys.ranking.per_token import hidden_width
from recsys.ranking.stacks import Residual


def swiglu_weights(tokens: int, dim: int, expansion: float) -> int:
    """``3 n T D²``: gate, up and down of a per-token SwiGLU without biases."""
    return 3 * tokens * dim * hidden_width(expansion, dim)


def mix_revert_weights(tokens: int, dim: int, heads: int, expansion: float) -> int:
    """``3 n T² D² / H + 3 n T D²``: the matrices of one TokenMixer-Large block."""
    return swiglu_weights(heads, tokens * dim // heads, expansion) + swiglu_weights(tokens, dim, expansion)


def mix_revert_parameters(tokens: int, dim: int, heads: int, expansion: float, residual: Residual = "input") -> int:
    """All parameters of one TokenMixer-Large block: its matrices and the gains of its two norms."""
    norm1 = tokens * dim // heads if residual == "input" else dim
    return mix_revert_weights(tokens, dim, heads, expansion) + norm1 + dim


def mix_revert_flops(tokens: int, dim: int, heads: int, expansion: float) -> int:
    """Operations of one block's forward pass on one sample: two for each weight of its matrices."""
    return 2 * mix_revert_weights(tokens, dim, heads, expansion)


@dataclass(frozen=True)
class Size:
    """Parameters of a part, and operations of its forward pass on one sample. Parts add up; n equal parts are ``n * part``."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.parameters + other.parameters, self.flops + other.flops)

    def __rmul__(self, times: int) -> "Size":
        return Size(times * self.parameters, times * self.flops)


def linear_size(dim: int, width: int, bias: bool = True) -> Size:
    """``D W + W`` parameters and ``2 D W`` operations."""
    return Size(dim * width + bias * width, 2 * dim * width)


def layers_size(dim: int, widths: Iterable[int], batch_norm: bool = False) -> Size:
    """``Σ W_i W_{i+1} + W_{i+1}`` parameters; a batch norm has gain and bias, and its layer no bias of its own."""
    pairs = pairwise((dim, *widths))
    return sum((linear_size(i, o, not batch_norm) + Size(2 * o * batch_norm) for i, o in pairs), Size())


def cross_size(width: int, layers: int, rank: int | None) -> Size:
    """``L (W² + W)`` parameters, or ``L (2 W r + W)``; two operations for each weight."""
    weights = width * width if rank is None else 2 * width * rank
    return layers * Size(weights + width, 2 * weights)


def dcnv2_size(
    width: int,
    tasks: int,
    layers: int,
    rank: int | None,
    hidden: Sequence[int],
    structure: Literal["parallel", "stacked"] = "parallel",
    batch_norm: bool = False,
) -> Size:
    """DCN V2 over a flat vector of ``width``: cross network, deep network, output layer."""
    top = (width if structure == "parallel" or not hidden else 0) + (hidden[-1] if hidden else 0)
    return cross_size(width, layers, rank) + layers_size(width, hidden, batch_norm) + linear_size(top, tasks)


def dlrm_size(vectors: int, dense: int, dim: int, tasks: int, bottom: Sequence[int], top: Sequence[int]) -> Size:
    """DLRM over F vectors of ``dim`` and ``dense`` columns: the dot products have no parameters and ``2 (F + 1)² d`` operations."""
    total = vectors + (dense > 0)
    ends = layers_size(dense, (*bottom, dim)) if dense else Size()
    width = total * (total - 1) // 2 + dim * (dense > 0)
    return ends + Size(0, 2 * total**2 * dim) + layers_size(width, (*top, tasks))


def dlrm_dcn_size(
    vectors: int, dense: int, dim: int, tasks: int, bottom: Sequence[int], top: Sequence[int], layers: int, rank: int | None
) -> Size:
    """DLRM with cross layers over ``(F + 1) d``."""
    ends = layers_size(dense, (*bottom, dim)) if dense else Size()
    width = (vectors + (dense > 0)) * dim
    return ends + cross_size(width, layers, rank) + layers_size(width, (*top, tasks))


def mask_block_size(context: int, dim: int, width: int, reduction: float) -> Size:
    """``r D (C + D + 1) + D`` parameters of the mask, ``D W`` of the layer and ``2 W`` of its norm."""
    return layers_size(context, (hidden_width(reduction, dim), dim)) + linear_size(dim, width, bias=False) + Size(2 * width)


def masknet_size(
    vectors: int,
    dense: int,
    dim: int,
    tasks: int,
    blocks: int,
    width: int,
    reduction: float,
    hidden: Sequence[int],
    structure: Literal["serial", "parallel"] = "serial",
) -> Size:
    """MaskNet over F vectors of ``dim`` and ``dense`` columns, which become vectors too; each of all these has a norm of its own."""
    context = (vectors + dense) * dim
    below = dense * linear_size(1, dim) + Size(2 * context)
    first = mask_block_size(context, context, width, reduction)
    if structure == "parallel":
        return below + blocks * first + layers_size(blocks * width, (*hidden, tasks))
    return below + first + (blocks - 1) * mask_block_size(context, width, width, reduction) + linear_size(width, tasks)


def gate_size(width: int, context: int | None, hidden: Sequence[int]) -> Size:
    """FinalMLP's gate on ``width`` coordinates, from a context of so many; 0 for a learned vector, None for no gate."""
    if context is None:
        return Size()
    return layers_size(context, (*hidden, width)) if context else Size(width)


def bilinear_size(first: int, second: int, heads: int, tasks: int) -> Size:
    """``tasks (P Q / k + P + Q + 1)`` parameters; two operations for each weight."""
    return Size(tasks * first * second // heads, 2 * tasks * first * second // heads) + linear_size(first + second, tasks)


def finalmlp_size(width: int, tasks: int, first: Sequence[int], second: Sequence[int], heads: int, gates: Size) -> Size:
    """FinalMLP over a flat vector of ``width``, its streams of these widths, without batch norm.

    Args:
        width: W.
        tasks: how many.
        first: widths of one stream.
        second: widths of the other.
        heads: of the fusion.
        gates: of both streams, see `gate_size`.
    """
    ends = ((width, *first)[-1], (width, *second)[-1])
    return gates + layers_size(width, first) + layers_size(width, second) + bilinear_size(*ends, heads, tasks)


def din_size(width: int, tasks: int, hidden: Sequence[int], batch_norm: bool = False) -> Size:
    """DIN's MLP over a flat vector of ``width``, one slope for each PReLU, and the output layer; see `activation_unit_parameters`."""
    return layers_size(width, hidden, batch_norm) + Size(len(hidden)) + linear_size((width, *hidden)[-1], tasks)


def activation_unit_parameters(dim: int, hidden: Sequence[int], extras: int = 0) -> int:
    """Parameters of one history's encoder in DIN: activation unit, projections of aligned extras, the vector of an empty history."""
    return layers_size(4 * dim, (*hidden, 1)).parameters + len(hidden) + extras * dim**2 + dim
