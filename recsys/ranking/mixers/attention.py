# SPDX-License-Identifier: Apache-2.0
"""Attention over tokens: with shared projections, with one set of projections per token, and with composite projections."""

from abc import abstractmethod
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.mixers.base import Mixer
from recsys.ranking.per_token import per_token_linear, xavier_uniform_per_token_

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# torch's counter knows the fused attention of GPUs, and counts that of CPUs as zero.
if _CPU_ATTENTION not in flop_registry:

    @register_flop_formula(_CPU_ATTENTION)
    def _cpu_attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
        return cast(int, sdpa_flop_count(query_shape, key_shape, value_shape))


def attend(query_bte: Tensor, key_bte: Tensor, value_bte: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Attention among the tokens of each row, in H heads side by side: ``[B, T, E]`` each, to ``[B, T, E]``.

    Args:
        query_bte: queries; head h owns the channels ``h * E / H`` to ``(h + 1) * E / H`` of all three.
        key_bte: keys.
        value_bte: values.
        heads: H, a divisor of E.
        scale: factor on the inner products, by default ``1 / sqrt(E / H)``.

    Returns:
        The heads' outputs concatenated, tokens-outermost in memory.
    """
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query_bte, key_bte, value_bte))
    out_bhtd = functional.scaled_dot_product_attention(query, key, value, scale=scale)
    return out_bhtd.permute(2, 0, 1, 3).flatten(2).transpose(0, 1)


def attend_flops(tokens: int, width: int) -> int:
    """Operations of `attend` on one sample, whatever the number of heads: ``4 T² E``."""
    return 4 * tokens**2 * width


class HeadsConfig(BaseConfig):
    """``heads``: H, a divisor of D; each has ``D / H`` channels."""

    heads: int = Field(4, ge=1)


class _Attention(Mixer):
    """Queries, keys and values of width D, softmax(Q Kᵀ / √d) V in each head of width d, and an output projection.

    No projection has a bias: a key's would cancel in the softmax.

    Args:
        heads: H.
        tokens: T.
        dim: D.

    Raises:
        ConfigError: H does not divide D.
    """

    def __init__(self, heads: int, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        if dim % heads:
            raise ConfigError(f"attention: expected heads that divide dim, got dim={dim} and heads={heads}")
        self.heads = heads

    @abstractmethod
    def project(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``[B, T, D]`` each."""

    @abstractmethod
    def project_out(self, x_btd: Tensor) -> Tensor:
        """The output projection."""

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        return self.project_out(attend(*self.project(x_btd), self.heads))


@register("mixer", "self_attention")
class SelfAttention(_Attention):
    """Multi-head self-attention whose projections the tokens share (Vaswani et al., arXiv 1706.03762), without biases.

    Without positions it does not see the order of tokens: permuting them permutes the output.
    """

    class Config(HeadsConfig):
        """See `HeadsConfig`."""

        name: Literal["self_attention"] = "self_attention"

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(config.heads, tokens, dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    def project(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Attention.project`."""
        x_tbd = x_btd.transpose(0, 1)
        return self.query(x_tbd).transpose(0, 1), self.key(x_tbd).transpose(0, 1), self.value(x_tbd).transpose(0, 1)

    def project_out(self, x_btd: Tensor) -> Tensor:
        """See `_Attention.project_out`."""
        out_tbd: Tensor = self.out(x_btd.transpose(0, 1))
        return out_tbd.transpose(0, 1)

    @property
    def flops(self) -> int:
        """``8 T D² + 4 T² D``."""
        return 8 * self.tokens * self.dim**2 + attend_flops(self.tokens, self.dim)


def _per_token_matrices(tokens: int, dim: int) -> nn.Parameter:
    """``[T, D, D]``, Xavier-uniform with the fans of one token's matrix."""
    matrices = nn.Parameter(torch.empty(tokens, dim, dim))
    xavier_uniform_per_token_(matrices, dim)
    return matrices


class _HeterogeneousAttention(_Attention):
    """Attention whose output projection is each token's own."""

    def __init__(self, heads: int, tokens: int, dim: int) -> None:
        super().__init__(heads, tokens, dim)
        self.out = _per_token_matrices(tokens, dim)

    def project_out(self, x_btd: Tensor) -> Tensor:
        """See `_Attention.project_out`."""
        return per_token_linear(x_btd.transpose(0, 1), self.out, None).transpose(0, 1)


@register("mixer", "hetero_attention")
class HeteroAttention(_HeterogeneousAttention):
    """Heterogeneous attention: token t projects with its own ``Q_t, K_t, V_t`` and ``O_t`` (HiFormer, arXiv 2311.05884).

    With the same matrices for all tokens it is `SelfAttention`. The matrices are ``[T, D, D]`` and multiply from the right.
    """

    class Config(HeadsConfig):
        """See `HeadsConfig`."""

        name: Literal["hetero_attention"] = "hetero_attention"

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(config.heads, tokens, dim)
        self.query, self.key, self.value = (_per_token_matrices(tokens, dim) for _ in range(3))

    def project(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Attention.project`."""
        x_tbd = x_btd.transpose(0, 1)
        query, key, value = (per_token_linear(x_tbd, weight, None).transpose(0, 1) for weight in (self.query, self.key, self.value))
        return query, key, value

    @property
    def flops(self) -> int:
        """``8 T D² + 4 T² D``, as with shared projections."""
        return 8 * self.tokens * self.dim**2 + attend_flops(self.tokens, self.dim)


class CompositeProjection(nn.Module):
    """``[q_1 … q_T] = concat(x_1 … x_T) Q̂``: every token's projection reads all tokens (HiFormer, arXiv 2311.05884).

    Q̂ is ``[T D, T D]``, or the product of ``left [T D, r]`` and ``right [r, T D]``. Both are Xavier-uniform.

    Args:
        width: ``T D``.
        rank: r, or None for a full matrix.
    """

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        shapes = [(width, width)] if rank is None else [(width, rank), (rank, width)]
        self.factors = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(shape)) for shape in shapes)

    @property
    def weights(self) -> int:
        """Of all factors."""
        return sum(factor.numel() for factor in self.factors)

    def forward(self, x_bl: Tensor) -> Tensor:
        """``[B, T D] → [B, T D]``."""
        for factor in self.factors:
            x_bl = x_bl @ factor
        return x_bl


@register("mixer", "hiformer")
class HiFormer(_HeterogeneousAttention):
    """Attention with composite projections: see `CompositeProjection` (HiFormer, arXiv 2311.05884).

    A block-diagonal Q̂ with the blocks ``Q_t``, and likewise for keys and values, makes it `HeteroAttention`. With heads, head h of
    token t owns the columns ``t D + h D / H`` and following of Q̂. The output projection is each token's own.
    """

    class Config(HeadsConfig):
        """Sizes.

        Attributes:
            rank: r of all three composite projections; null for full matrices, which have ``3 T² D²`` weights.
        """

        name: Literal["hiformer"] = "hiformer"
        rank: int | None = Field(None, ge=1)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(config.heads, tokens, dim)
        self.query, self.key, self.value = (CompositeProjection(tokens * dim, config.rank) for _ in range(3))

    def project(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Attention.project`."""
        x_bl, split = x_btd.flatten(1), (self.tokens, self.dim)
        return self.query(x_bl).unflatten(1, split), self.key(x_bl).unflatten(1, split), self.value(x_bl).unflatten(1, split)

    @property
    def flops(self) -> int:
        """``6 T² D²`` for the full projections, ``12 r T D`` for those of rank r; plus ``2 T D² + 4 T² D``."""
        return 6 * self.query.weights + 2 * self.tokens * self.dim**2 + attend_flops(self.tokens, self.dim)
