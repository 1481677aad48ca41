# SPDX-License-Identifier: Apache-2.0
"""One layer of HSTU, for histories in a ranker and in a retriever."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.jagged_attention import jagged_attention

_NORM_EPS = 1e-6


class HSTULayer(nn.Module):
    """One layer of HSTU (Zhai et al., arXiv 2402.17152, eqs. 1-3) over rows of events.

    ::

        U, V, Q, K = split(SiLU(Norm(X) W + b))
        A = SiLU(Q Kᵀ / √d_h + rab) / N ⊙ causal mask          for each head, d_h = d / heads
        Y = X + dropout(Norm(A V) ⊙ U) W_o

    The weights are not normalised over the events, which keeps the intensity of an interest; N is a constant. ``rab`` is one number
    for each distance between two events, shared by the heads.

    Args:
        dim: d.
        heads: a divisor of d.
        max_length: N, and how many distances there are.
        dropout: before W_o.
    """

    def __init__(self, dim: int, heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.max_length = heads, max_length
        self.norm_in, self.norm_out = nn.LayerNorm(dim, eps=_NORM_EPS), nn.LayerNorm(dim, eps=_NORM_EPS)
        self.project, self.out = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim, bias=False)
        self.distance = nn.Parameter(torch.zeros(max_length))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_bld: Tensor) -> Tensor:
        """``[B, L, d] → [B, L, d]``: each event sees itself and what stands before it."""
        rows, length = x_bld.shape[:2]
        offsets = length * torch.arange(rows + 1, device=x_bld.device)
        y_bld: Tensor = self.jagged(x_bld.flatten(0, 1), offsets).unflatten(0, (rows, length))
        return y_bld

    def jagged(self, x_sd: Tensor, offsets: Tensor) -> Tensor:
        """``[S, d] → [S, d]`` of rows that lie one after another, row b at ``offsets[b]:offsets[b + 1]``."""
        u_sd, *vqk = functional.silu(self.project(self.norm_in(x_sd))).chunk(4, dim=1)
        v_shc, q_shc, k_shc = (x.unflatten(1, (self.heads, -1)) for x in vqk)
        bias = self.distance.to(q_shc.dtype)[None]
        pooled_shc = jagged_attention(q_shc, k_shc, v_shc, offsets, bias, form="silu", divisor=self.max_length)
        y_sd: Tensor = x_sd + self._out(pooled_shc.flatten(1), u_sd)
        return y_sd

    def parts(self, normed_bld: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U ``[B, L, d]``, and V, Q, K by heads, ``[B, H, L, d_h]``, of the normed events of padded rows."""
        u_bld, *vqk = functional.silu(self.project(normed_bld)).chunk(4, dim=2)
        v_bhlc, q_bhlc, k_bhlc = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in vqk)
        return u_bld, v_bhlc, q_bhlc, k_bhlc

    def added(self, u_bld: Tensor, v_bhlc: Tensor, q_bhlc: Tensor, k_bhlc: Tensor, places: Tensor) -> Tensor:
        """``[B, L, d]``: what the layer adds to padded events that do not follow each other; ``places [B, 1, L]`` say where each stands."""
        back = places[..., :, None] - places[..., None, :]  # how far before event i event j stands; negative where it stands behind
        scores_bhll = q_bhlc @ k_bhlc.transpose(2, 3) / math.sqrt(k_bhlc.shape[3]) + self.distance[back.clamp(0, self.max_length - 1)]
        weights_bhll = torch.where(back >= 0, functional.silu(scores_bhll) / self.max_length, 0.0)
        pooled_bld = (weights_bhll @ v_bhlc).transpose(1, 2).flatten(2)
        return self._out(pooled_bld, u_bld)

    def candidates(self, x_bld: Tensor, lengths_b: Tensor, of_row: Tensor, candidates_rd: Tensor) -> Tensor:
        """``[R, d]``: candidates, each as the newest event behind one of B padded rows, which do not see it (M-FALCON in the paper).

        Args:
            x_bld: the rows, as `forward` takes them.
            lengths_b: int64 ``[B]``, how many events of each row are there; at most N - 1.
            of_row: int64 ``[R]``, the row that each candidate stands behind.
            candidates_rd: ``[R, d]``.
        """
        _, v_bhlc, _, k_bhlc = self.parts(self.norm_in(x_bld))
        u_r1d, v_rh1c, q_rh1c, k_rh1c = self.parts(self.norm_in(candidates_rd)[:, None])
        back_rl = lengths_b[of_row][:, None] - torch.arange(x_bld.shape[1], device=x_bld.device)
        scale = 1 / math.sqrt(k_bhlc.shape[3])
        scores_rh1l = q_rh1c @ k_bhlc[of_row].transpose(2, 3) * scale + self.distance[back_rl.clamp(0, self.max_length - 1)][:, None, None]
        weights_rh1l = torch.where(back_rl[:, None, None] > 0, functional.silu(scores_rh1l) / self.max_length, 0.0)
        own_rh11 = functional.silu((q_rh1c * k_rh1c).sum(3, keepdim=True) * scale + self.distance[0]) / self.max_length
        pooled_rh1c = weights_rh1l @ v_bhlc[of_row] + own_rh11 * v_rh1c
        added_r1d = self._out(pooled_rh1c.transpose(1, 2).flatten(2), u_r1d)
        return candidates_rd + added_r1d[:, 0]

    def _out(self, pooled: Tensor, u: Tensor) -> Tensor:
        out: Tensor = self.out(self.dropout(self.norm_out(pooled) * u))
        return out
