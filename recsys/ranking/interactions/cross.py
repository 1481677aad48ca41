# SPDX-License-Identifier: Apache-2.0
"""The cross layers of DCN V2 (Wang et al., arXiv 2008.13535)."""

from torch import Tensor, nn

from recsys.ranking.part import Part, linear_flops


class Cross(Part):
    """One cross layer: ``x_{l+1} = x_0 ⊙ (W x_l + b) + x_l`` (eq. 1), or with ``W = U Vᵀ`` of low rank (eq. 2).

    Chosen where the paper is silent: Xavier-normal matrices and zero biases, as in TorchRec.

    Args:
        width: W, of both operands.
        rank: r; None for a full matrix.
    """

    def __init__(self, width: int, rank: int | None = None) -> None:
        super().__init__()
        self.down = nn.Identity() if rank is None else nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(width if rank is None else rank, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; the bias becomes zero."""
        for layer in (self.down, self.up):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def flops(self) -> int:
        """``2 W²``, or ``4 W r``."""
        return linear_flops(self)

    def forward(self, x0_bw: Tensor, x_bw: Tensor) -> Tensor:
        """``[B, W], [B, W] → [B, W]``."""
        crossed_bw: Tensor = x0_bw * self.up(self.down(x_bw)) + x_bw
        return crossed_bw


class CrossNet(Part):
    """Cross layers one after another, each crossing with the input: polynomials of degree up to ``layers + 1``.

    Args:
        width: W.
        layers: how many.
        rank: see `Cross`.
    """

    def __init__(self, width: int, layers: int, rank: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cross(width, rank) for _ in range(layers))

    @property
    def flops(self) -> int:
        """Those of the layers."""
        return linear_flops(self)

    def forward(self, x_bw: Tensor) -> Tensor:
        """``[B, W] → [B, W]``."""
        x0_bw = x_bw
        for layer in self.layers:
            x_bw = layer(x0_bw, x_bw)
        return x_bw
