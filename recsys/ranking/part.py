# SPDX-License-Identifier: Apache-2.0
"""What the parts of a ranker have in common: their sizes, what they cost, and the penalties that they add to the training loss."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from kernels.square_sums import square_sums

NORM_EPS = 1e-6  # undisclosed by the papers; public re-implementations use 1e-6 to 1e-8

Penalties = list[Tensor] | None
"""Where a part puts scalars that the training loss adds to the task's, such as a router's balance; None outside training."""


class Part(nn.Module, ABC):
    """A module that says what a forward pass through it costs."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Operations of the matrix products of one sample's forward pass; a multiply-add counts as two.

        Norms, activations, biases, residuals, look-ups and softmaxes are left out. Training costs three times as much.
        """

    @property
    def idle(self) -> int:
        """How many of the parameters take no part in one sample's forward pass, such as experts that were not chosen."""
        return 0


class TokenPart(Part):
    """A part that takes ``[B, T, D]``.

    Args:
        tokens: T.
        dim: D.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim


class TokenNorm(nn.RMSNorm):
    """RMSNorm over the width of each token, one gain per channel shared by the tokens; writes tokens-outermost.

    ``nn.RMSNorm`` alone would write batch-outermost, whatever lay in memory before. The gain takes the dtype of the tokens, which autocast
    may have made bf16; statistics are float32.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        return rms_norm(x_btd.transpose(0, 1), self.weight.to(x_btd.dtype), NORM_EPS).transpose(0, 1)

    def scale(self, x: Tensor) -> Tensor:
        """``1 / sqrt(mean(x²) + ε)`` of each token, ``[B, T]`` in float32 at least: what `forward` multiplies by beside the gain.

        Args:
            x: whole tokens ``[B, T, D]``, or in parts ``[B, T, P, w]``, which may lie anyhow.
        """
        parts = x if x.ndim == 4 else x.unsqueeze(2)
        return torch.rsqrt(square_sums(parts).sum(2) / parts.shape[2:].numel() + NORM_EPS)


class TokenLayerNorm(nn.LayerNorm):
    """LayerNorm over the width of each token, gains and biases shared by the tokens; writes tokens-outermost."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        return super().forward(x_btd.transpose(0, 1)).transpose(0, 1)


def split_fields(x_bw: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The vector ``[B, width]`` of each field, out of all of them one after another."""
    return dict(zip(widths, x_bw.split(tuple(widths.values()), dim=1), strict=True))


def outermost_parts(module: nn.Module) -> Iterator[Part]:
    """The parts below ``module`` that are in no other part, whose operations would count theirs a second time."""
    for child in module.children():
        if isinstance(child, Part):
            yield child
        else:
            yield from outermost_parts(child)


def linear_flops(module: nn.Module) -> int:
    """Operations of all linear layers below ``module``, each applied once to one sample."""
    return sum(2 * layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear))
