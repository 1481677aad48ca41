# SPDX-License-Identifier: Apache-2.0
"""The grid: which model on which data set, tuned over which points, with which seeds; and the runner that fills it.

A model is tuned on validation with seed 0; the best point is then trained with each seed and ranked on test. Each finished cell is a
JSON line, so that the next call goes on with what is missing, and a training that was interrupted goes on from its checkpoint::

    python -m benchmarks.retrieval_quality.grid --data beauty --models sasrec --seeds 1
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.retrieval_quality.data import CACHE, SOURCES, Dataset, load
from recsys.bundle.environment import code_commit
from recsys.core import components
from recsys.core.config import Config, validate
from recsys.core.files import sha256_json
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import event_ranks, vector_scorer
from recsys.retrieval.base import Retriever, VectorRetriever
from recsys.retrieval.baselines import ItemKNN, Popularity, RepeatLast
from recsys.retrieval.items import ItemTable
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer

RAW = Path(__file__).parents[2] / "docs" / "results" / "raw" / "retrieval_quality.jsonl"
VERSION = 1  # of what a cell means
EVERY = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        model: its configuration.
        points: what is tuned: dotted keys of the cell's configuration and their values, one mapping for each point.
        windows: of the histories.
        training: batch size, and the trainer's configuration.
    """

    model: Mapping[str, Any]
    points: Sequence[Mapping[str, Any]]
    windows: Mapping[str, Any]
    training: Mapping[str, Any]


def _training(batch_size: int, epochs: int, rate: float, patience: int) -> dict[str, Any]:
    trainer = {"epochs": epochs, "optimizer": {"name": "adamw", "learning_rate": rate, "weight_decay": 0.01}, "precision": "fp32"}
    return {"batch_size": batch_size, "trainer": trainer | {"monitor": {"metric": "ndcg@10", "mode": "max", "patience": patience}}}


_DROPOUTS = ({"model.dropout": 0.2}, {"model.dropout": 0.5})
PLANS: Mapping[str, Plan] = {
    "sasrec": Plan({"dim": 64, "blocks": 2, "heads": 2}, _DROPOUTS, {"stride": 50}, _training(256, 100, 1e-3, 8)),
    "hstu": Plan({"dim": 64, "blocks": 2, "heads": 2}, _DROPOUTS, {"stride": 50}, _training(256, 100, 1e-3, 8)),
}
WINDOWS = {"ml_1m": 200}  # as the marks of the literature have it; 50 elsewhere
# Their own few settings are tuned on validation inside the cell.
BASELINES = ("popularity", "repeat_last", "item_knn")
_DECAYS = (1.0, 0.9, 0.8, 0.7, 0.6)


def validation(ranks: np.ndarray) -> dict[str, float]:
    """Every metric of ranks."""
    found = {f"recall@{k}": float(recall_at(ranks, k).mean()) for k in (5, 10)}
    return found | {f"ndcg@{k}": float(ndcg_at(ranks, k).mean()) for k in (5, 10)}


