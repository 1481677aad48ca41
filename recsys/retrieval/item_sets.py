# SPDX-License-Identifier: Apache-2.0
"""An item as a set of N tokens: continuous ones made of its text, or one for each of its codes (SETRec, arXiv 2502.10833)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.core.errors import ConfigError


class TextSet(nn.Module):
    """One autoencoder that turns an item's text embedding f into N semantic tokens: e_1..e_N = reshape(Enc(f)), f̂ = Dec(Enc(f)).

    ReLU between the layers and none after the last, a mirror-image decoder, Xavier-normal weights, as in the authors' code.
    """

    def __init__(self, text_dim: int, hidden: tuple[int, ...], tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        widths = (text_dim, *hidden, tokens * dim)
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])

    def forward(self, text: Tensor) -> Tensor:
        """``[M, D_text]`` to the tokens ``[M, N, d]``."""
        tokens: Tensor = self.encoder(text).unflatten(-1, (self.tokens, -1))
        return tokens

    def factors(self, text: Tensor) -> Tensor:
        """``[M, D_text]`` to what the last layer reads, ``[M, H]``: all tokens of an item are affine in it."""
        hidden: Tensor = self.encoder[:-1](text)
        return hidden

    def last(self) -> tuple[Tensor, Tensor]:
        """Weight ``[N, d, H]`` and bias ``[N, d]`` of the last layer, token by token."""
        layer = cast(nn.Linear, self.encoder[-1])
        return layer.weight.unflatten(0, (self.tokens, -1)), layer.bias.unflatten(0, (self.tokens, -1))

    def reconstruct(self, tokens_mnd: Tensor) -> Tensor:
        """The tokens ``[M, N, d]`` back to text embeddings ``[M, D_text]``."""
        text: Tensor = self.decoder(tokens_mnd.flatten(1))
        return text


class CodeSet(nn.Module):
    """One token for each of an item's K codes: e_k = E_k[c_k], or a sum over the digits of a code.

    A code of FSQ is a point of a small grid, and seldom shared by two items where the grid has thousands of points. With ``digits`` a code
    is written in them (the first one runs fastest, as in `recsys.retrieval.tokenizers.fsq.FSQ`), and its token is the sum of its digits'
    embeddings: what is learnt of one item then says something of another that lies near it, and of one that comes later.

    Args:
        level_sizes: how many codes each level has.
        dim: d.
        digits: how many values each digit has, the same for all levels; none to embed whole codes.
        init_std: of the normal distribution from which embeddings are drawn.

    Raises:
        ConfigError: a level has another number of codes than the digits can write.
    """

    written: Tensor
    first: Tensor

    def __init__(self, level_sizes: Sequence[int], dim: int, digits: Sequence[int] | None, init_std: float) -> None:
        super().__init__()
        self.tokens = len(level_sizes)
        written = [torch.arange(size)[:, None] if digits is None else code_digits(size, digits) for size in level_sizes]
        vectors = [size if digits is None else sum(digits) for size in level_sizes]
        before = torch.tensor([0, *vectors]).cumsum(0)
        self.register_buffer("written", torch.cat([own + first for own, first in zip(written, before, strict=False)]), persistent=False)
        self.register_buffer("first", torch.tensor([0, *level_sizes[:-1]]).cumsum(0), persistent=False)
        self.embedding = nn.Parameter(torch.randn(sum(vectors), dim) * init_std)

    def forward(self, codes_mk: Tensor) -> Tensor:
        """int64 ``[M, K]`` to the tokens ``[M, K, d]``."""
        written_mkj = self.written[codes_mk + self.first]
        tokens: Tensor = F.embedding_bag(written_mkj.flatten(0, 1), self.embedding, mode="sum").unflatten(0, codes_mk.shape)
        return tokens


def code_digits(codes: int, digits: Sequence[int]) -> Tensor:
    """int64 ``[V, J]``: which of all ``sum(digits)`` values each of V codes is written with; the first digit runs fastest.

    Raises:
        ConfigError: the digits write another number of codes.
    """
    if math.prod(digits) != codes:
        raise ConfigError(f"code_digits: {list(digits)} write {math.prod(digits)} codes, but there are {codes}")
    basis = torch.tensor([math.prod(digits[:j]) for j in range(len(digits))])
    first = torch.tensor([sum(digits[:j]) for j in range(len(digits))])
    return torch.arange(codes)[:, None] // basis % torch.tensor(digits) + first


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
