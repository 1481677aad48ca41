# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn normalisation: from a matrix of logits to a doubly stochastic matrix."""

import torch
from torch import Tensor


_NEGLIGIBLE = -60.0  # e^-60 is 1e-26: what is below counts for no sum, and would soon be denormal, with which products are ten times slower


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def sinkhorn(logits: Tensor, iterations: int = 20, *, damped: bool = False) -> Tensor:
    """The doubly stochastic matrix ``exp(A_ij + u_i + v_j)`` of logits A, by Sinkhorn and Knopp's scaling of rows and columns.

    Everything happens in the log domain, in float32 or better: at a temperature of 0.05 plain exponentials overflow. Gradients run
    through the unrolled iterations.

    Alternating scaling (the default) takes a column step, then a row step: rows sum to one to machine precision, columns to the
    extent that the iteration has converged. It converges fast, but even symmetric logits give a matrix that is symmetric only in the
    limit. Damped scaling, ``u ← (u − logsumexp_j(A_ij + u_j)) / 2``, takes symmetric logits alone and gives an exactly symmetric
    matrix at every iteration; it has the same limit and needs several times the iterations.

    The sharper the logits, the slower: for symmetric logits from N(0, 1), n = 32, the sums are off by 1e-15 after 20 alternating
    iterations, and by about 0.1 if they are divided by a temperature of 0.05. Entries below 1e-26 become zero.

    Args:
        logits: ``[..., n, n]``; symmetric in the last two axes where ``damped``.
        iterations: how many, at least 1.
        damped: which scaling.

    Returns:
        ``[..., n, n]``, float64 for float64 logits, else float32.
    """
    a_ij = full_precision(logits)
    if damped:
        u_i = torch.zeros_like(a_ij[..., 0])
        for _ in range(iterations):
            u_i = (u_i - torch.logsumexp(a_ij + u_i.unsqueeze(-2), dim=-1)) / 2
        # The sum of the potentials first: it is exactly symmetric, which (a + u_i) + u_j would not be.
        return _exp(a_ij + (u_i.unsqueeze(-1) + u_i.unsqueeze(-2)))
    for _ in range(iterations):
        a_ij = torch.log_softmax(torch.log_softmax(a_ij, dim=-2), dim=-1)
    return _exp(a_ij)


def _exp(x: Tensor) -> Tensor:
    return torch.exp(x).masked_fill(x < _NEGLIGIBLE, 0.0)
