# SPDX-License-Identifier: Apache-2.0
"""How much of what texts say about the next item survives in codes: text-kNN on what codes keep, in the place of the texts.

A model over codes that has never seen a catalogue can at best do what the codes of its items allow. So this is a ceiling for what it
copies from a history, found without training one::

    python -m benchmarks.retrieval_quality.code_ceiling --target beauty
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.retrieval_quality.data import Dataset, load
from benchmarks.retrieval_quality.items import text_of
from benchmarks.retrieval_quality.train import metrics
from benchmarks.retrieval_quality.zero_shot import AXES, DOMAINS, ENCODER, TOKENIZER, Asked
from recsys.bundle.environment import code_commit
from recsys.core.files import sha256_json
from recsys.evaluation.retrieval import event_ranks
from recsys.retrieval.baselines import TextKNN
from recsys.retrieval.item_sets import code_digits
from recsys.scaling.lines import Lines

RAW = Path(__file__).parents[2] / "docs" / "results" / "raw" / "code_ceiling.jsonl"
DIMENSIONS = (16, 20, 40, 64, 128)
LEVELS = 5
STEPS, LONGEST = 2000, 50
KNN = {"pooling": "max", "decay": 0.9}  # what Beauty's own validation chose on whole texts


def quality(data: Dataset, vectors: Tensor) -> float:
    """NDCG@10 of text-kNN with these vectors ``[N, D]`` in the place of the texts, on validation steps."""
    model = TextKNN(TextKNN.Config.model_validate(KNN), vectors.numpy()).fit(data.split.train, data.count)
    return metrics(event_ranks(model.scores, data.data, data.split.valid.sample(STEPS, 0), LONGEST))["ndcg@10"]


def principal(sources: Tensor, target: Tensor, dimensions: int) -> Tensor:
    """``[N, dimensions]``: the target's coordinates along the sources' principal axes, in units of the sources' deviations."""
    mean = sources.mean(0)
    axes = torch.linalg.svd(sources - mean, full_matrices=False).Vh[:dimensions].T
    coordinates: Tensor = (target - mean) @ axes / ((sources - mean) @ axes).std(0)
    return coordinates


def levels(coordinates: Tensor) -> Tensor:
    """The same, rounded to `LEVELS` values each, by FSQ's tanh."""
    half = (LEVELS - 1) / 2
    return (coordinates.tanh() * half).round()


def of_codes(codes_nk: Tensor, digits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``[N, K V]`` and ``[N, K J]``: codes as they are told apart, and as points of their grid, from -1 to 1."""
    size = int(np.prod(digits))
    first = torch.tensor([0, *digits[:-1]]).cumsum(0)
    values = code_digits(size, digits)[codes_nk] - first
    grid = values / (torch.tensor(digits) - 1) * 2 - 1
    return F.one_hot(codes_nk, size).flatten(1).float(), grid.flatten(1)


def ceilings(domains: Mapping[str, Dataset], target: str, cache: Path) -> dict[str, float]:
    """NDCG@10 by what is compared."""
    data, sources = domains[target], {name: own for name, own in domains.items() if name != target}
    text, others = text_of(data, ENCODER), torch.cat([text_of(own, ENCODER) for own in sources.values()])
    found = {"text": quality(data, text)}
    strongest = principal(others, text, max(DIMENSIONS))
    for dimensions in DIMENSIONS:
        coordinates = strongest[:, :dimensions]
        found |= {
            f"{dimensions} axes": quality(data, coordinates),
            f"{dimensions} axes, {LEVELS} levels": quality(data, levels(coordinates)),
        }
    for tokenizer in (TOKENIZER, AXES):
        asked = Asked(sources, {"model": {"name": "recgpt", "dim": 12}, "codes": "fsq", "tokenizer": tokenizer, "recent": 1}, 0, cache)
        table = asked.coded(data).codes
        assert table is not None
        digits: Sequence[int] = tokenizer["levels"]  # type: ignore[assignment]
        told_apart, grid = of_codes(table.codes, digits)
        name = f"{tokenizer['name']}, {tokenizer['slots']} codes"
        found |= {f"{name}, told apart": quality(data, told_apart), f"{name}, as points": quality(data, grid)}
    return found


def main(argv: Sequence[str]) -> int:
    """Print the ceilings, and append them to the file of results where they are not there yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_quality.code_ceiling", description=__doc__)
    parser.add_argument("--target", default="beauty", choices=DOMAINS)
    parser.add_argument("--raw", type=Path, default=RAW, help="the file of results")
    arguments = parser.parse_args(argv)
    domains = {name: load(name) for name in DOMAINS}
    lines, fingerprints = Lines(arguments.raw, "cell"), {name: data.fingerprint for name, data in domains.items()}
    settings = {"steps": STEPS, "longest": LONGEST, "knn": KNN, "dimensions": DIMENSIONS, "levels": LEVELS, "tokenizers": [TOKENIZER, AXES]}
    identity = {"target": arguments.target, "encoder": ENCODER, "data": fingerprints, **settings}
    key = sha256_json(identity)[:16]
    if key not in lines.read():
        found = ceilings(domains, arguments.target, domains[arguments.target].cache)
        lines.append({"cell": key, **identity, "ndcg@10": found, "commit": code_commit()})
    for name, value in lines.read()[key]["ndcg@10"].items():
        print(f"{name:32} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
