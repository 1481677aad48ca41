# SPDX-License-Identifier: Apache-2.0
"""From a loader to the steps of an epoch."""

from collections.abc import Generator, Iterator
from typing import Any

import torch

from recsys.data.loader import Loader


class Feed(Iterator[Any]):
    """The batches of what is left of an epoch, on the device.

    Args:
        loader: stands at its epoch and cursor.
        device: where the batches are wanted.
    """

    def __init__(self, loader: Loader[Any], device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._batches = iter(loader)

    def __next__(self) -> Any:
        batch = next(self._batches)
        return batch if self._device.type == "cpu" else batch.to(self._device)

    def state_dict(self) -> dict[str, int]:
        """The loader's cursor behind the batch that was given last."""
        return self._loader.state_dict()

    def close(self) -> None:
        """No more batches are wanted."""
        if isinstance(self._batches, Generator):
            self._batches.close()
