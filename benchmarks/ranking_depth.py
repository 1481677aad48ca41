# SPDX-License-Identifier: Apache-2.0
"""Do gradients reach the first block of a deep ranker as they reach the last?

On planted impressions, for 2 to 32 blocks: the norm of the first block's gradient over that of the last, at the start and as the median of
the second half of a short training (Adam, rate 1e-3). TokenMixer-Large stands three times: with the inter-layer residual as the paper
words it (``sum``), with halved sums (``mean``), and without; beside it RankMixer and UniMixer.
"""

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.frame import Check, Result
from recsys.core import components
from recsys.core.config import parse
from recsys.embedding.tables import dense_parameters
from recsys.ranking.token_ranker import TokenRanker
from recsys.scaling.data import PlantedData
from recsys.training.progress import track

DEPTHS = (2, 4, 8, 16, 32)
LOW, HIGH = 0.1, 10.0
HEAD_WIDTH = 8  # D = T * HEAD_WIDTH, so that RankMixer's heads equal its tokens
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenmixer_large, mean": ("tokenmixer_large", {"stack": {"inter_mean": True}}),
    "tokenmixer_large, sum": ("tokenmixer_large", {}),
    "tokenmixer_large, none": ("tokenmixer_large", {"stack": {"inter_residual": None}}),
    "rankmixer": ("rankmixer", {}),
    "unimixer": ("unimixer", {}),
}


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    steps = 20 if quick else 100
    data = PlantedData(PlantedData.Config())
    found = {
        name: {depth: ratios(build(data, name, depth), data, steps) for depth in DEPTHS} for name in track(list(MODELS), "models by depth")
    }
    rows = [
        {"model": name, **{f"{depth} blocks": f"{start:.3g}, {later:.3g}" for depth, (start, later) in by_depth.items()}}
        for name, by_depth in found.items()
    ]
    ours = [ratio for pair in found["tokenmixer_large, mean"].values() for ratio in pair]
    theirs = [ratio for pair in found["rankmixer"].values() for ratio in pair]
    leaves = max(max(theirs) / HIGH, LOW / min(theirs))
    checks = [
        Check("tokenmixer_large_lowest", round(min(ours), 3), at_least=LOW, note="first ÷ last block, 2 to 32 blocks"),
        Check("tokenmixer_large_highest", round(max(ours), 3), at_most=HIGH, note="first ÷ last block, 2 to 32 blocks"),
        Check("rankmixer_leaves", round(leaves, 3), at_least=1.0, note="how far RankMixer's ratio goes, 1 being the edge of [0.1, 10]"),
    ]
    return Result("ranking_depth", rows, checks, {"start_and_later": found, "steps": steps})


def build(data: PlantedData, name: str, blocks: int) -> TokenRanker:
    """A model of T tokens of width ``8 T`` over the groups that the data have."""
    ranker, changes = MODELS[name]
    cls: Any = components.get("ranker", ranker)
    tokens = len(data.spec.groups) + 1
    plain = {"tokenizer": {"name": "groups"}, "dim": HEAD_WIDTH * tokens, "blocks": blocks, "auxiliary": None}
    torch.manual_seed(0)
    model: TokenRanker = cls(parse(cls.Config, plain | changes | {"embedding": {"dim": 16}}, source=str(Path(__file__).name)), data.spec)
    return model


def ratios(model: TokenRanker, data: PlantedData, steps: int) -> tuple[float, float]:
    """The ratio of the first batch, and the median over the second half of the steps."""
    optimizer = torch.optim.Adam(dense_parameters(model), lr=1e-3)
    found = []
    for batch in data.train(rows=steps * 512, seed=0, batch_size=512):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        found.append(first_over_last(model))
        optimizer.step()
    return found[0], statistics.median(found[steps // 2 :])


def first_over_last(model: TokenRanker) -> float:
    """The norm of the first block's gradient over that of the last."""
    blocks: Any = model.stack.blocks
    first, last = (
        torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]).norm() for block in (blocks[0], blocks[-1])
    )
    return float(first / last)
