# SPDX-License-Identifier: Apache-2.0
"""The interface of per-token transformations, and the batched product that they share.

All products are one ``torch.bmm`` over the token axis. The operand is read tokens-outermost (``x.transpose(0, 1)``), which is free for
an input that lies so in memory, and the result is returned as ``[B, T, D]`` by shape, tokens-outermost in memory.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from kernels.token_swiglu.layout import rows
from recsys.ranking.part import Penalties, TokenPart


class PerToken(TokenPart):
    """``[B, T, D] → [B, T, D]``, where token t of the output depends on token t and its own weights alone.

    Built as ``cls(config, tokens, dim)``.

    Args:
        tokens: T.
        dim: D.
    """

    @abstractmethod
    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """Transform each token. In training, ``penalties`` is a list to which scalars may be added."""

    def added(self, x_btd: Tensor, onto_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``onto + self(x)``, the end of every residual branch; overridden where the sum costs less as part of the last product."""
        update_btd: Tensor = self(x_btd, penalties)
        return onto_btd + update_btd

    def residual(self, x: Tensor, onto: Tensor, norm: nn.Module | None = None, penalties: Penalties = None) -> Tensor:
        """``onto + F(norm(x))``, F being this part, of whole tokens or of tokens in parts.

        Overridden where parts are read as they lie, or the norm costs less inside.

        Args:
            x: ``[B, T, D]``, or a view ``[B, T, P, w]`` of tokens that lie elsewhere in P parts.
            onto: the shape of ``x``.
            norm: over the width of each token; None for none.
            penalties: see `forward`.

        Returns:
            The shape of ``x``.
        """
        rows_btd = rows(x).transpose(0, 1)
        sums_btd = rows_btd if onto is x else rows(onto).transpose(0, 1)
        y_btd = self.added(rows_btd if norm is None else norm(rows_btd), sums_btd, penalties)
        return y_btd if x.ndim == 3 else y_btd.unflatten(2, x.shape[2:])


def hidden_width(expansion: float, dim: int) -> int:
    """The hidden width for a token of width ``dim``: ``expansion * dim``, rounded, and at least 1."""
    return max(1, round(expansion * dim))


def xavier_uniform_per_token_(weight_tio: Tensor, fan_out: int, scale: float = 1.0) -> None:
    """Fill ``[T, D_in, ·]`` with ``scale`` × Xavier-uniform values, the fans being those of one token's matrix ``D_in × fan_out``.

    ``torch.nn.init.xavier_uniform_`` would take a tensor of three axes for a convolution and count T among its fans.
    """
    bound = scale * math.sqrt(6.0 / (weight_tio.shape[1] + fan_out))
    nn.init.uniform_(weight_tio, -bound, bound)


def zero_bias(present: bool, tokens: int, width: int) -> nn.Parameter | None:
    """Zeros ``[T, 1, width]``, as `per_token_linear` adds them; or None."""
    return nn.Parameter(torch.zeros(tokens, 1, width)) if present else None


def per_token_linear(x_tbi: Tensor, weight_tio: Tensor, bias_t1o: Tensor | None) -> Tensor:
    """``y[t] = x[t] @ W[t] + b[t]``: ``[T, B, D_in] → [T, B, D_out]``."""
    return torch.bmm(x_tbi, weight_tio) if bias_t1o is None else torch.baddbmm(bias_t1o, x_tbi, weight_tio)
