# SPDX-License-Identifier: Apache-2.0
"""What every ranker offers to training, to evaluation and to serving."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import Embedded, EmbeddingTables
from recsys.ranking.heads import masked_bce
from recsys.ranking.sequence import TargetAttention


class Ranker(nn.Module, ABC):
    """A model from impressions to one probability per task.

    Built as ``cls(config, spec)`` and registered with ``@register("ranker", name)``. `forward` is `embed`, then `score`: whoever asks
    how much each event of a history matters takes the gradient of the score with respect to what `embed` returned.

    The tables cannot be moved later: for a GPU, build the model under ``with torch.device("cuda")``.

    Args:
        config: the subclass's ``Config``.
        spec: the inputs, as an `Encoder` lays them out.

    Raises:
        ConfigError: two inputs share a name.
    """

    class Config(BaseConfig):
        """What all rankers have.

        Attributes:
            embedding: the tables.
            sequence: how histories are pooled.
        """

        embedding: EmbeddingTables.Config = EmbeddingTables.Config()
        sequence: TargetAttention.Config = TargetAttention.Config()

    config: Config

    def __init__(self, config: Config, spec: InputSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        if twice := [field for field in spec.fields if spec.fields.count(field) > 1]:
            raise ConfigError(f"inputs: the name {twice[0]!r} is used twice among {', '.join(spec.fields)}")
        self.tables = EmbeddingTables(spec=spec, config=config.embedding, device=torch.get_default_device())
        self.histories = nn.ModuleList(TargetAttention(config.sequence, s, config.embedding.dim) for s in spec.sequences)

    @property
    def widths(self) -> dict[str, int]:
        """The width of each field's vector: 1 for a dense column, else the embedding's."""
        return {field: 1 if field in self.spec.dense else self.config.embedding.dim for field in self.spec.fields}

    def embed(self, batch: RankingBatch) -> Embedded:
        """Look the batch up in the tables."""
        embedded: Embedded = self.tables(batch)
        return embedded

    def score(self, embedded: Embedded, batch: RankingBatch) -> Tensor:
        """Logits ``[B, tasks]`` from looked-up embeddings; of the batch itself only the dense columns are read."""
        return self.interact(self.fields(embedded, batch))

    def forward(self, batch: RankingBatch) -> Tensor:
        """Logits ``[B, tasks]``."""
        return self.score(self.embed(batch), batch)

    @torch.no_grad()
    def predict(self, batch: RankingBatch) -> Tensor:
        """Probabilities ``[B, tasks]``, without gradients. The caller has put the model into evaluation mode."""
        return torch.sigmoid(self(batch))

    def loss(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, a scalar, and its detached parts by name. NaN labels do not count.

        Raises:
            DataError: the batch has no labels.
        """
        bce = masked_bce(self(batch), self.labels(batch))
        return bce, {"bce": bce.detach()}

    @abstractmethod
    def interact(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, tasks]`` from the fields' vectors."""

    def fields(self, embedded: Embedded, batch: RankingBatch) -> dict[str, Tensor]:
        """The vector ``[B, width]`` of each of ``spec.fields``.

        Raises:
            DataError: the dense columns are not what the spec says.
        """
        dense = batch.dense
        if dense.dtype != torch.float32 or dense.shape[1:] != (len(self.spec.dense),):
            raise DataError(f"dense: expected float32 [B, {len(self.spec.dense)}], got {dense.dtype} {list(dense.shape)}")
        fields = {key: embedded.pooled[key] for key in self.spec.bag_keys}
        for sequence, history in zip(self.spec.sequences, self.histories, strict=True):
            fields[sequence.target] = embedded.sequences[sequence.target].values()
            fields[sequence.name] = history(embedded.sequences)
        return fields | {name: dense[:, i : i + 1] for i, name in enumerate(self.spec.dense)}

    def labels(self, batch: RankingBatch) -> Tensor:
        """The batch's labels ``[B, tasks]``.

        Raises:
            DataError: there are none.
        """
        if batch.labels is None:
            raise DataError("labels: the loss needs a batch with labels")
        return batch.labels
