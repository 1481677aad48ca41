# SPDX-License-Identifier: Apache-2.0
"""Parameters and floating-point operations of the mixing stack, in closed form.

A multiply-add counts as two operations. Norms, activations and residuals are left out of operations and kept in parameters. Training
costs three times the forward pass.
"""

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
