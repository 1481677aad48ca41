# SPDX-License-Identifier: Apache-2.0
"""Residual k-means (GRID, arXiv 2507.22224; OneRec, arXiv 2506.13695)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress
from recsys.retrieval.tokenizers.codewords import k_means, nearest
from recsys.retrieval.tokenizers.fitting import Standardizer


@register("item_tokenizer", "residual_kmeans")
class ResidualKMeans(CodeTokenizer):
    """k-means of the features, then of what its centroids leave, level by level: ``c_l = argmin ‖r_l - m_l,c‖``, ``r_{l+1} = r_l - m_l,c``.

    Differs from GRID, which learns by mini-batches of 2,048 for 30 steps: Lloyd over all items at once, as OneRec has it. GRID's scaling of
    the residuals to unit length is ``normalize``: off by default, since the codes then no longer say how long a vector was. Where it is
    on, every level's input is scaled, the first one's too, and `decode` puts the mean lengths back that were seen in fitting.

    Raises:
        ConfigError: fewer warm items than codes.
    """

    class Config(BaseConfig):
        """Sizes and training.

        Attributes:
            levels: L.
            codes: K of each level.
            iterations: of Lloyd on each level.
            standardize: whether features are standardised by dimension.
            normalize: whether each level's input is scaled to unit length.
        """

        name: Literal["residual_kmeans"] = "residual_kmeans"
        levels: int = Field(3, ge=1)
        codes: int = Field(256, ge=1)
        iterations: int = Field(30, ge=1)
        standardize: bool = False
        normalize: bool = False

    config: Config
    centroids: Tensor
    lengths: Tensor

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """``codes`` for each level."""
        return (self.config.codes,) * self.config.levels

    def _build(self, width: int) -> None:
        self.standardizer = Standardizer(width)
        self.register_buffer("centroids", torch.zeros(self.config.levels, self.config.codes, width))
        self.register_buffer("lengths", torch.ones(self.config.levels))  # the mean length of each level's input

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        config = self.config
        if config.standardize:
            self.standardizer.fit(features_nd)
        residual = self.standardizer(features_nd).double()
        variance = float((residual - residual.mean(0)).square().sum())
        for level in range(config.levels):
            if config.normalize:
                self.lengths[level] = residual.norm(dim=1).mean()
                residual = functional.normalize(residual)
            self.centroids[level] = k_means(residual, config.codes, config.iterations, generator)
            residual = residual - self.centroids[level][nearest(residual, self.centroids[level])].double()
            if progress is not None:
                figures = {} if config.normalize or not variance else {"error": float(residual.square().sum()) / variance}
                progress(level + 1, config.levels, figures)

    def _encode(self, features_nd: Tensor) -> Tensor:
        residual = self.standardizer(features_nd).double()
        codes = []
        for centroids in self.centroids:
            if self.config.normalize:
                residual = functional.normalize(residual)
            codes.append(nearest(residual, centroids))
            residual = residual - centroids[codes[-1]].double()
        return torch.stack(codes, dim=1)

    def _decode(self, codes_nl: Tensor) -> Tensor:
        scale = self.lengths.cumprod(0)
        parts = [centroids[code] * s for centroids, code, s in zip(self.centroids, codes_nl.T, scale, strict=True)]
        return self.standardizer.inverse(torch.stack(parts).sum(0))
