# SPDX-License-Identifier: Apache-2.0
"""The grid: which model on which data set, tuned over which points, with which seeds; and the runner that fills it.

A model is tuned on validation with seed 0; the best point is then trained with each seed and ranked on test. Each finished cell is a
JSON line, so that the next call goes on with what is missing, and a training that was interrupted goes on from its checkpoint::

    python -m benchmarks.retrieval_quality.grid --data beauty --models sasrec --seeds 0
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.retrieval_quality.data import CACHE, SOURCES, Dataset, load
from benchmarks.retrieval_quality.items import items_of, keep, kept, text_of
from benchmarks.retrieval_quality.plans import LENGTHS, PLANS, Plan
from benchmarks.retrieval_quality.train import PLACES, Training, forget, metrics
from recsys.bundle.environment import code_commit
from recsys.core.files import sha256_json
from recsys.evaluation.retrieval import Scorer, event_ranks
from recsys.evaluation.tuned_baselines import tuned_item_knn, tuned_text_knn
from recsys.retrieval.baselines import Baseline, Popularity, RepeatLast
from recsys.retrieval.models import SASRec
from recsys.scaling.lines import Lines

RAW = Path(__file__).parents[2] / "docs" / "results" / "raw" / "retrieval_quality.jsonl"
VERSION = 1  # of what a cell means
EVERY = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
# Their own few settings are tuned on validation inside the cell.
BASELINES = ("popularity", "repeat_last", "item_knn", "text_knn")


class Grid:
    """The finished cells in a file of JSON lines, and the runner of those that are missing.

    Beside the file stands a folder with the ranks of every tested cell, from which intervals and slices are made.

    Args:
        raw: the file.
        cache: where checkpoints, models that others read, and encoded texts are kept.
        epochs: of every training, in the place of the plan's.
    """

    def __init__(self, raw: Path = RAW, cache: Path = CACHE, epochs: int | None = None) -> None:
        self.raw, self.cache, self._epochs = raw, cache, epochs
        self._lines = Lines(raw, "cell")

    def records(self) -> list[dict[str, Any]]:
        """The finished cells, in the order in which they were finished."""
        return list(self._lines.read().values())

    def fill(self, data: Dataset, model: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Tune a model on a data set and rank the test events with each seed, where that is not done; returns the records of the seeds."""
        if model in BASELINES:
            return [self._cell(data, model, {}, 0, final=True)]
        plan = PLANS[model]
        points = plan.points_on(data.name)
        configs = [self._config(data, model, plan, point, 0) for point in points]
        tuned = [self._cell(data, model, config, 0, final=False) for config in configs]
        best = max(range(len(tuned)), key=lambda i: tuned[i]["valid"]["ndcg@10"])
        found = [self._cell(data, model, self._config(data, model, plan, points[best], seed), seed, final=True) for seed in seeds]
        for config in configs:
            forget(self._folder(data, config, 0))
        return found

    def ranks(self, cell: str) -> Path:
        """Where the ranks of a cell's test events stand, in the order of the steps; see `read_ranks`."""
        return self.raw.with_suffix("") / f"{cell}.npz"

    def model(self, cell: str) -> Path:
        """Where the model of a cell stands, where others read its item vectors."""
        return self.cache / "models" / cell

    def _folder(self, data: Dataset, config: Mapping[str, Any], seed: int) -> Path:
        """Where a training keeps its checkpoints. What tuning trained with seed 0 is tested from there, and not trained again."""
        return self.cache / "training" / sha256_json([data.name, data.fingerprint, config, seed])[:16]

    def _config(self, data: Dataset, model: str, plan: Plan, point: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """All that decides a cell's result but data and seed."""
        name = model.split("_")[0]
        parts = {"model": {"name": name, **plan.model}, "windows": plan.windows, "training": plan.training}
        ranking = {"index": plan.index, "validation": plan.validation, "betas": list(plan.betas) or None}
        items = {
            "text": plan.text,
            "columns": plan.text and data.columns,
            "codes": plan.codes,
            "collaborative": self._collaborative(data, plan, seed),
        }
        for section, values in (("ranking", ranking), ("items", items)):
            if given := {key: value for key, value in values.items() if value is not None}:
                parts[section] = given
        config = json.loads(json.dumps(parts))
        if data.name in LENGTHS:
            config["model"]["max_length"] = config["windows"]["stride"] = LENGTHS[data.name]
        if self._epochs is not None:
            config["training"]["trainer"]["epochs"] = self._epochs
        for key, value in point.items():
            *sections, last = key.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[last] = value
        return dict(config)

    def _collaborative(self, data: Dataset, plan: Plan, seed: int) -> str | None:
        """The cell of the model whose item vectors are read, trained where that is not done."""
        if plan.collaborative is None:
            return None
        return str(self.fill(data, plan.collaborative, [seed])[0]["cell"])

    def _cell(self, data: Dataset, model: str, config: dict[str, Any], seed: int, *, final: bool) -> dict[str, Any]:
        """The record of a cell; the trained model's ranks of the test events are computed for a final one only."""
        identity = {"version": VERSION, "data": data.name, "fingerprint": data.fingerprint, "model": model, "seed": seed, "config": config}
        stage = "final" if final else "tune"
        key = _key(identity, stage)
        whole = final and any(plan.collaborative == model for plan in PLANS.values())
        finished = self._lines.read()
        record = finished.get(key)
        if record is not None and (not final or self.complete(record)) and (not whole or self.model(key).is_dir()):
            return record
        outcome, ranks = (
            self._baseline(data, model) if model in BASELINES else self._train(data, config, seed, final, key if whole else None)
        )
        if ranks is not None:
            write_ranks(self.ranks(key), ranks)
            outcome["test"] = metrics(ranks)
        if final and (tuned := finished.get(_key(identity, "tune"))):
            outcome["seconds"] = tuned["seconds"]  # it was trained then
        record = {"cell": key, **identity, "stage": stage, **outcome, "commit": code_commit()}
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._lines.append(record)
        say(record)
        return record

    def complete(self, record: Mapping[str, Any]) -> bool:
        """Whether a final record says all that is asked today; an older one is made again."""
        return "test_with_seen" in record and self.ranks(record["cell"]).is_file()

    def _train(
        self, data: Dataset, config: dict[str, Any], seed: int, final: bool, kept_as: str | None
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        folder = self._folder(data, config, seed)
        wanted = config.get("items", {})
        collaborative: SASRec | None = kept(data, self.model(wanted["collaborative"])) if "collaborative" in wanted else None
        training = Training(data, config, seed, items_of(data, wanted, collaborative), collaborative)
        outcome = training.fit(folder)
        ranks = training.ranks(data.split.test) if final else None
        if final:
            outcome["test_with_seen"] = metrics(training.ranks(data.split.test, exclude_seen=False))
            forget(folder)
        if kept_as is not None:
            assert isinstance(training.model, SASRec)
            keep(training.model, self.model(kept_as))
        return outcome, ranks

    def _baseline(self, data: Dataset, name: str) -> tuple[dict[str, Any], np.ndarray]:
        train, longest = data.split.train, 50

        # Pooling by the maximum looks at every event of a history beside every item, so that text-kNN is tuned on a sample.
        sample = data.split.valid.sample(2000, 0) if name == "text_knn" else data.split.valid

        def quality(scorer: Scorer) -> float:
            return metrics(event_ranks(scorer, data.data, sample, longest))["ndcg@10"]

        model: Baseline
        if name == "item_knn":
            model = tuned_item_knn(train, data.count, quality)
        elif name == "text_knn":
            model = tuned_text_knn(train, text_of(data, "minilm"), quality)
        else:
            model = (Popularity(Popularity.Config()) if name == "popularity" else RepeatLast(RepeatLast.Config())).fit(train, data.count)
        valid_ranks, ranks = (event_ranks(model.scores, data.data, steps, longest) for steps in (data.split.valid, data.split.test))
        with_seen = metrics(event_ranks(model.scores, data.data, data.split.test, longest, exclude_seen=False))
        return {"valid": metrics(valid_ranks), "chosen": model.config.model_dump(mode="json"), "test_with_seen": with_seen}, ranks


def write_ranks(file: Path, ranks: np.ndarray) -> None:
    """Keep ranks in a byte each, as a number of halves, since ties have ranks between: those beyond `PLACES` as 0."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, ranks=np.where(ranks <= PLACES, 2 * ranks, 0).astype(np.uint8))


def read_ranks(file: Path) -> np.ndarray:
    """float64 ``[targets]``: what `write_ranks` kept; infinity beyond `PLACES`."""
    with np.load(file, allow_pickle=False) as stored:
        ranks: np.ndarray = stored["ranks"] / 2
    return np.where(ranks == 0, np.inf, ranks)


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
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2], help="comma-separated")
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
