# SPDX-License-Identifier: Apache-2.0
"""Hidden layers: what the literature on click-through rates calls the deep network."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from pydantic import PositiveInt
from torch import Tensor, nn

from recsys.ranking.part import Part, linear_flops

Widths = tuple[PositiveInt, ...]
"""The widths of hidden layers, in order; may be empty."""


class HiddenLayers(Part):
    """``[B, D] → [B, width]``: linear layers, each followed by batch norm (if any), activation and dropout (if any).

    Unlike `recsys.ranking.mlp.mlp`, the last layer is activated too. A layer before a batch norm has no bias, which the norm would
    subtract again.

    Args:
        dim: D.
        widths: of the layers; none makes the identity.
        activation: builds what follows each layer.
        batch_norm: whether there is one. In training it makes a row's result depend on its batch mates.
        dropout: after each activation.

    Attributes:
        width: of the result.
    """

    def __init__(
        self,
        dim: int,
        widths: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((dim, *widths)):
            layers.append(nn.Linear(width_in, width_out, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(activation())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers)
        self.width = widths[-1] if widths else dim

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return linear_flops(self)

    def forward(self, x_bd: Tensor) -> Tensor:
        """The last layer's activations."""
        h_bw: Tensor = self.layers(x_bd)
        return h_bw
