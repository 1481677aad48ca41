# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts for serving, with a byte for each weight of an expert."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from kernels.routed_experts.quantized import quantize_experts, routed_experts_quantized
from kernels.routed_experts.reference import Activation
from recsys.core.errors import ConfigError
from recsys.ranking.per_token.base import PerToken


class QuantizedExperts(nn.Module):
    """The experts of a mixture in the place of their weights; no gradient.

    The state dict holds ``q_in``, ``q_out`` (int8 or float8), ``scale_in`` and ``scale_out`` (float32). Casting the module to another
    dtype leaves them as they are.

    Args:
        weight_in: ``[T, E, D, F]``.
        weight_out: ``[T, E, h, D]``.
        dtype: int8, or float8_e4m3fn, which is nearer where some weights are far larger than the rest of their column: see
            `kernels.routed_experts.quantized.quantize_experts`.

    Raises:
        ValueError: a weight is not finite, or there is no such dtype.
    """

    q_in: Tensor
    q_out: Tensor
    scale_in: Tensor
    scale_out: Tensor

    def __init__(self, weight_in: Tensor, weight_out: Tensor, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        for side, weight in (("in", weight_in), ("out", weight_out)):
            q, scale = quantize_experts(weight, dtype)
            self.register_buffer(f"q_{side}", q.contiguous())
            self.register_buffer(f"scale_{side}", scale)

    def forward(
        self,
        x_tbd: Tensor,
        chosen_tbk: Tensor,
        gates_tbk: Tensor,
        bias_tef: Tensor | None = None,
        onto_tbd: Tensor | None = None,
        activation: Activation = "swiglu",
    ) -> Tensor:
        """See `kernels.routed_experts.routed_experts`."""
        weights, scales = (self.q_in, self.q_out), (self.scale_in, self.scale_out)
        return routed_experts_quantized(x_tbd, *weights, chosen_tbk, gates_tbk, *scales, bias_tef, onto_tbd, activation)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if (moved := getattr(self, name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Mixture(PerToken):
    """A per-token transformation with experts that can be quantized."""

    quantized: QuantizedExperts | None

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.quantized = None

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`.

        Raises:
            ConfigError: the experts are quantized.
        """
        if mode and self.quantized is not None:
            raise ConfigError(f"{type(self).__name__}: expected evaluation mode: its experts are quantized and cannot be trained")
        return super().train(mode)

    @abstractmethod
    def quantize(self, dtype: torch.dtype) -> None:
        """Put `QuantizedExperts` in the place of the experts' weights; the module can no longer be trained."""


def quantize_mixtures(ranker: nn.Module, dtype: torch.dtype = torch.int8) -> int:
    """Quantize the experts of every sparse mixture of a ranker, in place and for inference; routers, shared experts and biases stay.

    Args:
        ranker: in evaluation mode.
        dtype: see `QuantizedExperts`.

    Returns:
        How many mixtures there are.

    Raises:
        ConfigError: there is none, one is quantized already, or the ranker is in training mode.
        ValueError: see `QuantizedExperts`.
    """
    mixtures = [module for module in ranker.modules() if isinstance(module, Mixture)]
    if not mixtures:
        raise ConfigError("ranker: expected per_token: sparse_moe or relu_moe, whose experts can be quantized; found neither")
    if ranker.training:
        raise ConfigError("ranker: expected it in evaluation mode: quantized experts cannot be trained")
    if any(mixture.quantized is not None for mixture in mixtures):
        raise ConfigError("ranker: its experts are quantized already")
    for mixture in mixtures:
        mixture.quantize(dtype)
    return len(mixtures)
