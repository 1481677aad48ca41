# SPDX-License-Identifier: Apache-2.0
"""The plain multi-layer perceptron that tokenizers, activation units and towers are made of."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers from ``widths[0]`` to ``widths[-1]``, with an activation (and dropout) after each but the last."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
