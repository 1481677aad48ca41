# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn and Knopp's scaling of ``exp(A)`` to a doubly stochastic matrix, in the log domain (UniMixer, arXiv 2604.00590, §4.3)."""

import torch
from torch import Tensor

NEGLIGIBLE = -60.0  # entries below e^-60 become zero: denormal factors would make a product of matrices ten times slower


def sinkhorn(logits: Tensor, temperature: Tensor, iterations: int, symmetric: bool) -> Tensor:
    """The definition: ``A = W / τ``, or ``(W + Wᵀ) / 2τ``; each iteration normalises the columns of ``exp(A)``, then its rows.

    Args:
        logits: W, ``[G, n, n]``, float32, bfloat16, float16 or float64.
        temperature: τ, a scalar, without a gradient.
        iterations: how many.
        symmetric: whether W is made symmetric first. The result is symmetric only in the limit.

    Returns:
        ``[G, n, n]`` in the dtype of ``logits``. Everything is computed in float32 (float64 for float64).
    """
    a_gij = scaled(logits, temperature, symmetric)
    for _ in range(iterations):
        a_gij = torch.log_softmax(torch.log_softmax(a_gij, dim=-2), dim=-1)
    return visible(a_gij).to(logits.dtype)


def visible(log_gij: Tensor) -> Tensor:
    """The exponentials, without what is negligible."""
    return torch.exp(log_gij).masked_fill(log_gij < NEGLIGIBLE, 0.0)


def scaled(logits: Tensor, temperature: Tensor, symmetric: bool) -> Tensor:
    """A ``[G, n, n]``, in float32 or float64."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if symmetric:
        wide = (wide + wide.mT) / 2
    return wide / temperature
