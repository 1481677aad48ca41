# SPDX-License-Identifier: Apache-2.0
"""Do gradients reach the first block of a deep ranker as they reach the last?

On planted impressions, for 2 to 32 blocks: the norm of the first block's gradient over that of the last, at the start, and in a short
training (Adam, rate 1e-3) as the median of any ten steps in a row. TokenMixer-Large stands three times: with the inter-layer residual as
the paper words it (``sum``), with halved sums (``mean``), and without; beside it RankMixer and UniMixer. The last lines of a file of
results as a picture::

    python -m benchmarks.ranking_depth docs/results/raw/ranking_depth.jsonl docs/images/ranking_depth.svg
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks.frame import Check, Result
from recsys.core import components
from recsys.core.config import parse
from recsys.embedding.tables import dense_parameters
from recsys.evaluation.figure import COLOURS, svg
from recsys.ranking.token_ranker import TokenRanker
from recsys.scaling.data import PlantedData
from recsys.training.progress import track

DEPTHS = (2, 4, 8, 16, 32)
LOW, HIGH = 0.1, 10.0
TOGETHER = 10  # steps, since the ratio of a single batch jumps
HEAD_WIDTH = 8  # D = T * HEAD_WIDTH, so that RankMixer's heads equal its tokens
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenmixer_large, mean": ("tokenmixer_large", {"stack": {"inter_mean": True}}),
    "tokenmixer_large, sum": ("tokenmixer_large", {}),
    "tokenmixer_large, none": ("tokenmixer_large", {"stack": {"inter_residual": None}}),
    "rankmixer": ("rankmixer", {}),
    "unimixer": ("unimixer", {}),
}


@dataclass(frozen=True)
class Course:
    """The ratio from step to step.

    Attributes:
        ratios: of every step, the first one before anything is learnt.
    """

    ratios: Sequence[float]

    @property
    def medians(self) -> list[float]:
        """Of any `TOGETHER` steps in a row."""
        return [statistics.median(self.ratios[i : i + TOGETHER]) for i in range(len(self.ratios) - TOGETHER + 1)]

    @property
    def lowest(self) -> float:
        """At the start, or of the medians."""
        return min(self.ratios[0], *self.medians)

    @property
    def highest(self) -> float:
        """At the start, or of the medians."""
        return max(self.ratios[0], *self.medians)

    def __str__(self) -> str:
        return f"{self.ratios[0]:.3g}; {self.lowest:.3g} to {self.highest:.3g}"


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    steps = 20 if quick else 100
    data = PlantedData(PlantedData.Config())
    found = {
        name: {depth: course(build(data, name, depth), data, steps) for depth in DEPTHS} for name in track(list(MODELS), "models by depth")
    }
    rows = [{"model": name, **{f"{depth} blocks": str(own) for depth, own in by_depth.items()}} for name, by_depth in found.items()]
    lowest = {name: min(own.lowest for own in by_depth.values()) for name, by_depth in found.items()}
    highest = {name: max(own.highest for own in by_depth.values()) for name, by_depth in found.items()}
    leaves = max(highest["rankmixer"] / HIGH, LOW / lowest["rankmixer"])
    note = "first ÷ last block, 2 to 32 blocks, at the start and all through training"
    checks = [
        Check("tokenmixer_large_lowest", round(lowest["tokenmixer_large, mean"], 3), at_least=LOW, note=note),
        Check("tokenmixer_large_highest", round(highest["tokenmixer_large, mean"], 3), at_most=HIGH, note=note),
        Check("rankmixer_leaves", round(leaves, 3), at_least=1.0, note="how far RankMixer's ratio goes, 1 being the edge of [0.1, 10]"),
    ]
    curves = {name: {depth: [float(f"{r:.4g}") for r in own.ratios] for depth, own in by_depth.items()} for name, by_depth in found.items()}
    return Result("ranking_depth", rows, checks, {"ratios": curves, "steps": steps})


def build(data: PlantedData, name: str, blocks: int) -> TokenRanker:
    """A model of T tokens of width ``8 T`` over the groups that the data have."""
    ranker, changes = MODELS[name]
    cls: Any = components.get("ranker", ranker)
    tokens = len(data.spec.groups) + 1
    plain = {"tokenizer": {"name": "groups"}, "dim": HEAD_WIDTH * tokens, "blocks": blocks, "auxiliary": None}
    torch.manual_seed(0)
    model: TokenRanker = cls(parse(cls.Config, plain | changes | {"embedding": {"dim": 16}}, source=str(Path(__file__).name)), data.spec)
    return model


def course(model: TokenRanker, data: PlantedData, steps: int) -> Course:
    """The ratios of a short training."""
    optimizer = torch.optim.Adam(dense_parameters(model), lr=1e-3)
    found = []
    for batch in data.train(rows=steps * 512, seed=0, batch_size=512):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        found.append(first_over_last(model))
        optimizer.step()
    return Course(found)


def first_over_last(model: TokenRanker) -> float:
    """The norm of the first block's gradient over that of the last."""
    blocks: Any = model.stack.blocks
    first, last = (
        torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]).norm() for block in (blocks[0], blocks[-1])
    )
    return float(first / last)


def picture(ratios: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The medians from step to step, a panel for each model and a curve for each depth."""

    def draw(panels: Sequence[Axes]) -> None:
        for panel, (name, by_depth) in zip(panels, ratios.items(), strict=True):
            panel.set_title(name)
            panel.set_yscale("log")
            panel.set_xlabel("step")
            panel.axhspan(LOW, HIGH, color="#16a34a", alpha=0.08, lw=0)
            for colour, (depth, own) in zip(COLOURS, by_depth.items(), strict=False):
                panel.plot(Course(own).medians, color=colour, lw=1.4, label=f"{depth} blocks")
        panels[0].set_ylabel("gradient of the first block ÷ of the last")
        panels[-1].legend(frameon=False)

    return svg(draw, columns=len(ratios), size=(3 * len(ratios), 3.2), sharey=True)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    last = json.loads(Path(source).read_text(encoding="utf-8").splitlines()[-1])
    Path(target).write_text(picture(last["details"]["ratios"]), encoding="utf-8")
