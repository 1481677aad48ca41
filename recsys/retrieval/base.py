# SPDX-License-Identifier: Apache-2.0
"""What every retriever offers to training, to the index and to serving."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recsys.core.config import Config
from recsys.core.errors import BundleError, CannotScoreNewItems, ConfigError, DataError
from recsys.core.files import sha256_json
from recsys.data.batch import SequenceBatch
from recsys.efficiency.history import HistoryPruning
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.efficiency import RetrieverEfficiency, placed, pruned_history
from recsys.retrieval.items import ItemTable
from recsys.retrieval.padding import require_known_rows, require_targets
from recsys.retrieval.state import EncoderMemory, SlotLogProbs, SlotVectors


class Retriever(nn.Module, ABC):
    """A model from histories to items.

    Subclasses are built as ``cls(config, items)`` where ``items`` is an `ItemTable` (the catalogue's rows with whatever the model
    needs of them) and registered with ``@register("retriever", name)``. They are `VectorRetriever` or `CodeRetriever`, by what an index
    over their items holds.
    """

    max_length: int
    carries: ClassVar[frozenset[str]] = frozenset()  # the parts of `RetrieverEfficiency` besides ``history`` that the model can carry

    def __init__(self) -> None:
        super().__init__()
        self.pruning: HistoryPruning | None = None

    @abstractmethod
    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, a scalar, and its detached parts by name."""

    def diagnose(self, batch: SequenceBatch) -> str | None:
        """What is wrong with a batch to train on, None where nothing is: all of several processes ask before any begins the step."""
        try:
            require_targets(batch, self.max_length)
        except DataError as error:
            return str(error)
        return None

    @abstractmethod
    def encode(self, batch: SequenceBatch) -> SlotVectors | SlotLogProbs | EncoderMemory:
        """The state after the whole history of each row (only its last ``max_length`` events count). Empty histories are allowed.

        Of a history that is pruned (`take_efficiency`), the events that are left count in its place.
        """

    @property
    @abstractmethod
    def scorable(self) -> Tensor:
        """bool ``[N]``: the items that the model can tell apart. A model bound to the items of its training leaves the others out."""

    @classmethod
    def reads_codes(cls, config: Config) -> bool:
        """Whether a model of this configuration reads the codes of items, so that a recipe has to name what makes them."""
        return False

    def event_vectors(self, items: Tensor) -> Tensor:
        """float ``[S, d]``: vectors by which events, int64 ``[S]`` catalogue rows that the model knows, can be judged and compared.

        Raises:
            ConfigError: the model has none, so that its histories cannot be pruned.
        """
        raise ConfigError(f"efficiency: history: {type(self).__name__} has no vectors of events to judge them by")

    def take_efficiency(self, config: RetrieverEfficiency | None) -> None:
        """Spend as little as this says from now on; None to spend everything.

        Raises:
            ConfigError: the model cannot carry a part of it; names the part and what it needs.
        """
        config = RetrieverEfficiency() if config is None else config
        for part in ("attention", "schedule", "routing", "drafts"):
            if getattr(config, part) is not None and part not in self.carries:
                carried = ", ".join(sorted(("history", *self.carries)))
                raise ConfigError(f"efficiency: {part}: {type(self).__name__} cannot carry it, it carries {carried} only")
        if config.history is not None and type(config.history) is not HistoryPruning.Config:
            raise ConfigError(f"efficiency: history: expected a HistoryPruning.Config, got a {type(config.history).__qualname__}")
        self.pruning = None if config.history is None else placed(HistoryPruning(config.history), self)
        self.carry(config)

    def carry(self, config: RetrieverEfficiency) -> None:
        """Take the parts of it that are in ``carries``."""

    @property
    def reach(self) -> int:
        """How many last events of a history have a say in its state: ``max_length``, or those among which `pruned` chooses."""
        return self.max_length if self.pruning is None else self.pruning.config.reach

    def pruned(self, batch: SequenceBatch) -> SequenceBatch:
        """The events that a state is made of: the whole histories, or what `take_efficiency` leaves of them.

        Raises:
            CannotScoreNewItems: a row that the model does not know.
        """
        if self.pruning is None:
            return batch
        require_known_rows(batch, len(self.scorable))
        return pruned_history(self.pruning, batch, self.event_vectors(batch.items))

    def replace_items(self, items: ItemTable) -> None:
        """Take another catalogue, such as one with new items appended, without training.

        Raises:
            CannotScoreNewItems: the model is bound to the items of its training, as this one is unless it says otherwise.
        """
        raise CannotScoreNewItems(f"{type(self).__name__} is bound to the {len(self.scorable)} items of its training, got {items.count}")

    def fingerprint(self) -> str:
        """SHA-256 over all weights and buffers, by which an index knows what its content came from."""
        return sha256_json({name: _digest(tensor) for name, tensor in self.state_dict().items()})

    def extra_state(self) -> dict[str, Any]:
        """JSON-serialisable values, besides the weights and the config, that rebuild the model (none by default)."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` returned."""
        if state:
            raise BundleError(f"{type(self).__name__} has no extra state, but got {sorted(state)}")


