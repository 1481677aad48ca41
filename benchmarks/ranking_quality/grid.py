# SPDX-License-Identifier: Apache-2.0
"""The grid: which model on which data set, of which size, tuned over which points, with which seeds; and the runner that fills it.

Every model gets the same budget and the same tuning points. A model is tuned on validation with seed 0; the best point is then trained with
each seed and scored on test. Each finished cell is a JSON line, so that the next call goes on with what is missing::

    python -m benchmarks.ranking_quality.grid --data frappe --models dcnv2,tokenmixer_large --seeds 1 --threads 1
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ranking_quality.data import CACHE, SOURCES, Encoded, load
from benchmarks.ranking_quality.train import Budget, train_ours, train_peer
from recsys.bundle.environment import code_commit
from recsys.core import components
from recsys.core.config import Config, validate
from recsys.core.files import sha256_json
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.gauc import gauc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.training.optim import DenseOptimizer

RAW = Path(__file__).parents[2] / "docs" / "results" / "raw" / "ranking_quality.jsonl"
VERSION = 2  # of what a cell means; a change of it trains every cell anew, and leaves the older ones out of the summary
DIM = 16  # of every embedding
PERMUTATION_GAIN = 5.0  # of UniMixer and Lite: with logits of noise alone they do not learn to mix in so few steps
BUDGETS = {"frappe": Budget(20, 2, 1024), "movielens_1m": Budget(12, 2, 512), "movielens_100k": Budget(12, 2, 512)}


@dataclass(frozen=True)
class Point:
    """A point of the tuning grid.

    Attributes:
        learning_rate: of the dense parameters (Adam); for peers, whose tables have the same optimizer, of all.
        table_rate: of our tables (row-wise Adagrad).
        lookup_l2: of our tables, see `EmbeddingTables.penalty`.
        table_l2: of the peers' tables, the factor of half the sum of squares, as FuxiCTR has it.
        dropout: in the model's own places, none where a model has none.
    """

    learning_rate: float
    table_rate: float
    lookup_l2: float
    table_l2: float
    dropout: float


def _points(learning_rates: tuple[float, float], *others: tuple[float, float, float, float]) -> tuple[Point, ...]:
    """Each learning rate with each of the other rates."""
    return tuple(Point(rate, *rates) for rate in learning_rates for rates in others)


# By data set, equal for every model. Frappe wants its tables trained fast, MovieLens overfits within an epoch or two.
_MOVIELENS = _points((0.0005, 0.001), (0.02, 0.0, 1e-4, 0.2), (0.05, 0.0, 1e-5, 0.2))
POINTS = {
    "frappe": _points((0.001, 0.003), (0.2, 0.0, 1e-5, 0.2), (0.4, 0.001, 0.0, 0.0)),
    "movielens_1m": _MOVIELENS,
    "movielens_100k": _MOVIELENS,
}


def _pair(large: int, small: int, **common: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two blocks, and one: of 0.22 million parameters one wide block makes more than two narrow ones."""
    return {"dim": large, "blocks": 2, **common}, {"dim": small, "blocks": 1, **common}


def _head(hidden: int) -> dict[str, Any]:
    return {"name": "towers", "hidden": (hidden,)}


# Sizes of about 0.42 million dense parameters on MovieLens-1M and 0.22 million on the two smaller sets, where the second one is given.
# `groups` stands for a tokenizer over the data set's groups and a global token: eight tokens on each data set.
SIZES: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tokenmixer_large": _pair(64, 64, tokenizer="groups", per_token={"name": "swiglu", "expansion": 1}),
    "unimixer": _pair(64, 64, tokenizer="groups"),
    "unimixing_lite": _pair(64, 64, tokenizer="groups"),
    "rankmixer": _pair(80, 80, tokenizer="groups", per_token={"name": "ffn", "expansion": 2}),
    "dcnv2": ({"hidden": (400, 400, 336)}, {"hidden": (320, 288)}),
    "wukong": (
        {"dim": DIM, "blocks": 3, "mixer": {"name": "factorization_machine", "rank": 16, "hidden": (256, 256)}, "head": _head(512)},
        {"dim": DIM, "blocks": 3, "mixer": {"name": "factorization_machine", "rank": 16, "hidden": (128, 128)}, "head": _head(512)},
    ),
    "hiformer": (
        {"dim": 32, "blocks": 2, "mixer": {"name": "hiformer", "rank": 64}},
        {"dim": 24, "blocks": 2, "mixer": {"name": "hiformer", "rank": 48}},
    ),
    "group_transformer": _pair(44, 44, tokenizer="groups"),
    "dhen": ({"dim": 32, "blocks": 3, "head": _head(256)}, {"dim": 24, "blocks": 2, "head": _head(256)}),
    "autoint": ({"dim": DIM, "deep_hidden": (528, 528)}, {"dim": DIM, "deep_hidden": (336, 336)}),
    "dlrm": ({"top": (640, 600)}, {"top": (448, 416)}),
    "masknet": ({"width": 176, "blocks": 3}, {"width": 128, "blocks": 2}),
    "finalmlp": tuple({"first": {"hidden": h}, "second": {"hidden": h}} for h in ((336, 320), (224, 208))),
    "din": ({"hidden": (640, 512)}, {"hidden": (416, 352)}),
}
HEADLINE = ("dcnv2", "tokenmixer_large", "rankmixer", "unimixer", "unimixing_lite")
OTHERS = ("wukong", "hiformer", "dhen", "autoint", "group_transformer", "dlrm", "masknet", "finalmlp", "din")
PEERS = {"rechub_dcnv2": "rechub", "fuxictr_dcnv2": "fuxictr"}


