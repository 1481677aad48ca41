# SPDX-License-Identifier: Apache-2.0
"""Scaling retrievers: NDCG and cross-entropy against parameters, operations of an encoded history, and users or events of training."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.core.files import read_json, sha256_json, write_json
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import EvaluationSteps
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.evaluation.retrieval import Scorer, event_ranks, model_ranks
from recsys.evaluation.tuned_baselines import tuned_item_knn, tuned_text_knn
from recsys.ranking.model import Costs
from recsys.retrieval.base import CodeRetriever, Retriever
from recsys.retrieval.baselines import Popularity
from recsys.retrieval.catalogue import Catalogue, CatalogueView, Index, check_pair
from recsys.retrieval.items import ItemTable
from recsys.scaling.item_side import ItemSide
from recsys.scaling.judge import CUTOFF, Judge, masks
from recsys.scaling.retrieval_data import RetrievalData
from recsys.scaling.subject import Measure, Measures, Subject
from recsys.training.history import History
from recsys.training.trainer import Trainer

_LONGEST = 50  # history that a reference sees
_WARM, _COLD = Measure("ndcg@10.warm", "NDCG@10, warm items"), Measure("ndcg@10.cold", "NDCG@10, cold items")


class Retrievers(Subject):
    """Retrievers on histories.

    What a retriever costs: ``tables`` are the parameters whose number grows with the catalogue, those of item embeddings, and ``dense``
    all others that are trained; ``flops`` are those of encoding one history of ``max_length`` different items, counted as they are
    computed (matrix products alone, a multiply-add counting as two, attention in full under its mask); what an index does is left out.

    Args:
        data: the histories.
        directory: for what cells share: text embeddings, collaborative vectors, codes, references.
    """

    kind: ClassVar[str] = "retriever"

    def __init__(self, data: RetrievalData, directory: Path) -> None:
        self.data, self._directory = data, directory
        self._items = ItemSide(data, directory)
        self._counted: dict[str, Costs] = {}
        self.measures = Measures(
            gain=Measure("ndcg@10", "NDCG@10"),
            loss=Measure("loss", "cross-entropy"),
            beside=(
                Measure("recall@10", "Recall@10"),
                _WARM,
                _COLD,
                Measure("recall@10.warm", "Recall@10, warm items"),
                Measure("recall@10.cold", "Recall@10, cold items"),
                Measure("loss.warm", "cross-entropy, warm items"),
                Measure("loss.cold", "cross-entropy, cold items"),
            ),
            slices=(_WARM, _COLD),
            x={
                "params": "parameters without item embeddings",
                "flops": "FLOPs per encoded history",
                "rows": f"training {data.config.count}",
            },
        )

    def identity(self, config: Config) -> dict[str, Any]:
        """See `Subject.identity`: the data, how histories are cut, and what this model is told of items."""
        told = self._items.identity(config)
        ranked = {"index": self.data.config.index.model_dump(mode="json")} if self._speaks_codes(config) else {}
        windows = self.data.config.windows.model_dump(mode="json")
        return {"data": self.data.fingerprint, "windows": windows, "items": told, **ranked}

    def costs(self, config: Config, *, tables: bool = True) -> Costs:
        """See `Subject.costs`: counted on a few items, and taken from there to the catalogue's; once for each configuration."""
        key = config.model_dump_json()
        if key not in self._counted:
            self._counted[key] = self._count(config)
        return self._counted[key]

    def references(self) -> Mapping[str, float]:
        """NDCG@10 of ``popularity``, ``item_knn`` and (where items have text) ``text_knn``, and of each on ``.warm`` and ``.cold`` items.

        They know all training events that are not of held-out items; validation chooses their settings.
        """
        known = self.data.config.text is not None
        decided = {"data": self.data.fingerprint, "text": self._items.decided("text") if known else None}
        file = self._directory / "references" / f"{sha256_json(decided)}.json"
        if not file.is_file():
            write_json(file, self._references(self._items.text if known else None))
        found: dict[str, float] = read_json(file)
        return found

    def train_and_measure(
        self, config: Config, rows: int, seed: int, batch_size: int, trainer: Trainer
    ) -> tuple[History, dict[str, float]]:
        """See `Subject.train_and_measure`."""
        history, model = self.train(config, rows, seed, batch_size, trainer)
        return history, self.judge(self.data.split.test, self._index(model)).sliced(model)

    def train(self, config: Config, rows: int, seed: int, batch_size: int, trainer: Trainer) -> tuple[History, Retriever]:
        """Train a model on ``rows`` users or events, stopped as the trainer is told to; it comes back with its best weights."""
        train = self.data.draw(rows, seed)
        items = self._items.table(config, train, rows, seed, trainer.progress)
        torch.manual_seed(seed)
        model = self._build(config, items)
        index = self._index(model)
        loader = SequenceLoader(train, model.max_length, batch_size, seed, config=self.data.config.windows)
        return trainer.fit(model, loader, self.judge(self.data.split.valid, index)), model

    def judge(self, steps: EvaluationSteps, index: Index | None) -> Judge:
        """What measures models on some steps."""
        split = self.data.split
        return Judge(split.data, split.train, steps, self.data.items.num_rows, index, self._view)

    def ranks(self, model: Retriever, steps: EvaluationSteps, places: int = CUTOFF) -> np.ndarray:
        """The rank of every target of some steps; a model of codes is asked through its index."""
        return model_ranks(model.eval(), self.data.split.data, steps, self._view, self._index(model), places=places)

    def _count(self, config: Config) -> Costs:
        with torch.random.fork_rng(devices=[]):
            one = self._build(config, self._items.outline(config, 1))
            model = self._build(config, self._items.outline(config, one.max_length + 1))
        least, more = (sum(p.numel() for p in built.parameters() if p.requires_grad) for built in (one, model))
        each = (more - least) // one.max_length
        dense = least - each
        return Costs(tables=each * self.data.items.num_rows, dense=dense, active=dense, flops=encoding_flops(model))

    @cached_property
    def _view(self) -> CatalogueView:
        return Catalogue(self.data.items["item_id"]).snapshot()

    def _build(self, config: Config, items: ItemTable) -> Retriever:
        if vars(config).get("warm_start"):
            raise ConfigError("warm_start: every cell begins anew, at whatever size; expected false")
        model: Retriever = components.build(self.kind, config, items)
        if isinstance(model, CodeRetriever):
            check_pair(model, components.get("index", self.data.config.index.name))
        return model

    def _speaks_codes(self, config: Config) -> bool:
        return issubclass(components.get(self.kind, vars(config)["name"]), CodeRetriever)

    def _index(self, model: Retriever) -> Index | None:
        """Over the codes of a model that speaks in them; training leaves them as they are."""
        if not isinstance(model, CodeRetriever):
            return None
        config = self.data.config.index
        cls: type[Index] = components.get("index", config.name)
        return cls.over(config, model, self._view)

    def _references(self, text: Tensor | None) -> dict[str, float]:
        train, count = self.data.split.train, self.data.items.num_rows

        def quality(scorer: Scorer) -> float:
            return self._ndcg(scorer, self.data.split.valid)[""]

        scorers = {
            "popularity": Popularity(Popularity.Config()).fit(train, count).scores,
            "item_knn": tuned_item_knn(train, count, quality).scores,
        }
        if text is not None:
            scorers["text_knn"] = tuned_text_knn(train, text, quality).scores
        return {f"{name}{part}": ndcg for name, s in scorers.items() for part, ndcg in self._ndcg(s, self.data.split.test).items()}

    def _ndcg(self, scorer: Scorer, steps: EvaluationSteps) -> dict[str, float]:
        """NDCG@10 over all targets (of no name), those of ``.warm`` and those of ``.cold`` items."""
        split = self.data.split
        values = ndcg_at(event_ranks(scorer, split.data, steps, _LONGEST), CUTOFF)
        chosen = masks(split.data, split.train, steps, self.data.items.num_rows)
        return {part: float(values[mask].mean()) for part, mask in chosen.items() if mask.any()}


def encoding_flops(model: Retriever) -> int:
    """Operations of encoding one history of ``max_length`` different items, which the model must have."""
    length = model.max_length
    history = SequenceBatch(torch.arange(length), torch.tensor([0, length]))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval().encode(history)
    return int(counter.get_total_flops())
