# SPDX-License-Identifier: Apache-2.0
"""Does a ranker that grows on the way reach what one of full size reaches, for less?

A small TokenMixer-Large whose token networks are per-token pattentions is trained on planted impressions, given ``FACTOR`` times its pairs,
and trained on. Beside it stands the full size from scratch, once with as much compute in all (forward FLOPs of every row that was
trained on) and once on as many rows, which is more compute. The grown model must not jump: the largest change of a prediction is measured.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.frame import Check, Result, mean_interval
from recsys.core.config import validate
from recsys.evaluation.metrics.auc import auc
from recsys.ranking.model import Ranker
from recsys.ranking.models import TokenMixerLarge
from recsys.ranking.per_token import grow
from recsys.scaling.data import PlantedData
from recsys.training.optim import DenseOptimizer
from recsys.training.progress import NoProgress, track
from recsys.training.trainer import Trainer

FACTOR = 4.0
PLANTED = {"name": "planted", "fields": 18, "groups": 6, "cardinality": (8, 40), "latent": 2, "dense": 4, "test": 50_000}
_BATCH = 256


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    rows, seeds = (30_000, 3) if quick else (150_000, 5)
    data = PlantedData(validate(PlantedData.Config, PLANTED))
    found = [_compared(data, rows, seed) for seed in track(range(seeds), "growing")]
    lines = [
        {"model": name, "rows": str(int(found[0][name]["rows"])), "FLOPs": found[0][name]["flops"], **_mean(found, name)}
        for name in ("small", "grown", "scratch, equal compute", "scratch, equal rows")
    ]
    jump = max(one["grown"]["jump"] for one in found)
    _, low, high = mean_interval([one["grown"]["auc"] - one["scratch, equal compute"]["auc"] for one in found])
    _, below, above = mean_interval([one["grown"]["auc"] - one["scratch, equal rows"]["auc"] for one in found])
    checks = [
        Check("growth_jump", jump, at_most=1e-4, note="largest change of a predicted logit in float32"),
        Check("growth_over_scratch_equal_compute", round(high, 5), at_least=0.0, note=f"AUC, 90% interval [{low:+.4f}, {high:+.4f}]"),
        Check("growth_over_scratch_equal_rows", round(above, 5), at_least=0.0, note=f"AUC, 90% interval [{below:+.4f}, {above:+.4f}]"),
    ]
    return Result("ranking_growth", lines, checks)


def _mean(found: list[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
    values = [one[name]["auc"] for one in found]
    return {"AUC": statistics.fmean(values), "±": statistics.stdev(values)}


def _compared(data: PlantedData, rows: int, seed: int) -> dict[str, dict[str, float]]:
    """Two thirds of the rows at the small size, one at the full size; the two from scratch see the same rows in the same order."""
    first, second = 2 * rows // 3, rows - 2 * rows // 3
    small = _model(data, 1.0, seed)
    _train(small, data, first, seed)
    spent, alone = first * small.costs().flops, _auc(small, data)
    before = _logits(small, data)
    grow(small, FACTOR)
    jump = float((_logits(small, data) - before).abs().max())
    spent += second * small.costs().flops
    _train(small, data, second, seed + 1000)
    full = _model(data, FACTOR, seed)
    each = full.costs().flops
    equal = int(spent / each)
    _train(full, data, min(equal, first), seed)
    if equal > first:
        _train(full, data, equal - first, seed + 1000)
    other = _model(data, FACTOR, seed)
    _train(other, data, first, seed)
    _train(other, data, second, seed + 1000)
    return {
        "small": {"auc": alone, "rows": first, "flops": float(first * _model(data, 1.0, seed).costs().flops)},
        "grown": {"auc": _auc(small, data), "rows": rows, "flops": float(spent), "jump": jump},
        "scratch, equal compute": {"auc": _auc(full, data), "rows": equal, "flops": float(equal * each)},
        "scratch, equal rows": {"auc": _auc(other, data), "rows": rows, "flops": float(rows * each)},
    }


def _model(data: PlantedData, expansion: float, seed: int) -> Ranker:
    torch.manual_seed(seed)
    plain = {
        "dim": 32,
        "blocks": 2,
        "per_token": {"name": "pattention", "expansion": expansion},
        "auxiliary": None,
        "embedding": {"dim": 16, "optimizer": "adagrad", "learning_rate": 0.05, "init_std": 0.1},
    }
    return TokenMixerLarge(validate(TokenMixerLarge.Config, plain), data.spec)


def _train(model: Ranker, data: PlantedData, rows: int, seed: int) -> None:
    training = Trainer.Config(epochs=1, optimizer=DenseOptimizer(name="adam", learning_rate=0.003), clip_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(training, Path(folder) / "run", progress=NoProgress()).fit(model, data.train(rows, seed, _BATCH))


@torch.no_grad()
def _logits(model: Ranker, data: PlantedData) -> torch.Tensor:
    return torch.cat([model.eval().predict(batch)[:, 0].logit() for batch in data.test(4096)]).double()


def _auc(model: Ranker, data: PlantedData) -> float:
    labels = torch.cat([batch.labels[:, 0] for batch in data.test(4096) if batch.labels is not None])
    return auc(labels.double().numpy(), _logits(model, data).numpy())
