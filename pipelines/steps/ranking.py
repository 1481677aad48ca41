# SPDX-License-Identifier: Apache-2.0
"""Train the ranker and the baselines that it must beat on the same features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import nn

from pipelines.recipe import Recipe
from pipelines.steps.data import Prepared
from recsys.core import components
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.loader import ParquetLoader
from recsys.data.onehot import one_hot
from recsys.data.splits import PARTS
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.inference.frame import ranking_frame
from recsys.ranking.calibration import Calibrator, undersampling_correction
from recsys.ranking.model import Ranker
from recsys.training.tracking import Tracker
from recsys.training.trainer import History, Trainer

_ROW_GROUP = 4096
_CHUNK = 4096
_REGULARISATION = (0.001, 0.003, 0.01, 0.03, 0.1)  # C of the logistic regression; the validation period chooses


@dataclass(frozen=True)
class Frames:
    """The feature rows of each part, as Parquet files for the loader and as tables for the rest."""

    paths: dict[str, Path]
    tables: dict[str, pa.Table]


@dataclass(frozen=True)
class RankingResult:
    """Trained models and what they say of the test events, in the order of the events.

    Attributes:
        calibration: fitted on the validation period.
        probabilities: model → float64 ``[events]``; the ranker's are calibrated.
        labels: 0 or 1, ``[events]``.
        base_rate: the share of positive labels in train.
    """

    encoder: Encoder
    ranker: Ranker
    calibration: Calibrator
    history: History
    probabilities: dict[str, np.ndarray]
    labels: np.ndarray
    base_rate: float


def build_frames(prepared: Prepared, folder: Path) -> Frames:
    """Join features to the events of every part, as of just before each, and write them as Parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, tables = {}, {}
    for part in PARTS:
        tables[part] = ranking_frame(prepared.reader, prepared.impressions(part))
        paths[part] = folder / f"{part}.parquet"
        _write(tables[part], paths[part])
    return Frames(paths, tables)


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, row_group_size=_ROW_GROUP)
    temporary.rename(path)


def train_ranker(recipe: Recipe, prepared: Prepared, frames: Frames, run_dir: Path, tracker: Tracker) -> RankingResult:
    """Fit the encoder on train, train the ranker with early stopping on validation, calibrate it there, and score the test period once."""
    encoder = Encoder.fit(recipe.encoder, frames.tables["train"])
    batches = {part: _encode(encoder, frames.tables[part]) for part in PARTS}
    torch.manual_seed(recipe.seed)
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    training = recipe.ranker.training
    labels = {part: _labels(batches[part]) for part in PARTS}
    path = _sample_negatives(frames, labels["train"], recipe)
    loader: ParquetLoader[RankingBatch] = ParquetLoader([path], encoder, batch_size=training.batch_size, seed=recipe.seed)

    def validate(model: nn.Module) -> dict[str, float]:
        predicted = undersampling_correction(_predict(model, batches["valid"]), recipe.ranker.negatives)
        return {"auc": auc(labels["valid"], predicted), "logloss": log_loss(labels["valid"], predicted)}

    trainer = Trainer(
        training.trainer,
        run_dir,
        tracker=tracker,
        context=prepared.context(recipe.seed) | {"groups": recipe.encoder.model_dump(mode="json").get("groups", {})},
    )
    history = trainer.fit(ranker, loader, validate)
    base_rate = float(labels["train"].mean())
    calibration: Calibrator = components.build("calibration", recipe.ranker.calibration)
    calibration.fit(labels["valid"], _predict(ranker, batches["valid"]), _weights(batches["valid"]))
    probabilities = {
        recipe.ranker.model.name: calibration.apply(_predict(ranker, batches["test"])),
        "logistic_regression": _logistic_regression(batches, labels, encoder),
        "base_rate": np.full(len(labels["test"]), base_rate),
    }
    return RankingResult(encoder, ranker.eval(), calibration, history, probabilities, labels["test"], base_rate)


def _sample_negatives(frames: Frames, labels: np.ndarray, recipe: Recipe) -> Path:
    """The Parquet file to train on: the train part's own, or one beside it without the negatives that are left out."""
    if recipe.ranker.negatives == 1:
        return frames.paths["train"]
    random = np.random.default_rng([recipe.seed, 0])
    kept = (labels != 0) | (random.random(len(labels)) < recipe.ranker.negatives)
    path = frames.paths["train"].with_name("train_sampled.parquet")
    _write(frames.tables["train"].filter(pa.array(kept)), path)
    return path


def _encode(encoder: Encoder, table: pa.Table) -> list[RankingBatch]:
    return [encoder.transform(table.slice(start, _CHUNK)) for start in range(0, table.num_rows, _CHUNK)]


def _labels(batches: list[RankingBatch]) -> np.ndarray:
    return np.concatenate([batch.labels[:, 0].numpy() for batch in batches if batch.labels is not None]).astype(np.float64)


def _weights(batches: list[RankingBatch]) -> np.ndarray | None:
    weights = [batch.weights.numpy() for batch in batches if batch.weights is not None]
    return np.concatenate(weights) if weights else None


def _predict(model: nn.Module, batches: list[RankingBatch]) -> np.ndarray:
    assert isinstance(model, Ranker)
    model.eval()
    return np.concatenate([model.predict(batch)[:, 0].numpy() for batch in batches]).astype(np.float64)


def _logistic_regression(batches: dict[str, list[RankingBatch]], labels: dict[str, np.ndarray], encoder: Encoder) -> np.ndarray:
    """Probabilities on the test period of the logistic regression that is best on the validation period."""
    inputs = {part: sparse.vstack([one_hot(batch, encoder.spec) for batch in batches[part]]).tocsr() for part in PARTS}
    best: tuple[float, np.ndarray] | None = None
    for strength in _REGULARISATION:
        model = LogisticRegression(C=strength, max_iter=500).fit(inputs["train"], labels["train"])
        loss = log_loss(labels["valid"], model.predict_proba(inputs["valid"])[:, 1])
        if best is None or loss < best[0]:
            best = (loss, model.predict_proba(inputs["test"])[:, 1])
    assert best is not None
    return best[1]