class Grid:
    """The finished cells in a file of JSON lines, and the runner of those that are missing.

    Args:
        raw: the file.
        cache: where ranks, checkpoints and encoded texts are kept.
        epochs: of every training, in the place of the plan's.
    """

    def __init__(self, raw: Path = RAW, cache: Path = CACHE, epochs: int | None = None) -> None:
        self.raw, self.cache, self._epochs = raw, cache, epochs

    def records(self) -> list[dict[str, Any]]:
        """The finished cells, in the order in which they were finished."""
        if not self.raw.is_file():
            return []
        return [json.loads(line) for line in self.raw.read_text(encoding="utf-8").splitlines() if line.strip()]

    def fill(self, data: Dataset, model: str, seeds: int) -> None:
        """Tune a model on a data set and rank the test events with each seed, where that is not done."""
        if model in BASELINES:
            self._cell(data, model, {}, 0, final=True)
            return
        plan = PLANS[model]
        configs = [self._config(data.name, model, plan, point) for point in plan.points]
        tuned = [self._cell(data, model, config, 0, final=False) for config in configs]
        best = max(range(len(tuned)), key=lambda i: tuned[i]["valid"]["ndcg@10"])
        for seed in range(seeds):
            self._cell(data, model, configs[best], seed, final=True)
        for config in configs:
            shutil.rmtree(self._folder(data, config, 0), ignore_errors=True)

    def ranks(self, cell: str) -> Path:
        """Where the ranks of a cell's test events stand: float64, in the order of the steps."""
        return self.cache / "ranks" / f"{cell}.npy"

    def _folder(self, data: Dataset, config: Mapping[str, Any], seed: int) -> Path:
        """Where a training keeps its checkpoints. What tuning trained with seed 0 is tested from there, and not trained again."""
        return self.cache / "training" / sha256_json([data.name, data.fingerprint, config, seed])[:16]

    def _config(self, data: str, model: str, plan: Plan, point: Mapping[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps({"model": {"name": model, **plan.model}, "windows": plan.windows, "training": plan.training}))
        if data in WINDOWS:
            config["model"]["max_length"] = config["windows"]["stride"] = WINDOWS[data]
        if self._epochs is not None:
            config["training"]["trainer"]["epochs"] = self._epochs
        for key, value in point.items():
            section, name = key.split(".")
            config[section][name] = value
        return dict(config)

    def _cell(self, data: Dataset, model: str, config: dict[str, Any], seed: int, *, final: bool) -> dict[str, Any]:
        """The record of a cell; the trained model's ranks of the test events are computed for a final one only."""
        identity = {"version": VERSION, "data": data.name, "fingerprint": data.fingerprint, "model": model, "seed": seed, "config": config}
        stage = "final" if final else "tune"
        key = _key(identity, stage)
        for record in self.records():
            if record["cell"] == key and (not final or self.ranks(key).is_file()):
                return record
        outcome, ranks = self._baseline(data, model) if model in BASELINES else self._train(data, config, seed, final)
        if ranks is not None:
            self.ranks(key).parent.mkdir(parents=True, exist_ok=True)
            np.save(self.ranks(key), ranks)
            outcome["test"] = validation(ranks)
        if final and (tuned := next((r for r in self.records() if r["cell"] == _key(identity, "tune")), None)):
            outcome["seconds"] = tuned["seconds"]  # it was trained then
        record = {"cell": key, **identity, "stage": stage, **outcome, "commit": code_commit()}
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        with self.raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        say(record)
        return record

    def _train(self, data: Dataset, config: dict[str, Any], seed: int, final: bool) -> tuple[dict[str, Any], np.ndarray | None]:
        folder = self._folder(data, config, seed)
        cls = components.get("retriever", config["model"]["name"])
        torch.manual_seed(seed)
        model: Retriever = cls(validate(cls.Config, config["model"]), ItemTable(data.count, data.warm))
        assert isinstance(model, VectorRetriever)
        windows = validate(SequenceLoader.Config, config["windows"])
        loader = SequenceLoader(data.split.train, model.max_length, config["training"]["batch_size"], seed, config=windows)
        training: Config = validate(Trainer.Config, config["training"]["trainer"])
        assert isinstance(training, Trainer.Config)

        def measure(module: nn.Module) -> dict[str, float]:
            assert isinstance(module, VectorRetriever)
            return validation(event_ranks(vector_scorer(module), data.data, data.split.valid, module.max_length))

        started = perf_counter()
        history = Trainer(training, folder, progress=NoProgress(), context={"cell": config, "seed": seed}).fit(model, loader, measure)
        seconds = perf_counter() - started
        best = max(history.epochs, key=lambda epoch: epoch.validation["ndcg@10"])
        outcome = {
            "valid": dict(best.validation),
            "best_epoch": best.epoch,
            "epochs": len(history.epochs),
            "seconds": round(seconds, 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "curve": [round(epoch.validation["ndcg@10"], 5) for epoch in history.epochs],
            "threads": torch.get_num_threads(),
        }
        ranks = event_ranks(vector_scorer(model), data.data, data.split.test, model.max_length) if final else None
        if final:
            shutil.rmtree(folder, ignore_errors=True)
        return outcome, ranks

    def _baseline(self, data: Dataset, name: str) -> tuple[dict[str, Any], np.ndarray]:
        train, longest = data.split.train, 50
        if name == "item_knn":
            tried = [ItemKNN(ItemKNN.Config(neighbours=data.count, decay=decay)).fit(train, data.count) for decay in _DECAYS]
            valid = [validation(event_ranks(model.scores, data.data, data.split.valid, longest)) for model in tried]
            best = max(range(len(tried)), key=lambda i: valid[i]["ndcg@10"])
            ranks = event_ranks(tried[best].scores, data.data, data.split.test, longest)
            return {"valid": valid[best], "chosen": {"decay": _DECAYS[best]}}, ranks
        model = Popularity(Popularity.Config()) if name == "popularity" else RepeatLast(RepeatLast.Config())
        scorer = model.fit(train, data.count).scores
        valid_ranks, ranks = (event_ranks(scorer, data.data, steps, longest) for steps in (data.split.valid, data.split.test))
        return {"valid": validation(valid_ranks)}, ranks


def _key(identity: Mapping[str, Any], stage: str) -> str:
    return sha256_json({**identity, "stage": stage})[:16]


def say(record: Mapping[str, Any]) -> None:
    """One line for a finished cell."""
    shown = record.get("test") or record["valid"]
    figures = "  ".join(f"{name} {shown[name]:.4f}" for name in EVERY)
    epochs = f"  best epoch {record['best_epoch']} of {record['epochs']}" if "epochs" in record else ""
    where = f"{record['data']} {record['model']} {record['stage']} seed {record['seed']}"
    print(f"{where}: {'test' if 'test' in record else 'valid'} {figures}{epochs}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Fill the part of the grid that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_quality.grid", description=__doc__)
    parser.add_argument("--data", default="beauty", help=f"comma-separated: {', '.join(SOURCES)}")
    parser.add_argument("--models", help=f"comma-separated: {', '.join((*BASELINES, *PLANS))}; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--raw", type=Path, default=RAW, help="the file of finished cells")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    grid = Grid(arguments.raw)
    for name in arguments.data.split(","):
        data = load(name)
        for model in arguments.models.split(",") if arguments.models else (*BASELINES, *PLANS):
            grid.fill(data, model, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
