# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn normalisation: from a matrix of logits to a doubly stochastic matrix."""

from typing import Any

import torch
from torch import Tensor

from kernels.sinkhorn import cpu
from kernels.sinkhorn.reference import sinkhorn as alternating
from kernels.sinkhorn.reference import visible


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
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        compiled: Tensor = _whole(logits, iterations, damped)
        return compiled
    return _scaled(logits, iterations, damped)


def _scaled(logits: Tensor, iterations: int, damped: bool) -> Tensor:
    a_ij = full_precision(logits)
    if damped:
        u_i = torch.zeros_like(a_ij[..., 0])
        for _ in range(iterations):
            u_i = (u_i - torch.logsumexp(a_ij + u_i.unsqueeze(-2), dim=-1)) / 2
        # The sum of the potentials first: it is exactly symmetric, which (a + u_i) + u_j would not be.
        return visible(a_ij + (u_i.unsqueeze(-1) + u_i.unsqueeze(-2)))
    return alternating(a_ij, a_ij.new_ones(()), iterations, symmetric=False)


@torch.library.custom_op("recsys::sinkhorn", mutates_args=())
def _whole(logits: Tensor, iterations: int, damped: bool) -> Tensor:
    """`_scaled` as one operation for ``torch.compile``, which would unroll some hundreds of kernels and take minutes over them."""
    return _scaled(logits, iterations, damped)


@_whole.register_fake
def _(logits: Tensor, iterations: int, damped: bool) -> Tensor:
    return torch.empty_like(full_precision(logits))


def _keep(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.settings = inputs[1:]


@torch.library.custom_op("recsys::sinkhorn_backward", mutates_args=())
def _whole_backward(gradient: Tensor, logits: Tensor, iterations: int, damped: bool) -> Tensor:
    """The gradient through the unrolled iterations, which are computed again: they cost the same for any batch."""
    a_ij = full_precision(logits)
    if damped:
        return _damped_backward(gradient, a_ij, iterations).to(logits.dtype)
    a_gij, one = a_ij.reshape(-1, *a_ij.shape[-2:]), a_ij.new_ones(())
    _, duals = cpu.forward(a_gij, one, iterations, symmetric=False, implicit=False)
    found = cpu.backward(gradient.reshape(a_gij.shape), a_gij, one, duals, iterations, symmetric=False, implicit=False)
    return found.view(logits.shape).to(logits.dtype)


def _damped_backward(gradient: Tensor, a_ij: Tensor, iterations: int) -> Tensor:
    u_i, shares = torch.zeros_like(a_ij[..., 0]), []
    for _ in range(iterations):
        logits = a_ij + u_i.unsqueeze(-2)
        shares.append(torch.softmax(logits, dim=-1))
        u_i = (u_i - torch.logsumexp(logits, dim=-1)) / 2
    g_ij = gradient * visible(a_ij + (u_i.unsqueeze(-1) + u_i.unsqueeze(-2)))
    g_i = g_ij.sum(dim=-1) + g_ij.sum(dim=-2)
    for share_ij in reversed(shares):
        through_ij = share_ij * (g_i / 2).unsqueeze(-1)
        g_ij, g_i = g_ij - through_ij, g_i / 2 - through_ij.sum(dim=-2)
    return g_ij


@_whole_backward.register_fake
def _(gradient: Tensor, logits: Tensor, iterations: int, damped: bool) -> Tensor:
    return torch.empty_like(logits)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _whole_backward(gradient, ctx.saved_tensors[0], *ctx.settings), None, None


_whole.register_autograd(_backward, setup_context=_keep)
