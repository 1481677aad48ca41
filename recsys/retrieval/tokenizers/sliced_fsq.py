# SPDX-License-Identifier: Apache-2.0
"""RecGPT's item tokenizer (EMNLP 2025, arXiv 2506.06270): the text embedding in slices, each quantised by FSQ."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kernels.fsq import Form
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress
from recsys.retrieval.tokenizers.fitting import Standardizer, train_epochs
from recsys.retrieval.tokenizers.fsq import FSQ


@register("item_tokenizer", "fsq")
class SlicedFSQ(CodeTokenizer):
    """``e [D] → K slices [D / K] → Linear to d → FSQ``, one code for each slice; a small transformer reads the codes back to ê.

    Follows the authors' code: one linear map down and one up, shared by the slices; a position for each slice; pre-norm layers; ê is an
    MLP of the last slice's state; the loss is the mean of ``|e - ê|``; the encoder has no layers of its own.

    Differs from it: the bound is that of `FSQ` by ``form`` (RecGPT's paper and code disagree; see there), and features are standardised by
    dimension where ``standardize``: unit vectors are small beside the steps of the quantiser. The linear map down starts with variance 1
    on standardised features (4 under ``sigmoid``), so that codes are used evenly from the first step on.

    Raises:
        ConfigError: the width of the features is not a multiple of ``slots``, or a slice's not one of ``heads``.
    """

    class Config(BaseConfig):
        """Sizes and training.

        Attributes:
            slots: K, the number of slices and of codes of an item.
            levels: of the quantiser in each dimension; their product is the number of codes of a level.
            form: of the quantiser's bound.
            standardize: whether features are standardised by dimension.
            layers: of the decoder.
            heads: of its attention; a divisor of ``D / K``.
            dropout: of the decoder, in training.
            epochs: of training.
            batch_size: of training.
            learning_rate: of training.
        """

        name: Literal["fsq"] = "fsq"
        slots: int = Field(4, ge=1)
        levels: tuple[int, ...] = (8, 8, 8, 6, 5)
        form: Form = "tanh"
        standardize: bool = True
        layers: int = Field(2, ge=1)
        heads: int = Field(8, ge=1)
        dropout: float = Field(0.2, ge=0, lt=1)
        epochs: int = Field(100, ge=1)
        batch_size: int = Field(256, ge=1)
        learning_rate: float = Field(1e-4, gt=0)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.quantiser = FSQ(config.levels, config.form)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """``Π levels`` for each slot."""
        return (self.quantiser.size,) * self.config.slots

    def _build(self, width: int) -> None:
        config = self.config
        part, rest = divmod(width, config.slots)
        if rest or part % config.heads:
            raise ConfigError(
                f"item tokenizer 'fsq': expected features whose width divides into {config.slots} slots, and a slot's into "
                f"{config.heads} heads; got {width}"
            )
        self.standardizer = Standardizer(width)
        self.down, self.up = nn.Linear(part, len(config.levels)), nn.Linear(len(config.levels), part)
        spread = 2.0 if config.form == "sigmoid" else 1.0  # σ(z) is tanh(z / 2) but for its scale
        nn.init.normal_(self.down.weight, std=spread * part**-0.5)
        nn.init.zeros_(self.down.bias)
        self.position = nn.Parameter(torch.randn(config.slots, part) * 0.02)
        layer = nn.TransformerEncoderLayer(part, config.heads, 4 * part, config.dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.Linear(part, width), nn.ReLU(), nn.Linear(width, width))

    def quantise(self, features_nd: Tensor) -> tuple[Tensor, Tensor]:
        """The quantised slices ``[N, K, d]``, differentiable, and their codes int64 ``[N, K]``, of standardised features."""
        values, index = self.quantiser(self.down(features_nd.unflatten(1, (self.config.slots, -1))))
        return values, index

    def reconstruct(self, values_nkd: Tensor) -> Tensor:
        """``[N, D]`` standardised features from quantised slices ``[N, K, d]``."""
        states = self.layers(self.up(values_nkd) + self.position)
        out: Tensor = self.out(states[:, -1])
        return out

    @torch.no_grad()
    def nearest_codes(self, features_md: Tensor, codes_l: Tensor, level: int) -> Tensor:
        """See `CodeTokenizer.nearest_codes`; by the squared distance between levels and bound in the level's own slice."""
        slices_mks = self.standardizer(features_md).unflatten(1, (self.config.slots, -1))
        bounds_md = self.quantiser.normalised_bound(self.down(slices_mks[:, level]))
        values_kd = self.quantiser.values(torch.arange(self.quantiser.size))
        return (values_kd - bounds_md[:, None]).square().sum(2).argsort(dim=1, stable=True)

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        config = self.config
        if config.standardize:
            self.standardizer.fit(features_nd)
        train_epochs(
            list(self.parameters()),
            self.standardizer(features_nd),
            lambda x_bd: functional.l1_loss(self.reconstruct(self.quantise(x_bd)[0]), x_bd),
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            generator=generator,
            progress=progress,
        )

    def _encode(self, features_nd: Tensor) -> Tensor:
        return self.quantise(self.standardizer(features_nd))[1]

    def _decode(self, codes_nl: Tensor) -> Tensor:
        return self.standardizer.inverse(self.reconstruct(self.quantiser.values(codes_nl)))
