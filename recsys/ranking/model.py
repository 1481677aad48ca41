# SPDX-License-Identifier: Apache-2.0
"""What every ranker offers to training, to evaluation and to serving."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.data.batch import RankingBatch, TiledBatch
from recsys.data.spec import InputSpec
from recsys.embedding.served import new_tables
from recsys.embedding.tables import Embedded, EmbeddingTables, dense_parameters
from recsys.ranking import checks
from recsys.ranking.history import HistoryEncoder, TargetAttention
from recsys.ranking.losses import masked_bce
from recsys.ranking.part import Part
from recsys.ranking.vectors import Vectors, vectors


@dataclass(frozen=True)
class Costs:
    """What a ranker costs.

    Attributes:
        tables: parameters of the embedding tables.
        dense: all other parameters.
        active: those of ``dense`` that take part in one sample's forward pass; less than ``dense`` where experts are chosen.
        flops: operations of one sample's forward pass, from the fields' vectors to the logits: matrix products alone, a multiply-add
            counting as two. Encoding a history is left out, since it depends on the history's length. Training costs three times this.
    """

    tables: int
    dense: int
    active: int
    flops: int


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
            history: how histories become field vectors.
        """

        embedding: EmbeddingTables.Config = EmbeddingTables.Config()
        history: component_config("history") = TargetAttention.Config()  # type: ignore[valid-type]

    config: Config
    compile_options: ClassVar[Mapping[str, str | int | bool]] = {}
    """For ``torch.compile``."""

    def __init__(self, config: Config, spec: InputSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        if twice := [field for field in spec.fields if spec.fields.count(field) > 1]:
            raise ConfigError(f"inputs: the name {twice[0]!r} is used twice among {', '.join(spec.fields)}")
        self.tables = new_tables(spec, config.embedding, torch.get_default_device())
        widths = self.tables.widths
        self.histories = nn.ModuleList(
            components.build("history", config.history, s, widths[s.keys[0]], [widths[key] for key in s.keys[1:]]) for s in spec.sequences
        )

    @property
    def widths(self) -> dict[str, int]:
        """The fields in order, and the width of each one's vector: 1 for a dense column, else the embedding's.

        Pooled keys, then for each sequence its target and its history's fields, then the dense columns.
        """
        widths = {key: self.tables.widths[key] for key in self.spec.bag_keys}
        for history in self._encoders():
            widths |= dict.fromkeys((history.sequence.target, *history.fields), history.dim)
        return widths | dict.fromkeys(self.spec.dense, 1)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The inputs' groups of these fields: a history's fields stand where the spec has its name."""
        parts = {history.sequence.name: history.fields for history in self._encoders()}
        return {name: tuple(f for field in group for f in parts.get(field, (field,))) for name, group in self.spec.groups.items()}

    def costs(self) -> "Costs":
        """Parameters and operations: see `Costs`."""
        dense = sum(parameter.numel() for parameter in dense_parameters(self))
        idle = sum(part.idle for part in self.modules() if isinstance(part, Part))
        tables = sum(parameter.numel() for parameter in self.tables.parameters())
        return Costs(tables, dense, dense - idle, self.flops)

    @property
    @abstractmethod
    def flops(self) -> int:
        """Operations of the matrix products in `interact` for one sample, forward: see `recsys.ranking.part.Part.flops`."""

    def compile_dense(self) -> None:
        """Compile, in place and when first called, every module between the fields' vectors and the logits.

        Look-ups and histories stay as they are: their shapes change from batch to batch. Names in the state dict do not change.
        """
        parts = [child for child in self.children() if child is not self.tables and child is not self.histories]
        for part in parts:
            for module in part if isinstance(part, nn.ModuleList) else (part,):
                if any(True for _ in module.parameters()):
                    module.compile(options=dict(self.compile_options))

    def embed(self, batch: RankingBatch | TiledBatch) -> Embedded:
        """Look the batch up in the tables.

        Raises:
            DataError: a field is absent or a row is beyond its table; the error names the field.
        """
        rows = batch.batch if isinstance(batch, TiledBatch) else batch
        try:
            embedded: Embedded = self.tables(rows)
        except (RuntimeError, LookupError, ValueError) as error:
            checks.explain(rows, self.spec, error)
            raise
        return embedded

    def with_tables(self, tables: nn.Module) -> Self:
        """The same ranker with other tables, or what stands for them; all other parts are shared, and this one keeps its own."""
        other = copy(self)
        other._modules = {**self._modules, "tables": tables}
        return other

    def diagnose(self, batch: RankingBatch) -> str | None:
        """What is wrong with a batch, for whoever finds a loss that is not finite: see `recsys.ranking.checks.problem`."""
        return checks.problem(batch, self.spec)

    def score(self, embedded: Embedded, batch: RankingBatch | TiledBatch) -> Tensor:
        """Logits ``[B, tasks]`` from looked-up embeddings; of the batch itself only the dense columns are read."""
        return self.interact(self.fields(embedded, batch))

    def forward(self, batch: RankingBatch | TiledBatch) -> Tensor:
        """Logits ``[B, tasks]``."""
        return self.score(self.embed(batch), batch)

    @torch.no_grad()
    def predict(self, batch: RankingBatch | TiledBatch) -> Tensor:
        """Probabilities ``[B, tasks]``, without gradients. The caller has put the model into evaluation mode.

        Of a `TiledBatch`, what belongs to users is looked up once for each of them, and what a history is to any candidate is computed
        once: its events' vectors, and their keys and values where the attention has some.
        """
        return torch.sigmoid(self(batch))

    def loss(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, a scalar, and its detached parts by name. NaN labels do not count; the batch's weights do.

        Raises:
            DataError: see `labels`, `embed` and `fields`.
        """
        labels, embedded = self.labels(batch), self.embed(batch)
        bce = masked_bce(self.score(embedded, batch), labels, batch.weights)
        return self.with_l2(bce, {"bce": bce.detach()}, embedded)

    def with_l2(self, loss: Tensor, parts: dict[str, Tensor], embedded: Embedded) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts with the tables' penalty, where they have one: see `EmbeddingTables.penalty`."""
        penalty = self.tables.penalty(embedded)
        return (loss, parts) if penalty is None else (loss + penalty, parts | {"l2": penalty.detach()})

    @abstractmethod
    def interact(self, x_bw: Tensor) -> Tensor:
        """Logits ``[B, tasks]`` from the fields' vectors, one after another."""

    def fields(self, embedded: Embedded, batch: RankingBatch | TiledBatch) -> Tensor:
        """The vectors of the fields, one after another in the order of `widths`: ``[B, W]``.

        One tensor and not one for each field: copying hundreds of narrow columns back and forth costs more than the products of a small
        model. `recsys.ranking.part.split_fields` takes it apart.

        Raises:
            DataError: the dense columns are not what the spec says.
        """
        return self.fields_of(vectors(embedded, batch, self.spec))

    def fields_of(self, inputs: Vectors) -> Tensor:
        """See `fields`; from what was looked up, so that no table has a part in it."""
        dense = inputs.dense
        if dense.dtype != torch.float32 or dense.shape[1:] != (len(self.spec.dense),):
            raise DataError(f"dense: expected float32 [B, {len(self.spec.dense)}], got {dense.dtype} {list(dense.shape)}")
        parts, targets = [inputs.pooled], set[str]()
        for history in self._encoders():
            if (target := history.sequence.target) not in targets:  # two histories may share a candidate
                parts.append(inputs.values[target])
                targets.add(target)
            parts.append(history.read(inputs.values, inputs.reads[history.sequence.name]).flatten(1))
        parts = [part for part in (*parts, dense) if part.shape[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _encoders(self) -> list[HistoryEncoder]:
        return cast(list[HistoryEncoder], list(self.histories))

    def labels(self, batch: RankingBatch) -> Tensor:
        """The batch's labels ``[B, tasks]``.

        Raises:
            DataError: there are none, or one is neither 0 nor 1 nor NaN.
        """
        if batch.labels is None:
            raise DataError("labels: the loss needs a batch with labels")
        checks.check_labels(batch.labels, self.spec.tasks)
        return batch.labels