@dataclass(frozen=True)
class Job:
    """Tune a model on a data set, then score it on test with seeds 0 to ``seeds - 1``."""

    data: str
    model: str
    seeds: int


# The most informative first. Peers know fields and mean-pooled lists: our DCNv2 gets the same inputs (``/flat``) beside them.
PLAN = (
    *(Job("frappe", model, 3) for model in HEADLINE),
    *(Job("movielens_1m", model, 3) for model in HEADLINE),
    *(Job("frappe", peer, 3) for peer in PEERS),
    *(Job("frappe", model, 1) for model in OTHERS),
    *(Job("movielens_100k", model, 3) for model in HEADLINE),
    *(Job(f"{data}/flat", model, 3) for data in ("movielens_1m", "movielens_100k") for model in ("dcnv2", *PEERS)),
)
QUICK_PLAN = (Job("frappe", "dcnv2", 1), Job("frappe", "tokenmixer_large", 1))


def size(model: str, data: str) -> dict[str, Any]:
    """The preset of a model on a data set."""
    return SIZES[model][0 if data.startswith("movielens_1m") else 1]


def model_config(model: str, data: Encoded, point: Point, anneal_steps: int) -> Config:
    """The configuration of one of our models.

    Args:
        model: its registered name.
        data: the inputs.
        point: the rates.
        anneal_steps: for mixers whose temperature falls.
    """
    cls = components.get("ranker", model)
    content: dict[str, Any] = {"name": model, **size(model, data.name)}
    content["embedding"] = {"dim": DIM, "pooling": "mean", "learning_rate": point.table_rate, "l2": point.lookup_l2}
    if content.get("tokenizer") == "groups":
        content["tokenizer"] = {"name": "groups", "groups": {name: list(fields) for name, fields in data.spec.groups.items()}}
    if model.startswith("uni"):
        schedule = {"temperature": {"anneal_steps": anneal_steps}}
        content["mixer"] = {"name": cls.Config().mixer.name, "permutation_gain": PERMUTATION_GAIN, **schedule}
    if "dropout" in cls.Config.model_fields:
        content["dropout"] = point.dropout
    for stream in ("first", "second") if model == "finalmlp" else ():
        content[stream] = content[stream] | {"dropout": point.dropout}
    return validate(cls.Config, content)


def peer_request(data: Encoded, point: Point) -> dict[str, Any]:
    """A peer's DCNv2 of our DCNv2's size."""
    hidden = list(size("dcnv2", data.name)["hidden"])
    rates = {"learning_rate": point.learning_rate, "embedding_l2": point.table_l2, "dropout": point.dropout}
    return {"dim": DIM, "hidden": hidden, "cross_layers": 3, **rates}


