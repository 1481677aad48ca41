# SPDX-License-Identifier: Apache-2.0
"""Train a model of the grid, and rank the events of a period with it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.retrieval_quality.data import Dataset
from recsys.core import components
from recsys.core.config import Config, validate
from recsys.data.sequences import EvaluationSteps
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import model_ranks
from recsys.retrieval.base import CodeRetriever, Retriever
from recsys.retrieval.catalogue import Catalogue, GatherIndex, Index
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SASRec, SETRec
from recsys.training.progress import NoProgress
from recsys.training.trainer import History, Trainer

PLACES = 100  # of the lists that are ranked where the scores of all items would cost too much


def metrics(ranks: np.ndarray) -> dict[str, float]:
    """Every metric of ranks."""
    found = {f"recall@{k}": float(recall_at(ranks, k).mean()) for k in (5, 10)}
    return found | {f"ndcg@{k}": float(ndcg_at(ranks, k).mean()) for k in (5, 10)}


class Training:
    """One cell's model, and how it is trained.

    Args:
        data: the data set.
        config: of the cell, see `benchmarks.retrieval_quality.grid.Grid`.
        seed: of everything that is random.
        items: what the model reads of them.
        start: the collaborative model, where the model begins with its weights.

    Attributes:
        model: the model.
        view: of the catalogue.
    """

    def __init__(self, data: Dataset, config: Mapping[str, Any], seed: int, items: ItemTable, start: SASRec | None) -> None:
        self._data, self._config, self._seed = data, config, seed
        cls = components.get("retriever", config["model"]["name"])
        torch.manual_seed(seed)
        self.model: Retriever = cls(validate(cls.Config, dict(config["model"])), items)
        if isinstance(self.model, SETRec) and self.model.config.warm_start:
            assert start is not None
            self.model.warm_start(start)
        self.view = Catalogue([str(row) for row in range(data.count)]).snapshot()
        self._index = self._over(config.get("ranking", {}).get("index"))

    def fit(self, folder: Path) -> dict[str, Any]:
        """Train, or go on with what stands in the folder; returns what a cell's record says of it."""
        config = self._config
        windows = validate(SequenceLoader.Config, config["windows"])
        batch_size = config["training"]["batch_size"]
        loader = SequenceLoader(self._data.split.train, self.model.max_length, batch_size, self._seed, config=windows)
        training: Config = validate(Trainer.Config, config["training"]["trainer"])
        assert isinstance(training, Trainer.Config)
        steps = self._validation()

        def measure(_: nn.Module) -> dict[str, float]:
            return metrics(self.ranks(steps))

        started = perf_counter()
        trainer = Trainer(training, folder, progress=NoProgress(), context={"cell": dict(config), "seed": self._seed})
        history = trainer.fit(self.model, loader, measure)
        return self._outcome(history, perf_counter() - started) | self._choose_beta(steps)

    def ranks(self, steps: EvaluationSteps, *, exclude_seen: bool = True) -> np.ndarray:
        """The rank of every target of the steps; items of the history are left out, or not."""
        return model_ranks(self.model, self._data.data, steps, self.view, self._index, places=PLACES, exclude_seen=exclude_seen)

    def _over(self, config: Mapping[str, Any] | None) -> Index | None:
        """The index over codes, which training leaves as they are."""
        if not isinstance(self.model, CodeRetriever):
            return None
        cls: type[Index] = GatherIndex if config is None else components.get("index", config["name"])
        return cls.over(validate(cls.Config, dict(config or {})), self.model, self.view)

    def _validation(self) -> EvaluationSteps:
        steps, wanted = self._data.split.valid, self._config.get("ranking", {}).get("validation")
        return steps if wanted is None else steps.sample(wanted, 0)

    def _outcome(self, history: History, seconds: float) -> dict[str, Any]:
        best = max(history.epochs, key=lambda epoch: epoch.validation["ndcg@10"])
        return {
            "valid": dict(best.validation),
            "best_epoch": best.epoch,
            "epochs": len(history.epochs),
            "seconds": round(seconds, 1),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "curve": [round(epoch.validation["ndcg@10"], 5) for epoch in history.epochs],
            "threads": torch.get_num_threads(),
        }

    def _choose_beta(self, steps: EvaluationSteps) -> dict[str, Any]:
        """Set the weight of SETRec's semantic slots to the one that validation prefers, and say what each came to."""
        betas: Sequence[float] = self._config.get("ranking", {}).get("betas", ())
        if not isinstance(self.model, SETRec) or not betas:
            return {}
        found = {}
        for beta in betas:
            self.model.set_beta(beta)
            found[beta] = metrics(self.ranks(steps))
        best = max(found, key=lambda beta: found[beta]["ndcg@10"])
        self.model.set_beta(best)
        curve = {str(beta): round(values["ndcg@10"], 5) for beta, values in found.items()}
        return {"valid": found[best], "chosen": {"beta": best}, "betas": curve}


def forget(folder: Path) -> None:
    """Remove a finished training's checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
