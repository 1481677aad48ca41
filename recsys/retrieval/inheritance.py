# SPDX-License-Identifier: Apache-2.0
"""What an item that nobody has met yet takes over from items of like text: a collaborative vector."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recsys.core.config import Config

_AT_ONCE = 1024  # items whose cosines with all others are held at a time


class Inheritance(Config):
    """How a collaborative vector is inherited.

    Attributes:
        neighbours: the warm items of nearest text that it is made of.
        temperature: of the softmax over their cosines: the lower, the more the nearest one decides.
        gain: of the result. A mean of vectors is shorter than they are, and an item of a short vector is found by nobody; a higher gain
            finds more new items, at the cost of others.
    """

    neighbours: int = Field(10, ge=1)
    temperature: float = Field(0.05, gt=0.0)
    gain: float = Field(1.2, gt=0.0)


def inherited(collaborative_nd: Tensor, warm_n: Tensor, text_nt: Tensor, config: Inheritance) -> Tensor:
    """The vectors with those of new items: ``x_i = gain · Σ_j softmax_j(cos(f_i, f_j) / temperature) x_j``, j the nearest warm ones.

    Vectors of warm items stay, and no new item depends on another one.

    Args:
        collaborative_nd: float ``[N, D_cf]``, of which the warm rows count.
        warm_n: bool ``[N]``; where no item is warm, there is nothing to inherit.
        text_nt: float ``[N, D_text]``.
        config: see `Inheritance`.
    """
    new, known = (~warm_n).nonzero()[:, 0], warm_n.nonzero()[:, 0]
    found = collaborative_nd.clone()
    if not len(known):
        return found
    directions, vectors = F.normalize(text_nt, dim=1), collaborative_nd[known]
    for rows in new.split(_AT_ONCE):
        nearest = (directions[rows] @ directions[known].T).topk(min(config.neighbours, len(known)), 1)
        weights = (nearest.values / config.temperature).softmax(1).to(vectors)
        found[rows] = config.gain * torch.einsum("ij,ijd->id", weights, vectors[nearest.indices])
    return found
