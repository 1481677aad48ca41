# SPDX-License-Identifier: Apache-2.0
"""FSQ of the principal axes of item texts: codes that keep what texts say of likeness, without training."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.fsq import Form
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress
from recsys.retrieval.tokenizers.fsq import FSQ


@register("item_tokenizer", "axes_fsq")
class AxesFSQ(CodeTokenizer):
    """``e [D] → the K·d strongest principal axes, each in units of its deviation → FSQ``, d axes for each of K codes, the strongest first.

    In the place of RecGPT's slices (arXiv 2506.06270), whose 4 codes of 5 numbers forget most of which texts are alike
    (docs/results/retrieval.md): an embedding's dimensions have no order, and a slice of them is no better than any other, while 64 axes of
    384 keep most of it. Ours; FSQ itself is Mentzer et al.'s (arXiv 2309.15505).

    A code decodes to the mean of what fell into its levels, axis by axis.

    Raises:
        ConfigError: there are fewer dimensions than axes.
        DataError: the items that it is fitted on vary along fewer axes.
    """

    class Config(BaseConfig):
        """Sizes.

        Attributes:
            slots: K, the number of codes of an item.
            levels: of the quantiser in each of a slot's d axes; their product is the number of codes of a level.
            form: of the quantiser's bound.
            scale: by what an axis in units of its deviation is multiplied before the bound: more spreads items to the outer levels.
        """

        name: Literal["axes_fsq"] = "axes_fsq"
        slots: int = Field(16, ge=1)
        levels: tuple[int, ...] = (5, 5, 5, 5)
        form: Form = "tanh"
        scale: float = Field(1.0, gt=0)

    config: Config
    mean: Tensor
    axes: Tensor
    deviation: Tensor
    centres: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.quantiser = FSQ(config.levels, config.form)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """``Π levels`` for each slot."""
        return (self.quantiser.size,) * self.config.slots

    def coordinates(self, features_nd: Tensor) -> Tensor:
        """float32 ``[N, K, d]``: along the axes, in units of the deviations."""
        flat = (features_nd - self.mean) @ self.axes / self.deviation
        coordinates: Tensor = flat.unflatten(1, (self.config.slots, -1))
        return coordinates

    def _build(self, width: int) -> None:
        config, axes = self.config, self.config.slots * len(self.config.levels)
        if axes > width:
            raise ConfigError(
                f"item tokenizer 'axes_fsq': slots: expected at most {width // len(config.levels)} of {len(config.levels)} axes for "
                f"features of width {width}, got {config.slots}"
            )
        for name, shape in (("mean", (width,)), ("axes", (width, axes)), ("deviation", (axes,)), ("centres", (axes, max(config.levels)))):
            self.register_buffer(name, torch.zeros(shape))

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        self.mean = features_nd.mean(0)
        _, values, axes = torch.linalg.svd((features_nd - self.mean).double(), full_matrices=False)
        wanted = len(self.deviation)
        strong = int((values > 1e-6 * values[0] if len(values) else values > 0).sum())
        if strong < wanted:
            raise DataError(f"items.text: expected warm items that vary along at least {wanted} axes, got {strong}")
        # Of the two directions of an axis the one in which its largest number is positive.
        axes = axes[:wanted] * axes[:wanted].gather(1, axes[:wanted].abs().argmax(1, keepdim=True)).sign()
        self.axes = axes.T.float().contiguous()
        self.deviation = (values[:wanted] / math.sqrt(len(features_nd))).float()
        coordinates = self.coordinates(features_nd)
        level = self.quantiser.digits(self._encode(features_nd)).flatten(1)
        for place in range(self.centres.shape[1]):
            inside = (level == place).float()
            self.centres[:, place] = (coordinates.flatten(1) * inside).sum(0) / inside.sum(0).clamp(min=1)
        if progress is not None:
            progress(1, 1, {"variance": float(values[:wanted].square().sum() / values.square().sum())})

    def _encode(self, features_nd: Tensor) -> Tensor:
        codes: Tensor = self.quantiser(self.config.scale * self.coordinates(features_nd))[1]
        return codes

    def _decode(self, codes_nl: Tensor) -> Tensor:
        level = self.quantiser.digits(codes_nl).flatten(1)
        coordinates = self.centres.gather(1, level.T).T
        return (coordinates * self.deviation) @ self.axes.T + self.mean
