# SPDX-License-Identifier: Apache-2.0
"""What does a sparse per-token mixture of experts at 1:2 cost beside the dense SwiGLU of as many parameters?

One layer of each, B = 2048 rows of T = 16 tokens of width D = 256 and expansion 2, in one process, timed in turns. A training step is
forward, backward (to the input too) and Adam, fused for all; inference is forward alone. Half of the experts' operations would be a ratio
of 0.5; the rest is routing, and products with fewer rows each. Both ways of 1:2 are timed; the checks look at the one with fewer, larger
products. Quality is the AUC of a small TokenMixer-Large on planted impressions, several seeds of each form, 1:4 among them.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.frame import Check, Result, mean_interval, ratio, threads
from recsys.core.config import Config, validate
from recsys.evaluation.metrics.auc import auc
from recsys.ranking.models import TokenMixerLarge
from recsys.ranking.per_token import PerToken, SparseMoE, SwiGLU
from recsys.scaling.data import PlantedData
from recsys.training.optim import DenseOptimizer
from recsys.training.progress import NoProgress, track
from recsys.training.trainer import Trainer

ROWS, TOKENS, DIM = 2048, 16, 256
THREADS = 2
DENSE = SwiGLU.Config(expansion=2.0)
SPARSE = {
    "1 + 3 of 8": SparseMoE.Config(expansion=2.0, experts=8, active=4),
    "1 + 1 of 4": SparseMoE.Config(expansion=2.0, experts=4, active=2, gate_norm="all"),
}
QUARTER = {"1 + 1 of 8 (1:4)": SparseMoE.Config(expansion=2.0, experts=8, active=2, gate_norm="all")}
CHECKED = "1 + 1 of 4"
PLANTED = {"name": "planted", "fields": 18, "groups": 6, "cardinality": (8, 40), "latent": 2, "dense": 4, "test": 50_000}
BOUNDS = {"train_step": 0.65, "inference": 0.6}


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    with threads(THREADS):
        seconds = _seconds(5 if quick else 15)
        return _result(seconds, _quality(rows=40_000 if quick else 300_000, seeds=3 if quick else 5))


def _seconds(pairs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by what was done and by layer; one round of warm-up is not kept."""
    torch.manual_seed(0)
    layers = {"dense": SwiGLU(DENSE, TOKENS, DIM)} | {name: SparseMoE(config, TOKENS, DIM) for name, config in SPARSE.items()}
    x_btd = torch.randn(TOKENS, ROWS, DIM).transpose(0, 1)  # tokens-outermost in memory, as inside a stack
    contestants = {
        "train_step": {name: _train_step(layer, x_btd) for name, layer in layers.items()},
        "inference": {name: _inference(layer, x_btd) for name, layer in layers.items()},
    }
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in layers} for what in contestants}
    for turn in track(range(pairs + 1), "in turns"):
        for what, calls in contestants.items():
            for name, call in calls.items():
                start = perf_counter()
                call()
                if turn:
                    seconds[what][name].append(perf_counter() - start)
    return seconds


def _train_step(layer: PerToken, x_btd: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4, fused=True)
    x_btd, target_btd = x_btd.detach().requires_grad_(), torch.randn_like(x_btd)

    def step() -> None:
        optimizer.zero_grad()
        x_btd.grad = None
        torch.autograd.backward(layer(x_btd), target_btd)
        optimizer.step()

    return step


def _inference(layer: PerToken, x_btd: Tensor) -> Callable[[], None]:
    def infer() -> None:
        with torch.inference_mode():
            layer(x_btd)

    return infer


def _quality(rows: int, seeds: int) -> dict[str, list[float]]:
    """AUC of every form after one pass over as many planted rows, by seed."""
    data = PlantedData(validate(PlantedData.Config, PLANTED))
    forms: dict[str, Config] = {"dense": DENSE, **SPARSE, **QUARTER}
    return {name: [_auc(form, data, rows, seed) for seed in range(seeds)] for name, form in track(list(forms.items()), "quality")}


def _auc(per_token: Config, data: PlantedData, rows: int, seed: int) -> float:
    torch.manual_seed(seed)
    plain = {
        "dim": 32,
        "blocks": 2,
        "per_token": per_token.model_dump(mode="json"),
        "auxiliary": None,
        "embedding": {"dim": 16, "optimizer": "adagrad", "learning_rate": 0.05, "init_std": 0.1},
    }
    model = TokenMixerLarge(validate(TokenMixerLarge.Config, plain), data.spec)
    training = Trainer.Config(epochs=1, optimizer=DenseOptimizer(name="adam", learning_rate=0.003), clip_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(training, Path(folder) / "run", progress=NoProgress()).fit(model, data.train(rows, seed, 256))
    batches = list(data.test(4096))
    predicted = torch.cat([model.predict(batch)[:, 0] for batch in batches]).double().numpy()
    labels = torch.cat([batch.labels[:, 0] for batch in batches if batch.labels is not None]).double().numpy()
    return auc(labels, predicted)


def _result(seconds: dict[str, dict[str, list[float]]], quality: dict[str, list[float]]) -> Result:
    ratios = {what: {name: ratio(times[name], times["dense"]) for name in SPARSE} for what, times in seconds.items()}
    rows: list[dict[str, Any]] = []
    differences = {
        name: mean_interval([a - b for a, b in zip(found, quality["dense"], strict=True)])
        for name, found in quality.items()
        if name != "dense"
    }
    for name in quality:
        layer = SwiGLU(DENSE, TOKENS, DIM) if name == "dense" else SparseMoE((SPARSE | QUARTER)[name], TOKENS, DIM)
        row: dict[str, Any] = {"layer": name, "parameters": sum(p.numel() for p in layer.parameters()), "MFLOP / row": layer.flops / 1e6}
        for what, times in seconds.items():
            row[f"{what}, ms"] = round(1e3 * statistics.median(times[name]), 1) if name in times else ""
            row[f"{what} / dense"] = str(ratios[what][name]) if name in ratios[what] else ""
        row["AUC"] = round(statistics.fmean(quality[name]), 4)
        row["AUC - dense"] = "" if name == "dense" else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*differences[name])
        rows.append(row)
    checks = [ratios[what][CHECKED].at_most(what, bound) for what, bound in BOUNDS.items()]
    note = f"upper end of the 90% interval of AUC less the dense form's, {len(quality['dense'])} seeds: within noise where not below 0"
    checks.append(Check("auc_within_noise", round(differences[CHECKED][2], 5), at_least=0.0, note=note))
    details = {"seconds": seconds, "quality": quality, "rows": ROWS, "tokens": TOKENS, "dim": DIM, "threads": THREADS}
    return Result("sparse_moe", rows, checks, details)
