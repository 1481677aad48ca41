# SPDX-License-Identifier: Apache-2.0
"""A temperature that falls while a model trains."""

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig


class Temperature(nn.Module):
    """``start + (end − start) · min(position / anneal_steps, 1)``, where position counts the training steps so far.

    The position is a buffer of the state dict, so that a resumed run goes on where it stopped and a served model keeps the temperature
    of its last step. Only `advance` moves it.
    """

    position: Tensor

    class Config(BaseConfig):
        """The schedule.

        Attributes:
            start: at the first step.
            end: after the last.
            anneal_steps: how many training steps the fall takes; about the run's length. 0 for ``end`` throughout.
        """

        start: float = Field(1.0, gt=0, allow_inf_nan=False)
        end: float = Field(0.05, gt=0, allow_inf_nan=False)
        anneal_steps: int = Field(10_000, ge=0)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """The temperature now, a float64 scalar: as such it takes the precision of whatever it divides."""
        if not self.config.anneal_steps:
            return torch.full_like(self.position, self.config.end, dtype=torch.float64)
        done = (self.position.double() / self.config.anneal_steps).clamp(max=1.0)
        return self.config.start + (self.config.end - self.config.start) * done

    def advance(self) -> None:
        """Go on by one step."""
        self.position.add_(1)

    def restart(self) -> None:
        """Go back to ``start``, for a second annealing from loaded weights."""
        self.position.zero_()
