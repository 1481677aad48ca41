# SPDX-License-Identifier: Apache-2.0
"""HISA beside the flat indexer on the keys of a model that was trained on MovieLens-1M: do they choose the same events?

The model is the one of ``recsys efficiency efficiency_movielens_1m`` with seed 0, read from its checkpoint, or trained first::

    python -m benchmarks.token_efficiency.indexing_real --home RECSYS_HOME

Each head of each block is an indexer of its own: its queries and keys stand for the index's, and the last place of a long history asks.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.token_efficiency.indexing import coherence
from pipelines.efficiency import EfficiencyRecipe
from pipelines.study import load
from recsys.core import components
from recsys.data.sequences import histories
from recsys.efficiency.attention.hisa import FlatIndexer, HisaIndexer
from recsys.efficiency.attention.indexer import BlockMeans, IndexInputs
from recsys.registry.location import home
from recsys.retrieval.models import SASRec
from recsys.scaling.retrievers import Retrievers
from recsys.scaling.tradeoff import trained
from recsys.training.progress import RichProgress

RECIPE = "efficiency_movielens_1m"
USERS = 200
SETTINGS = ((50, 8, 12), (25, 8, 12), (25, 8, 6), (25, 4, 12), (25, 16, 6))  # k keys of blocks of B, of which m are looked into


@torch.inference_mode()
def attention_inputs(model: SASRec, histories_bl: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Block, head, queries ``[B, L + 1, e]`` and keys of the attention over whole windows."""
    transformer = model.transformer
    read = torch.cat((model.start.expand(len(histories_bl), 1, -1), model.item(histories_bl)), 1)
    x_btd = read + transformer.position.weight[: read.shape[1]]
    for number, block in enumerate(transformer.blocks):
        query, key, value = block.project(x_btd)
        for head in range(query.shape[1]):
            yield number, head, query[:, head], key[:, head]
        x_btd = block.update(x_btd, torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))


def agreement(query_e: Tensor, key_ne: Tensor, keep: int, block: int, blocks: int) -> tuple[float, float]:
    """Keys that both indexers choose for the last place over keys that one of them chooses; and the coherence of the blocks."""
    k = key_ne[None, None]
    index = IndexInputs(query_e[None, None, None], k, torch.ones(1, 1, 1), BlockMeans.of(k, block))
    last = torch.tensor([len(key_ne) - 1])
    flat = FlatIndexer(keep).choose(index, query_positions=last)
    ours = HisaIndexer(keep, block, blocks, 1).choose(index, query_positions=last)
    return float(flat.iou(ours, len(key_ne)).mean()), coherence(index)


def rows(model: SASRec, windows_bl: Tensor) -> list[dict[str, Any]]:
    """The mean agreement of every block and head at every setting."""
    found = []
    for number, head, query, key in attention_inputs(model, windows_bl):
        row: dict[str, Any] = {"block": number, "head": head}
        for keep, block, blocks in SETTINGS:
            both = torch.tensor([agreement(query[b, -1], key[b], keep, block, blocks) for b in range(len(query))])
            row[f"k={keep} B={block} m={blocks}"] = f"{float(both[:, 0].mean()):.3f}"
            row[f"cosine B={block}"] = f"{float(both[:, 1].mean()):.2f}"
        found.append(row)
    return found


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_efficiency.indexing_real", description=__doc__)
    parser.add_argument("--home", type=Path, default=home(), help="where the study's results stand (RECSYS_HOME)")
    arguments = parser.parse_args(argv)
    plan = load(EfficiencyRecipe, RECIPE)
    directory = arguments.home / "efficiency" / RECIPE
    subject = Retrievers(components.build("scaling_data", plan.data), directory / "shared")
    model = trained(plan, subject, 0, directory, RichProgress(RECIPE))
    assert isinstance(model, SASRec)
    split, length = subject.data.split, model.max_length
    long = [batch.items for batch, _ in histories(split.data, split.test, length, 1) if len(batch.items) == length][:USERS]
    table = rows(model, torch.stack(long))
    grid = Table(*table[0], title=f"{len(long)} histories of {length} events")
    for row in table:
        grid.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
