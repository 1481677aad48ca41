# SPDX-License-Identifier: Apache-2.0
"""HISA's hierarchical indexer beside the flat one of DSA: the index scores, and whether both choose the same keys.

32 queries stand at the last places of a history; H_I = 8 index heads of width 64 share one index key. Block means are kept while keys
arrive (`BlockMeans`), so they are there before either indexer is asked; what gathers the candidates' keys costs HISA is no multiply-add and
is in the wall-clock.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.frame import Check
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.attention.hisa import FlatIndexer, HisaIndexer
from recsys.efficiency.attention.indexer import BlockMeans, IndexInputs
from recsys.efficiency.cost import Cost

HEADS, WIDTH, QUERIES = 8, 64, 32
KEEP, BLOCK, BLOCKS = 2048, 128, 64
NOISE, ALIKE, SEEDS = 0.2, 0.9, 4
_PAPER = {32_768: "2x at 32K, time of the indexer", 131_072: "4x at 128K, time of the indexer"}


@dataclass(frozen=True)
class Setting:
    """HISA with m blocks, R queries that share candidates, over a history of some length."""

    length: int
    blocks: int = BLOCKS
    query_block: int = 1

    def indexer(self) -> HisaIndexer:
        """The indexer."""
        return HisaIndexer(KEEP, BLOCK, self.blocks, self.query_block)

    def __str__(self) -> str:
        shared = "" if self.query_block == 1 else f", candidates shared by {self.query_block} queries"
        return f"{self.length // 1024}K keys, {QUERIES} queries, B={BLOCK}, m={self.blocks}, k={KEEP}{shared}"


AT_32K, AT_128K = Setting(32_768), Setting(131_072)
SETTINGS = (AT_32K, Setting(32_768, 32), Setting(32_768, BLOCKS, QUERIES), AT_128K, Setting(131_072, BLOCKS, QUERIES))


def inputs(length: int, noise: float, alike: float = 0.0, seed: int = 0) -> IndexInputs:
    """Drawn index queries, keys, gates and block means.

    Args:
        length: keys.
        noise: standard deviation within a block around the block's own drawn vector; infinite for keys that have nothing in common.
        alike: what queries have in common, as about the cosine of two of them; their gates likewise.
        seed: of all that is drawn.
    """
    drawn = torch.Generator().manual_seed(seed)
    common = torch.randn(-(-length // BLOCK), WIDTH, generator=drawn).repeat_interleave(BLOCK, 0)[:length]
    own = torch.randn(length, WIDTH, generator=drawn)
    keys = own if noise == float("inf") else common + noise * own
    keys = torch.nn.functional.layer_norm(keys, (WIDTH,))[None, None]
    drawn_q, drawn_gates = (torch.randn(1, HEADS, 1 + QUERIES, *rest, generator=drawn) for rest in ((WIDTH,), ()))
    q, gates = (alike**0.5 * x[:, :, :1] + (1 - alike) ** 0.5 * x[:, :, 1:] for x in (drawn_q, drawn_gates))
    return IndexInputs(q, keys, gates * (HEADS * WIDTH) ** -0.5, BlockMeans.of(keys, BLOCK))


def coherence(index: IndexInputs) -> float:
    """The mean cosine of a key with the mean of its block."""
    assert index.means is not None
    means = index.means.means[0, 0].repeat_interleave(index.means.size, 0)
    return float(torch.cosine_similarity(index.k[0, 0, : len(means)], means, dim=-1).mean())


def last_positions(length: int) -> Tensor:
    """The places of the queries."""
    return torch.arange(length - QUERIES, length)


def macs(indexer: FlatIndexer, index: IndexInputs) -> int:
    """Multiply-adds of the index scores of a choice."""
    with Cost() as cost:
        indexer.choose(index, query_positions=last_positions(index.k.shape[2]))
    return cost.macs


def overlap(indexer: HisaIndexer, index: IndexInputs) -> Tensor:
    """float ``[queries]``: keys that both indexers choose over keys that one of them chooses."""
    places, length = last_positions(index.k.shape[2]), index.k.shape[2]
    flat = FlatIndexer(indexer.keep).choose(index, query_positions=places)
    return flat.iou(indexer.choose(index, query_positions=places), length).flatten()


def row(setting: Setting, pairs: int) -> Row:
    """HISA at one setting."""
    index, places = inputs(setting.length, NOISE), last_positions(setting.length)
    flat, ours = FlatIndexer(KEEP), setting.indexer()
    wall = beside(
        lambda: flat.choose(index, query_positions=places),
        lambda: ours.choose(index, query_positions=places),
        pairs,
    )
    quality = f"IoU {float(overlap(ours, index).mean()):.4f} at key cosine {coherence(index):.2f}"
    if setting.query_block > 1:
        similar = float(overlap(ours, inputs(setting.length, NOISE, ALIKE)).mean())
        quality += f" and independent queries, {similar:.4f} at query cosine {ALIKE}"
    return Row("HISA", str(setting), macs(flat, index) / macs(ours, index), "MACs of index scores", wall, _PAPER[setting.length], quality)


def iou_check(length: int = 32_768, seeds: int = SEEDS) -> Check:
    """Do both choose the same on block-coherent keys; other coherences are in the note."""
    found: dict[float, Tensor] = {}
    cosines: dict[float, float] = {}
    for noise in (NOISE, 0.5, float("inf")):
        drawn = [inputs(length, noise, seed=seed) for seed in range(seeds if noise == NOISE else 1)]
        found[noise] = torch.cat([overlap(Setting(length).indexer(), index) for index in drawn])
        cosines[noise] = coherence(drawn[0])
    others = ", ".join(f"{float(found[noise].mean()):.3f} at {cosines[noise]:.2f}" for noise in list(found)[1:])
    note = (
        f"mean over {seeds} draws of {QUERIES} independent queries (lowest {float(found[NOISE].min()):.3f}); {length} keys, "
        f"B={BLOCK}, m={BLOCKS}, k={KEEP}; keys constant within a block but for noise {NOISE}: mean cosine {cosines[NOISE]:.2f} "
        f"with the block's mean; elsewhere {others} (independent keys)"
    )
    return Check("hisa_iou", round(float(found[NOISE].mean()), 5), at_least=0.99, note=note)


@torch.inference_mode()
def measure(quick: bool) -> tuple[list[Row], list[Check]]:
    """The rows and the checks of this part."""
    rows = {setting: row(setting, 5 if quick else 9) for setting in SETTINGS}
    checks = []
    for name, bound, setting in (("hisa_32k", 2.2, AT_32K), ("hisa_128k", 4.5, AT_128K)):
        scored = f"{setting.indexer().scored_keys(setting.length)} of {setting.length} keys and means scored for each query"
        note = f"MACs of index scores, flat over HISA, counted; {scored}; m={BLOCKS}, nothing shared; wall-clock {rows[setting].wall}"
        checks.append(Check(name, round(rows[setting].saved, 3), at_least=bound, note=note))
    return list(rows.values()), [*checks, iou_check()]
