# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn on the CPU: two vectors of an iteration are kept for the backward pass, where autograd would keep two matrices.

With duals u and v the matrix after any step is ``exp(A_ij + u_i + v_j)``. A column step sets ``v_j = −logsumexp_i(A_ij + u_i)``, a row
step ``u_i = −logsumexp_j(A_ij + v_j)``; u starts at zero. Duals are ``[G, T, 2, n]``: v, then u, of every iteration, or of the last one
alone (T = 1) for the implicit gradient.
"""

import torch
from torch import Tensor

from kernels.sinkhorn.reference import scaled, visible


def forward(logits: Tensor, temperature: Tensor, iterations: int, symmetric: bool, implicit: bool) -> tuple[Tensor, Tensor]:
    """``logits [G, n, n]`` → the matrices ``[G, n, n]``, in the dtype of ``logits``, and the duals."""
    a_gij = scaled(logits, temperature, symmetric)
    u_gi = torch.zeros_like(a_gij[..., 0])
    duals = a_gij.new_empty(len(logits), 1 if implicit else iterations, 2, logits.shape[-1])
    for t in range(iterations):
        v_gj = -torch.logsumexp(a_gij + u_gi[:, :, None], dim=1)
        u_gi = -torch.logsumexp(a_gij + v_gj[:, None, :], dim=2)
        torch.stack((v_gj, u_gi), dim=1, out=duals[:, 0 if implicit else t])
    return _visible(a_gij, duals).to(logits.dtype), duals


def backward(dy: Tensor, logits: Tensor, temperature: Tensor, duals: Tensor, iterations: int, symmetric: bool, implicit: bool) -> Tensor:
    """The gradient of ``logits [G, n, n]``: through every iteration, or implicit.

    Through ``u_i = −logsumexp_j(A_ij + v_j)`` pass ``−du_i R_ij`` to A and its column sums to v, R being the matrix after the row step;
    likewise for v, with the matrix after the column step. Where the iteration has converged all of these are one matrix P. The implicit
    gradient takes them so: ``dA = g − P ∘ (α_i + β_j)`` with ``α = g 1 − P β`` and ``β = gᵀ 1 − Pᵀ α``, solved by as many rounds.
    """
    a_gij = scaled(logits, temperature, symmetric)
    g_gij = _visible(a_gij, duals).mul_(dy)
    du_gi, dv_gj = g_gij.sum(2), g_gij.sum(1)
    if implicit:
        p_gij = _matrix(a_gij, duals[:, 0, 1], duals[:, 0, 0])
        alpha_gi, beta_gj = du_gi, dv_gj
        for _ in range(iterations):
            beta_gj = dv_gj - torch.einsum("gi,gij->gj", alpha_gi, p_gij)
            alpha_gi = du_gi - torch.einsum("gj,gij->gi", beta_gj, p_gij)
        g_gij -= p_gij.mul_(alpha_gi[:, :, None] + beta_gj[:, None, :])
    else:
        for t in reversed(range(iterations)):
            v_gj, u_gi = duals[:, t].unbind(1)
            through_gij = _matrix(a_gij, u_gi, v_gj).mul_(du_gi[:, :, None])
            g_gij -= through_gij
            dv_gj = dv_gj - through_gij.sum(1)
            before_gi = duals[:, t - 1, 1] if t else torch.zeros_like(u_gi)
            through_gij = _matrix(a_gij, before_gi, v_gj).mul_(dv_gj[:, None, :])
            g_gij -= through_gij
            du_gi, dv_gj = -through_gij.sum(2), torch.zeros_like(dv_gj)
    if symmetric:
        g_gij = (g_gij + g_gij.mT) / 2
    return (g_gij / temperature).to(logits.dtype)


def _matrix(a_gij: Tensor, u_gi: Tensor, v_gj: Tensor) -> Tensor:
    return (a_gij + v_gj[:, None, :]).add_(u_gi[:, :, None]).exp_()


def _visible(a_gij: Tensor, duals: Tensor) -> Tensor:
    """The result: the last matrix, without what is negligible."""
    return visible((a_gij + duals[:, -1, None, 0]).add_(duals[:, -1, 1, :, None]))
