# SPDX-License-Identifier: Apache-2.0
"""What every retriever offers to training, to the index and to serving."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from recsys.core.errors import BundleError
from recsys.data.batch import SequenceBatch
from recsys.retrieval.state import SlotVectors


class Retriever(nn.Module, ABC):
    """A model from histories to items.

    Subclasses are built as ``cls(config, items)`` where ``items`` is an `ItemTable` (the catalogue's rows with whatever the model
    needs of them) and registered with ``@register("retriever", name)``.
    """

    max_length: int

    @abstractmethod
    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, a scalar, and its detached parts by name."""

    @abstractmethod
    def encode(self, batch: SequenceBatch) -> SlotVectors:
        """The state after the whole history of each row (only its last ``max_length`` events count). Empty histories are allowed."""

    @property
    @abstractmethod
    def scorable(self) -> Tensor:
        """bool ``[N]``: the items that the model can tell apart. A model bound to the items of its training leaves the others out."""

    @abstractmethod
    def item_vectors(self) -> Tensor:
        """float ``[N, K * d]``: the concatenated slot vectors of all catalogue rows."""

    def extra_state(self) -> dict[str, Any]:
        """JSON-serialisable values, besides the weights and the config, that rebuild the model (none by default)."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` returned."""
        if state:
            raise BundleError(f"{type(self).__name__} has no extra state, but got {sorted(state)}")
