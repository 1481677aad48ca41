# SPDX-License-Identifier: Apache-2.0
"""What the tokenizers that learn by gradients share: epochs of shuffled batches, and standardised features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recsys.core.errors import DataError
from recsys.retrieval.tokenizers.base import Progress

_SMALLEST_STD = 1e-6  # of a dimension, relative to the largest one; flatter ones are left as they are


def train_epochs(
    parameters: list[nn.Parameter],
    features_nd: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Progress | None,
) -> None:
    """Adam over shuffled batches, the last and shorter one included.

    Args:
        parameters: what is learnt.
        features_nd: ``[N, D]`` what it is learnt from.
        loss: a scalar of a batch ``[B, D]``.
        epochs: how often each row is seen.
        batch_size: B.
        learning_rate: constant.
        generator: of the order.
        progress: told the mean loss of every epoch.

    Raises:
        DataError: the loss is not finite.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(features_nd), generator=generator).split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            value = loss(features_nd[rows])
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(value.detach()) * len(rows)
        mean = total / len(features_nd)
        if not torch.isfinite(torch.tensor(mean)):
            raise DataError(f"tokenizer: the loss of epoch {epoch + 1} is {mean}; a smaller learning_rate than {learning_rate} may help")
        if progress is not None:
            progress(epoch + 1, epochs, {"loss": mean})


class Standardizer(nn.Module):
    """Subtracts each dimension's mean and divides by its standard deviation, as learnt from the items that train.

    Args:
        width: D.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, features_nd: Tensor) -> None:
        """Learn mean and deviation; a dimension that does not vary is divided by 1."""
        self.mean.copy_(features_nd.mean(0))
        std = features_nd.std(0, correction=0)
        self.std.copy_(torch.where(std > _SMALLEST_STD * std.max(), std, torch.ones_like(std)))

    def forward(self, features_nd: Tensor) -> Tensor:
        """``[N, D] → [N, D]``."""
        return (features_nd - self.mean) / self.std

    def inverse(self, features_nd: Tensor) -> Tensor:
        """``[N, D] → [N, D]``: back to what it was."""
        return features_nd * self.std + self.mean
