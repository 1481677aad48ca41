# SPDX-License-Identifier: Apache-2.0
"""The two forms of tokens, whole ``[B, T, D]`` and parted ``[B, T, P, w]`` with D = P·w, and how results of either form lie in memory."""

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """Tokens of either form as ``[T, B, D]``: a view of whole ones, and a copy of parted ones whose parts lie apart."""
    return x.transpose(0, 1).flatten(2)


def unwritten(x: Tensor) -> Tensor:
    """Fresh memory for a result in the form of ``x``: whole tokens tokens-outermost, parted ones parts-outermost.

    Parted tokens of ``x [B, T0, D0]``, tokens-outermost, are ``x.unflatten(2, (T, w)).transpose(1, 2)``, with its T0 tokens for parts.
    Parts outermost, the way back is a view that lies tokens-outermost again.
    """
    if x.ndim == 3:
        batch, tokens, dim = x.shape
        return x.new_empty(tokens, batch, dim).transpose(0, 1)
    batch, tokens, parts, width = x.shape
    return x.new_empty(parts, batch, tokens, width).permute(1, 2, 0, 3)


def in_form_of(x: Tensor, rows_tbd: Tensor) -> Tensor:
    """``[T, B, D]``, contiguous, as a result in the form of ``x``: a view of whole tokens, a copy of parted ones."""
    if x.ndim == 3:
        return rows_tbd.transpose(0, 1)
    return unwritten(x).copy_(rows_tbd.transpose(0, 1).unflatten(2, x.shape[2:]))
