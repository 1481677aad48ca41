# SPDX-License-Identifier: Apache-2.0
"""No mixing."""

from typing import Literal

from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.mixers.base import ReversibleMixer


@register("mixer", "identity")
class Identity(ReversibleMixer):
    """No mixing: token t of the output depends on token t alone. The ablation against which mixing is measured."""

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["identity"] = "identity"

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)

    def forward(self, x_btd: Tensor) -> Tensor:
        """The input."""
        return x_btd

    def parts(self, x_btd: Tensor) -> Tensor:
        """The input."""
        return x_btd

    def join(self, x_bhpw: Tensor) -> Tensor:
        """The input."""
        return x_bhpw

    def revert(self, x_bhd: Tensor) -> Tensor:
        """The input."""
        return x_bhd