class Grid:
    """The finished cells in a file of JSON lines, and the runner of those that are missing.

    Args:
        raw: the file.
        points: the tuning grid, in the place of the data set's.
        budget: of every training, in the place of the data set's.
        threads: for torch.
        cache: where encoded data and test predictions are kept.
    """

    def __init__(
        self, raw: Path, points: Sequence[Point] | None = None, budget: Budget | None = None, threads: int = 1, cache: Path = CACHE
    ) -> None:
        self.raw, self.points, self.budget, self.threads, self.cache = raw, points, budget, threads, cache
        self._load = lru_cache(maxsize=2)(lambda name: load(name, cache))

    @classmethod
    def quick(cls) -> "Grid":
        """One point and two epochs, in a file of its own."""
        return cls(CACHE / "quick.jsonl", POINTS["frappe"][:1], Budget(2, 2, 1024))

    def records(self) -> list[dict[str, Any]]:
        """The finished cells, in the order in which they were finished."""
        if not self.raw.is_file():
            return []
        return [json.loads(line) for line in self.raw.read_text(encoding="utf-8").splitlines() if line.strip()]

    def fill(self, plan: Sequence[Job]) -> None:
        """Train every cell of a plan that is not finished; a job that cannot run is reported and left out."""
        torch.set_num_threads(self.threads)
        for job in plan:
            try:
                self._job(job)
            except Exception as error:  # the other cells do not depend on it, and a night's run must not end with it
                _say(f"{job.data} {job.model}: {type(error).__name__}: {error}")

    def _job(self, job: Job) -> None:
        points = self.points or POINTS[job.data.partition("/")[0]]
        tuned = [self._cell(job, point, 0) for point in points]
        best = max(range(len(tuned)), key=lambda i: tuned[i]["valid"][tuned[i]["best_epoch"]]["auc"])
        for seed in range(job.seeds):
            self._cell(job, points[best], seed, tuned[best])

    def _cell(self, job: Job, point: Point, seed: int, tuned: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The record of a cell, trained now unless it is finished; a final one where ``tuned`` is given, the record of its point."""
        final = tuned is not None
        data = self._load(job.data)
        budget = self.budget or BUDGETS[job.data.partition("/")[0]]
        config = self._config(job.model, data, point, budget)
        identity = {
            "version": VERSION,
            "data": job.data,
            "fingerprint": data.fingerprint,
            "model": job.model,
            "stage": "final" if final else "tune",
            "seed": seed,
            "point": asdict(point),
            "budget": asdict(budget),
            "config": config.model_dump(mode="json") if isinstance(config, Config) else config,
        }
        key = sha256_json(identity)[:16]
        for record in self.records():
            if record["cell"] == key and (not final or self.predictions(key).is_file()):
                return record
        if tuned is not None and tuned["seed"] == seed and self.predictions(tuned["cell"]).is_file():  # trained already; scored now
            shutil.copyfile(self.predictions(tuned["cell"]), self.predictions(key))
            outcome = {name: tuned[name] for name in _TRAINED}
        else:
            outcome = self._train(key, job.model, config, point, data, budget, seed)
        scores = {"test": _scores(np.load(self.predictions(key)), data)} if final else {}
        record = {"cell": key, **identity, **outcome, **scores}
        record |= {"threads": self.threads, "commit": code_commit(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        with self.raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        _say(_line(record))
        return record

    def predictions(self, cell: str) -> Path:
        """Where the test predictions of a cell stand: float32, in the order of the rows. Tuning does not look at them."""
        return self.cache / "predictions" / f"{cell}.npy"

    @staticmethod
    def _config(model: str, data: Encoded, point: Point, budget: Budget) -> Config | dict[str, Any]:
        if model in PEERS:
            return peer_request(data, point)
        steps = -(-len(data.parts["train"]) // budget.batch_size)
        return model_config(model, data, point, anneal_steps=steps)  # an epoch: on MovieLens the best is the first or the second

    def _train(
        self, key: str, model: str, config: Config | dict[str, Any], point: Point, data: Encoded, budget: Budget, seed: int
    ) -> dict[str, Any]:
        """Train, keep the test predictions, and say what came of it."""
        if isinstance(config, Config):
            optimizer = DenseOptimizer(name="adam", learning_rate=point.learning_rate)
            outcome = train_ours(config, optimizer, data, budget, seed)
        else:
            outcome = train_peer(PEERS[model], config, data, budget, seed, threads=self.threads, log=_say)
        self.predictions(key).parent.mkdir(parents=True, exist_ok=True)
        np.save(self.predictions(key), outcome.test)
        sizes = (outcome.dense_parameters, outcome.table_parameters)
        return dict(zip(_TRAINED, (list(outcome.valid), outcome.best, round(outcome.seconds, 1), *sizes), strict=True))


_TRAINED = ("valid", "best_epoch", "seconds", "dense_parameters", "table_parameters")


def _scores(predicted: np.ndarray, data: Encoded) -> dict[str, float]:
    """What a record says of predictions of the test rows."""
    part = data.parts["test"]
    grouped = gauc(part.labels, predicted, part.users).value
    return {"auc": auc(part.labels, predicted), "logloss": log_loss(part.labels, predicted), "gauc": grouped}


def _line(record: Mapping[str, Any]) -> str:
    best = record["valid"][record["best_epoch"]]
    test = "".join(f"  test {name} {value:.4f}" for name, value in record.get("test", {}).items())
    rates = "/".join(f"{value:g}" for value in record["point"].values())
    where = f"{record['data']} {record['model']} {record['stage']} {rates} seed {record['seed']}"
    return (
        f"{where}: valid auc {best['auc']:.4f} logloss {best['logloss']:.4f} epoch {record['best_epoch'] + 1}{test}  {record['seconds']} s"
    )


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str]) -> int:
    """Fill the part of the plan that the arguments leave."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking_quality.grid", description=__doc__)
    parser.add_argument("--data", help=f"comma-separated: {', '.join(SOURCES)}, also with /flat; all by default")
    parser.add_argument("--models", help=f"comma-separated: {', '.join((*SIZES, *PEERS))}; all by default")
    parser.add_argument("--seeds", type=int, help="at most so many seeds of each model")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--raw", type=Path, default=RAW, help="the file of finished cells")
    arguments = parser.parse_args(argv)
    plan = select(PLAN, arguments.data, arguments.models, arguments.seeds)
    Grid(arguments.raw, threads=arguments.threads).fill(plan)
    return 0


def select(plan: Sequence[Job], data: str | None = None, models: str | None = None, seeds: int | None = None) -> list[Job]:
    """The jobs of a plan that a choice of data sets and models leaves, in the plan's order."""
    chosen = [job for job in plan if (data is None or job.data in data.split(",")) and (models is None or job.model in models.split(","))]
    return [replace(job, seeds=job.seeds if seeds is None else min(job.seeds, seeds)) for job in chosen]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
