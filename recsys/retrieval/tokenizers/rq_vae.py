# SPDX-License-Identifier: Apache-2.0
"""TIGER's item tokenizer (NeurIPS 2023, arXiv 2305.05065): a residual-quantised variational autoencoder of the text embedding (RQ-VAE)."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress
from recsys.retrieval.tokenizers.codewords import k_means, nearest
from recsys.retrieval.tokenizers.fitting import Standardizer, train_epochs

_INIT_ROWS = 16_384  # most items that the codebooks are initialised from
_INIT_ITERATIONS = 10


@register("item_tokenizer", "rq_vae")
class RQVAE(CodeTokenizer):
    """``x → MLP → z``, ``r_0 = z``, ``c_l = argmin ‖r_l - e_l,c‖``, ``r_{l+1} = r_l - e_l,c``, ``ẑ = Σ e_l``, ``ẑ → MLP → x̂``.

    ``L = ‖x - x̂‖² + Σ_l ‖sg r_l - e_l‖² + β ‖r_l - sg e_l‖²``, the mean over the batch; the decoder's gradient passes straight to z.
    The paper's further code, which numbers the items of equal codes, is not the tokenizer's.

    Where the paper is silent: ReLU; no dropout; ``r_l`` is differentiated with regard to z alone, the codewords before it are constants.

    Differs from it: the paper's Adagrad with learning rate 0.4 on raw unit vectors collapses to one code, so features are standardised by
    dimension, Adam has 0.001, and a codeword that no item of an epoch took becomes the residual of a random item. The codebooks start from
    k-means on up to 16,384 warm items, not on the first batch: a batch hardly larger than a codebook leaves nothing for the levels below.

    Raises:
        ConfigError: fewer warm items than codes.
    """

    class Config(BaseConfig):
        """Sizes and training.

        Attributes:
            levels: L.
            codes: of each level.
            hidden: widths of the encoder's hidden layers; the decoder has them backwards.
            dim: of z and of a codeword.
            beta: weight of the commitment.
            standardize: whether features are standardised by dimension.
            epochs: of training.
            batch_size: of training.
            learning_rate: of training.
        """

        name: Literal["rq_vae"] = "rq_vae"
        levels: int = Field(3, ge=1)
        codes: int = Field(256, ge=1)
        hidden: tuple[int, ...] = (512, 256, 128)
        dim: int = Field(32, ge=1)
        beta: float = Field(0.25, ge=0)
        standardize: bool = True
        epochs: int = Field(100, ge=1)
        batch_size: int = Field(256, ge=1)
        learning_rate: float = Field(1e-3, gt=0)

    config: Config

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """``codes`` for each level."""
        return (self.config.codes,) * self.config.levels

    def _build(self, width: int) -> None:
        config = self.config
        widths = [width, *config.hidden, config.dim]
        self.standardizer = Standardizer(width)
        self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])
        self.codebooks = nn.Parameter(torch.zeros(config.levels, config.codes, config.dim))

    def residuals(self, z_nd: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, L + 1, dim]``: r of every level, and what the last one leaves; int64 ``[N, L]`` the codes. Codewords are constants."""
        left, codes = [z_nd], []
        for codebook in self.codebooks.detach():
            codes.append(nearest(left[-1].detach(), codebook))
            left.append(left[-1] - codebook[codes[-1]])
        return torch.stack(left, dim=1), torch.stack(codes, dim=1)

    def codewords(self, codes_nl: Tensor) -> Tensor:
        """``[N, L, dim]``: the codewords of codes."""
        return self.codebooks[torch.arange(self.config.levels), codes_nl]

    def loss(self, x_bd: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of standardised features, and their codes int64 ``[B, L]``."""
        z = self.encoder(x_bd)
        left, codes = self.residuals(z)
        words = self.codewords(codes)
        decoded = self.decoder(z + (words.sum(1) - z).detach())
        codebook = (left[:, :-1].detach() - words).square().sum((1, 2))
        commitment = (left[:, :-1] - words.detach()).square().sum((1, 2))
        return ((x_bd - decoded).square().sum(1) + codebook + self.config.beta * commitment).mean(), codes

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        config = self.config
        if config.standardize:
            self.standardizer.fit(features_nd)
        x_nd = self.standardizer(features_nd)
        self._initialise(x_nd, generator)
        unused = torch.ones(config.levels, config.codes, dtype=torch.bool)

        def loss(x_bd: Tensor) -> Tensor:
            value, codes = self.loss(x_bd)
            unused[torch.arange(config.levels), codes] = False
            return value

        def after_epoch(done: int, epochs: int, figures: Mapping[str, float]) -> None:
            if progress is not None:
                progress(done, epochs, {**figures, "unused": float(unused.sum())})
            if done < epochs:
                self._revive(x_nd, unused, generator)
                unused.fill_(True)

        train_epochs(
            list(self.parameters()),
            x_nd,
            loss,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            generator=generator,
            progress=after_epoch,
        )

    @torch.no_grad()
    def _initialise(self, x_nd: Tensor, generator: torch.Generator) -> None:
        """The codebooks, level by level, from k-means of the residuals."""
        residual = self.encoder(x_nd[torch.randperm(len(x_nd), generator=generator)[:_INIT_ROWS]])
        for codebook in self.codebooks:
            codebook.copy_(k_means(residual, self.config.codes, _INIT_ITERATIONS, generator))
            residual = residual - codebook[nearest(residual, codebook)]

    @torch.no_grad()
    def _revive(self, x_nd: Tensor, unused_lk: Tensor, generator: torch.Generator) -> None:
        """Each unused codeword becomes the residual, at its level, of a random item."""
        level, code = unused_lk.nonzero(as_tuple=True)
        if len(level):
            rows = torch.randint(len(x_nd), (len(level),), generator=generator)
            left, _ = self.residuals(self.encoder(x_nd[rows]))
            self.codebooks[level, code] = left[torch.arange(len(level)), level]

    def _encode(self, features_nd: Tensor) -> Tensor:
        encoder = copy.deepcopy(self.encoder).double()  # for the reason that `nearest` gives
        return self.residuals(encoder(self.standardizer(features_nd).double()))[1]

    def _decode(self, codes_nl: Tensor) -> Tensor:
        return self.standardizer.inverse(self.decoder(self.codewords(codes_nl).sum(1)))


def _mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