class VectorRetriever(Retriever):
    """A model whose items are vectors, compared with the user's by inner products."""

    @abstractmethod
    def encode(self, batch: SequenceBatch) -> SlotVectors:
        """See `Retriever.encode`."""

    @abstractmethod
    def item_vectors(self) -> Tensor:
        """float ``[N, K * d]``: the concatenated slot vectors of all catalogue rows."""


class CodeRetriever(Retriever):
    """A model whose items are codes, so that an item appended later needs codes and nothing else.

    Args:
        items: with codes.

    Attributes:
        table: the codes of all catalogue rows.
        tokens: int64 ``[N, L]``, see `tokens_of`.
        equal_levels: whether all levels must have as many codes.

    Raises:
        ConfigError: the items have no codes, or of levels that the model does not take.
    """

    tokens: Tensor
    equal_levels: ClassVar[bool] = False

    def __init__(self, items: ItemTable) -> None:
        super().__init__()
        self.table = codes_of(self, items)
        if self.equal_levels and len(set(self.table.level_sizes)) > 1:
            raise ConfigError(f"{type(self).__name__}: expected codes of equally large levels, got {list(self.table.level_sizes)}")

    @classmethod
    def reads_codes(cls, config: Config) -> bool:
        """See `Retriever.reads_codes`."""
        return True

    @property
    def scorable(self) -> Tensor:
        """bool ``[N]``: all items, since a new one has codes as soon as the tokenizer has seen it."""
        return torch.ones(len(self.table), dtype=torch.bool)

    @abstractmethod
    def tokens_of(self, table: CodeTable) -> Tensor:
        """int64 ``[N, L]``: where the codes of each item stand in the model's own table of embeddings."""

    def replace_items(self, items: ItemTable) -> None:
        """Take another catalogue, such as one with new items appended or one never seen, without training.

        Raises:
            ConfigError: the items have no codes.
            DataError: the codes are of another tokenizer or of other levels.
        """
        self.table = require_same_codes(self.table, codes_of(self, items))
        self.tokens = self.tokens_of(self.table).to(self.tokens.device)

    def _take_codes(self) -> None:
        """Keep `tokens_of` the catalogue's items beside the weights, but not among them."""
        self.register_buffer("tokens", self.tokens_of(self.table), persistent=False)


def _digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor of whatever dtype."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


def codes_of(model: Retriever, items: ItemTable) -> CodeTable:
    """The codes of items.

    Raises:
        ConfigError: there are none; names the model.
    """
    if items.codes is None:
        raise ConfigError(f"{type(model).__name__}: expected items with codes; name an item tokenizer in the recipe")
    return items.codes


def require_same_codes(trained: CodeTable, new: CodeTable) -> CodeTable:
    """Codes of another catalogue, by the tokenizer that a model was trained with.

    Raises:
        DataError: they are of another tokenizer or of other levels.
    """
    for what in ("tokenizer", "level_sizes"):
        if getattr(new, what) != getattr(trained, what):
            raise DataError(f"codes: {what}: expected {getattr(trained, what)} as in training, got {getattr(new, what)}")
    return new
