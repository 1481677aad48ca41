# SPDX-License-Identifier: Apache-2.0
"""Scaling rankers: AUC and log-loss of impressions against dense parameters, operations and training rows."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import DataError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.evaluation.metrics.normalized_entropy import normalized_entropy
from recsys.ranking.model import Costs, Ranker
from recsys.scaling.data import ScalingData
from recsys.scaling.subject import Measure, Measures, Subject
from recsys.training.history import History
from recsys.training.trainer import Trainer

_EVALUATION_BATCH = 4096


class Rankers(Subject):
    """Rankers on impressions.

    Args:
        data: the impressions.
    """

    kind: ClassVar[str] = "ranker"
    measures = Measures(
        gain=Measure("auc", "AUC"),
        loss=Measure("log_loss", "log-loss"),
        beside=(Measure("ne", "NE"),),
        slices=(),
        x={"params": "dense parameters", "flops": "FLOPs per sample, forward", "rows": "training rows"},
    )

    def __init__(self, data: ScalingData) -> None:
        self.data = data

    def identity(self, config: Config) -> dict[str, Any]:
        """See `Subject.identity`: the same for every ranker."""
        return {"data": dict(self.data.fingerprint), "spec": self.data.spec.model_dump(mode="json")}

    def costs(self, config: Config, *, tables: bool = True) -> Costs:
        """See `Subject.costs`."""
        with torch.random.fork_rng(devices=[]):
            return self._build(config, self.data.spec if tables else self._outline).costs()

    def references(self) -> Mapping[str, float]:
        """See `Subject.references`."""
        return self.data.references()

    def train_and_measure(
        self, config: Config, rows: int, seed: int, batch_size: int, trainer: Trainer
    ) -> tuple[History, dict[str, float]]:
        """See `Subject.train_and_measure`."""
        torch.manual_seed(seed)
        ranker = self._build(config, self.data.spec)
        loader = self.data.train(rows, seed, batch_size)
        history = trainer.fit(ranker, loader, lambda model: measure(model, self.data.valid(_EVALUATION_BATCH)))
        return history, measure(ranker, self.data.test(_EVALUATION_BATCH))

    @cached_property
    def _outline(self) -> InputSpec:
        """The inputs with tables of two rows, on whose number the dense part does not depend."""
        tables = tuple(table.model_copy(update={"rows": 2}) for table in self.data.spec.tables)
        return self.data.spec.model_copy(update={"tables": tables})

    def _build(self, config: Config, spec: InputSpec) -> Ranker:
        ranker: Ranker = components.build(self.kind, config, spec)
        return ranker


@torch.no_grad()
def measure(model: nn.Module, batches: Iterator[RankingBatch]) -> dict[str, float]:
    """AUC, log-loss and normalised entropy of the first task, over the rows whose label is known."""
    assert isinstance(model, Ranker)
    model.eval()
    device = next(model.parameters()).device
    found = [(model.labels(batch)[:, 0].numpy(), model.predict(batch.to(device))[:, 0].float().cpu().numpy()) for batch in batches]
    if not found:
        raise DataError("held-out rows: expected at least one batch, got none")
    labels, predicted = (np.concatenate(column).astype(np.float64) for column in zip(*found, strict=True))
    known = ~np.isnan(labels)
    labels, predicted = labels[known], predicted[known]
    return {
        "auc": auc(labels, predicted),
        "log_loss": log_loss(labels, predicted),
        "ne": normalized_entropy(labels, predicted),
    }
