# SPDX-License-Identifier: Apache-2.0
"""Train one cell: a model on a data set at one point of the tuning grid, with early stopping on validation AUC."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from benchmarks.peers import python_of
from benchmarks.ranking_quality.data import Encoded, padded
from recsys.core import components
from recsys.core.config import Config
from recsys.data.loader import TableLoader
from recsys.data.splits import PARTS
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.ranking.token_ranker import TokenRanker
from recsys.training.optim import DenseOptimizer
from recsys.training.progress import NoProgress
from recsys.training.trainer import Monitor, Trainer

_CHUNK = 4096
_CLIP = 10.0  # as FuxiCTR clips
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Budget:
    """What every model may use: at most so many epochs, stopped after ``patience`` epochs without a better validation AUC."""

    epochs: int
    patience: int
    batch_size: int


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        valid: ``auc`` and ``logloss`` on validation after each epoch.
        dense_parameters: those outside the tables.
        table_parameters: those of the tables.
        test: probabilities float32 of the test rows by the weights of the best epoch.
        seconds: of training, validation included.
    """

    valid: Sequence[dict[str, float]]
    dense_parameters: int
    table_parameters: int
    test: np.ndarray
    seconds: float

    @property
    def best(self) -> int:
        """The epoch of the best validation AUC, from 0."""
        return int(np.argmax([epoch["auc"] for epoch in self.valid]))


def train_ours(config: Config, optimizer: DenseOptimizer, data: Encoded, budget: Budget, seed: int) -> Outcome:
    """Train a registered ranker with the framework's trainer."""
    torch.manual_seed(seed)
    model = components.build("ranker", config, data.spec)
    costs = model.costs()
    labels = data.parts["valid"].labels
    rows = pa.table({"row": np.arange(len(data.parts["train"]))})
    loader = TableLoader(rows, lambda t: data.batch("train", t["row"].to_numpy()), batch_size=budget.batch_size, seed=seed)

    def validate(module: nn.Module) -> dict[str, float]:
        predicted = predict(module, data, "valid")
        return {"auc": auc(labels, predicted), "logloss": log_loss(labels, predicted)}

    monitor = Monitor(metric="auc", patience=budget.patience)
    training = Trainer.Config(epochs=budget.epochs, optimizer=optimizer, clip_norm=_CLIP, precision="fp32", monitor=monitor)
    # On one thread compiling makes a step of blocks over tokens a third shorter, and one of a few wide layers longer.
    training = training.model_copy(update={"compile": isinstance(model, TokenRanker)})
    with tempfile.TemporaryDirectory(prefix="ranking_quality_") as folder:
        started = time.perf_counter()
        history = Trainer(training, Path(folder) / "run", progress=NoProgress()).fit(model, loader, validate)
        seconds = time.perf_counter() - started
    valid = [dict(record.validation) for record in history.epochs]
    return Outcome(valid, costs.dense, costs.tables, predict(model, data, "test"), seconds)


def predict(model: Any, data: Encoded, part: str) -> np.ndarray:
    """float32 probabilities ``[N]`` of a part's rows, in their order."""
    model.eval()
    rows = np.arange(len(data.parts[part]))
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    return np.concatenate([model.predict(data.batch(part, chunk))[:, 0].numpy() for chunk in chunks])


def train_peer(
    peer: str, request: dict[str, Any], data: Encoded, budget: Budget, seed: int, *, threads: int, log: Callable[[str], None]
) -> Outcome:
    """Train a peer's DCNv2 in its environment on the same encoded rows: arrays in a file, predictions out.

    Raises:
        RuntimeError: the environment is not there, or the peer failed.
    """
    with tempfile.TemporaryDirectory(prefix="ranking_quality_") as folder:
        place = Path(folder)
        arrays, fields = peer_inputs(data)
        np.savez(place / "data.npz", **arrays)
        content = {**request, "fields": fields, "seed": seed, "threads": threads, **vars(budget)}
        (place / "request.json").write_text(json.dumps(content))
        script = Path(__file__).with_name(f"peers_{peer}.py")
        variables = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        done = subprocess.run([str(python_of(peer)), str(script), folder], env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            log(done.stderr[-2000:])
            raise RuntimeError(f"{peer} ended with status {done.returncode}; its error stands above")
        answer = json.loads((place / "answer.json").read_text())
        predictions = np.load(place / "test.npy")
    return Outcome(answer["valid"], answer["dense_parameters"], answer["table_parameters"], predictions, answer["seconds"])


def peer_inputs(data: Encoded) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Arrays for a peer, ``<part>.<key>`` and ``<part>.label``, and for each key its name, table, number of table rows and longest list.

    Raises:
        ValueError: the data has sequences; peers get `Encoded.flat`.
    """
    if data.spec.sequences:
        raise ValueError(f"{data.name}: peers take no sequences; give them {data.name}/flat")
    arrays = {f"{part}.label": data.parts[part].labels for part in PARTS}
    fields = []
    for table in data.spec.tables:
        for key in table.bags:
            columns = {part: padded(data.parts[part], key) for part in PARTS}
            longest = max(column.shape[1] for column in columns.values())
            columns = {part: np.pad(column, ((0, 0), (0, longest - column.shape[1]))) for part, column in columns.items()}
            arrays |= {f"{part}.{key}": column[:, 0] if longest == 1 else column for part, column in columns.items()}
            fields.append({"name": key, "table": table.name, "rows": table.rows, "length": longest})
    return arrays, fields
