# SPDX-License-Identifier: Apache-2.0
"""Train the ranker and the baselines that it must beat on the same features."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from pipelines.graph.step import Context
from pipelines.steps.features import Frames, load_frames, write_frame
from pipelines.steps.ranking import CHUNK, Validation, fit_ranker, fit_together, labels_of, predicted
from pipelines.training import alone
from recsys.bundle.modules import load_module, save_module
from recsys.core import components
from recsys.core.engine import Engine
from recsys.core.files import read_json, write_json
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.onehot import one_hot
from recsys.data.splits import PARTS
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.ranking.calibration import Calibrator, from_state
from recsys.ranking.model import Ranker
from recsys.training.tracking import Tracker

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_REGULARISATION = (0.001, 0.003, 0.01, 0.03, 0.1)  # C of the logistic regression; the validation period chooses
_ENCODER, _MODEL, _CALIBRATION, _SCORES, _RESULT = "encoder", "model", "calibration.json", "scores.safetensors", "ranking.json"
_LABELS, _PROBABILITY = "labels", "probability."
_SAMPLED = "train_sampled.parquet"
_HERE = Engine()


@dataclass(frozen=True)
class RankingResult:
    """Trained models and what they say of the test events, in the order of the events.

    Attributes:
        calibration: fitted on the validation period.
        curve: of the training, see `recsys.training.history.History.rows`.
        probabilities: model → float64 ``[events]``; the ranker's are calibrated.
        labels: 0 or 1, ``[events]``.
        base_rate: the share of positive labels in train.
    """

    encoder: Encoder
    ranker: Ranker
    calibration: Calibrator
    curve: list[dict[str, Any]]
    probabilities: dict[str, np.ndarray]
    labels: np.ndarray
    base_rate: float

    def save(self, directory: Path) -> None:
        """Write what `load_ranking` reads."""
        (directory / _ENCODER).mkdir()
        self.encoder.save(directory / _ENCODER)
        save_module(directory / _MODEL, self.ranker)
        write_json(directory / _CALIBRATION, self.calibration.state())
        scores = {f"{_PROBABILITY}{name}": values for name, values in self.probabilities.items()} | {_LABELS: self.labels}
        save_file({name: np.ascontiguousarray(values) for name, values in scores.items()}, directory / _SCORES)
        write_json(directory / _RESULT, {"curve": self.curve, "base_rate": self.base_rate, "models": list(self.probabilities)})


def load_ranking(directory: Path) -> RankingResult:
    """What the step wrote."""
    encoder, about, scores = Encoder.load(directory / _ENCODER), read_json(directory / _RESULT), load_file(directory / _SCORES)
    return RankingResult(
        encoder=encoder,
        ranker=load_module(directory / _MODEL, "ranker", encoder.spec),
        calibration=from_state(read_json(directory / _CALIBRATION)),
        curve=about["curve"],
        probabilities={name: scores[f"{_PROBABILITY}{name}"] for name in about["models"]},
        labels=scores[_LABELS],
        base_rate=about["base_rate"],
    )


def train_ranker(
    recipe: "Recipe", frames: Frames, folder: Path, tracker: Tracker, context: dict[str, Any], engine: Engine = _HERE
) -> RankingResult:
    """Fit the encoder on train, train the ranker with early stopping on validation, calibrate it there, and score the test period once.

    Args:
        recipe: its encoder, ranker and seed.
        frames: feature rows.
        folder: of checkpoints, metrics, and the sampled rows where negatives are left out.
        tracker: told of the training, where it has one process.
        context: what decides the training besides its configuration.
        engine: where it trains, and in how many processes.
    """
    encoder = Encoder.fit(recipe.encoder, frames.tables["train"])
    batches = {part: _encode(encoder, frames.tables[part]) for part in PARTS}
    labels = {part: np.concatenate([labels_of(batch) for batch in batches[part]]) for part in PARTS}
    path = _sample_negatives(frames, labels["train"], recipe, folder)
    if alone(engine):
        valid = Validation(batches["valid"], frames.tables["valid"].num_rows)
        ranker, curve = fit_ranker(recipe, encoder, path, valid, folder, tracker, context)
    else:
        ranker, curve = fit_together(recipe, encoder, path, frames.paths["valid"], folder, context, engine)
    base_rate = float(labels["train"].mean())
    calibration: Calibrator = components.build("calibration", recipe.ranker.calibration)
    groups = {part: None if calibration.column is None else frames.tables[part].column(calibration.column) for part in PARTS}
    calibration.fit(labels["valid"], _predict(ranker, batches["valid"]), _weights(batches["valid"]), groups["valid"])
    probabilities = {
        recipe.ranker.model.name: calibration.apply(_predict(ranker, batches["test"]), groups["test"]),
        "logistic_regression": _logistic_regression(batches, labels, encoder),
        "base_rate": np.full(len(labels["test"]), base_rate),
    }
    return RankingResult(encoder, ranker.eval(), calibration, curve, probabilities, labels["test"], base_rate)


def run(context: Context) -> None:
    """Write encoder, model, calibration and scores, with the metrics of the training and the rows that it sampled."""
    folder = context.work / "ranker"
    frames = load_frames(context.inputs["features"])
    result = train_ranker(context.recipe, frames, folder, context.tracker, {"key": context.key}, context.engine)
    result.save(context.out)
    for kept in (folder / "metrics.jsonl", folder / _SAMPLED):
        if kept.is_file():
            shutil.copy(kept, context.out)


def _sample_negatives(frames: Frames, labels: np.ndarray, recipe: "Recipe", folder: Path) -> Path:
    """The Parquet file to train on: the train part's own, or one without the negatives that are left out."""
    if recipe.ranker.negatives == 1:
        return frames.paths["train"]
    random = np.random.default_rng([recipe.seed, 0])
    kept = (labels != 0) | (random.random(len(labels)) < recipe.ranker.negatives)
    folder.mkdir(parents=True, exist_ok=True)
    write_frame(frames.tables["train"].filter(pa.array(kept)), folder / _SAMPLED)
    return folder / _SAMPLED


def _encode(encoder: Encoder, table: pa.Table) -> list[RankingBatch]:
    return [encoder.transform(table.slice(start, CHUNK)) for start in range(0, table.num_rows, CHUNK)]


def _weights(batches: list[RankingBatch]) -> np.ndarray | None:
    weights = [batch.weights.numpy() for batch in batches if batch.weights is not None]
    return np.concatenate(weights) if weights else None


def _predict(ranker: Ranker, batches: list[RankingBatch]) -> np.ndarray:
    ranker.eval()
    return np.concatenate([predicted(ranker, batch) for batch in batches])


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
