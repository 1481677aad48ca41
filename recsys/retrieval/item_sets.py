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

    first: Tensor
    radix: Tensor
    basis: Tensor

    def __init__(self, level_sizes: Sequence[int], dim: int, digits: Sequence[int] | None, init_std: float) -> None:
        super().__init__()
        for level, size in enumerate(level_sizes):
            if digits is not None and math.prod(digits) != size:
                raise ConfigError(f"code_digits: {list(digits)} write {math.prod(digits)} codes, but level {level} has {size}")
        self.tokens = len(level_sizes)
        radixes = [tuple(digits) if digits is not None else (size,) for size in level_sizes]
        flat = [radix for own in radixes for radix in own]
        first = torch.tensor([sum(flat[:i]) for i in range(len(flat))]).view(self.tokens, -1)
        basis = torch.tensor([[math.prod(own[:j]) for j in range(len(own))] for own in radixes])
        for name, value in (("first", first), ("basis", basis), ("radix", torch.tensor(radixes))):
            self.register_buffer(name, value, persistent=False)
        self.embedding = nn.Parameter(torch.randn(sum(flat), dim) * init_std)

    def forward(self, codes_mk: Tensor) -> Tensor:
        """int64 ``[M, K]`` to the tokens ``[M, K, d]``."""
        digits_mkj = codes_mk[..., None] // self.basis % self.radix + self.first
        tokens: Tensor = F.embedding_bag(digits_mkj.flatten(0, 1), self.embedding, mode="sum").unflatten(0, codes_mk.shape)
        return tokens


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
