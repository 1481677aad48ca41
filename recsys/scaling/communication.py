# SPDX-License-Identifier: Apache-2.0
"""What a training step costs on many GPUs, on paper: bytes by link, memory by rank, and where adding GPUs stops paying.

The bytes are those that `recsys.embedding.sharding` gives to collectives; ``benchmarks distributed`` measures them for two processes, and a
test holds the two equal. Bandwidths and peaks are datasheets'; the share of each that is reached is an assumption that is stated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from recsys.core.config import Config

_FP32, _BF16, _INT64 = 4, 2, 8
Placement = Literal["table_wise", "row_wise", "row_wise_in_node"]
PLACEMENTS: tuple[Placement, ...] = ("table_wise", "row_wise", "row_wise_in_node")


class Gpus(Config):
    """GPUs and what connects them: H100 SXM by NVIDIA's datasheet, eight to a node over NVLink 4, one 400 Gb/s port of InfiniBand each.

    Attributes:
        node: GPUs of a node.
        memory: bytes of one.
        memory_rate: bytes a second of its memory.
        flops: dense bf16 operations a second.
        inside: bytes a second between the GPUs of a node, in one direction.
        outside: bytes a second between nodes, for each GPU, in one direction.
        reached: the share of every bandwidth that collectives and look-ups reach: an assumption.
        mfu: the share of ``flops`` that the products reach: RankMixer-1B's published one.
        start: seconds until a collective's first byte moves, for each doubling of the ranks: an assumption.
    """

    node: int = Field(8, ge=1)
    memory: float = Field(80e9, gt=0)
    memory_rate: float = Field(3.35e12, gt=0)
    flops: float = Field(989e12, gt=0)
    inside: float = Field(450e9, gt=0)
    outside: float = Field(50e9, gt=0)
    reached: float = Field(0.7, gt=0, le=1)
    mfu: float = Field(0.446, gt=0, le=1)
    start: float = Field(5e-6, ge=0)


class Workload(Config):
    """A ranker and its step.

    Attributes:
        rows: of all tables together.
        fields: keys that are looked up for each sample.
        ids: of a key and sample, on average.
        width: of a row.
        flops: of a sample's forward pass, in the matrix products.
        dense: parameters outside the tables.
        batch: samples of a step and rank.
        kept: numbers that a sample's forward pass keeps for its backward pass.
    """

    rows: float = Field(1e10, gt=0)
    fields: int = Field(248, ge=1)
    ids: float = Field(1.0, gt=0)
    width: int = Field(64, ge=1)
    flops: float = Field(2e9, gt=0)
    dense: float = Field(1e9, gt=0)
    batch: int = Field(1024, ge=1)
    kept: float = Field(4e5, ge=0)


@dataclass(frozen=True)
class Step:
    """A step of one rank, on paper; bytes that it sends, seconds of each part, and memory in bytes.

    Attributes:
        ranks: how many.
        memory: tables with an accumulator a row; dense weights and gradients in bf16, master weights and optimizer in fp32; activations.
        exchanged: bytes of ids and vectors, both ways.
        averaged: bytes of dense gradients, inside the node and beyond it.
        look_ups: seconds of reading and updating rows in the rank's memory.
        products: seconds of the matrix products.
        exchange: seconds of ids and vectors over the slower link.
        average: seconds of the dense part's collectives; they run under the products.
    """

    ranks: int
    memory: float
    exchanged: float
    averaged: float
    look_ups: float
    products: float
    exchange: float
    average: float

    @property
    def seconds(self) -> float:
        """Look-ups and exchanges stand in the way of the products; averaging overlaps with them."""
        return self.look_ups + self.exchange + max(self.products, self.average)

    @property
    def binds(self) -> str:
        """The part that takes longest."""
        parts = {"products": self.products, "exchange": self.exchange, "averaging": self.average, "look-ups": self.look_ups}
        return max(parts, key=lambda name: parts[name])


def exchanged_bytes(work: Workload, ranks: int, placement: Placement, number: int = _BF16, node: int = 8) -> tuple[float, float]:
    """Bytes that a rank sends to others for a step's look-ups and their gradients, inside its node and beyond it.

    ``table_wise``: ids go to the table's rank, pooled vectors come back, gradients go the same way: each once for every field and sample.
    ``row_wise``: every rank has a part of every sum, so that the sums of *all* ranks' samples go through each of them (a reduce-scatter
    there, an all-gather back): it grows with the ranks, although a node adds up before it sends. ``row_wise_in_node``: a table's rows lie
    in one node, which sums over its fast links, and sends what ``table_wise`` sends.

    Args:
        work: the workload.
        ranks: N.
        placement: see above.
        number: bytes of a vector's number on the way.
        node: ranks of a node.
    """
    vectors, ids = work.batch * work.fields * work.width * number, work.batch * work.fields * (work.ids * _INT64 + _FP32)
    other, near = (ranks - 1) / ranks, min(node, ranks)
    beyond = max(0, ranks - near) / ranks
    once_inside, once_beyond = (2 * vectors + ids) * (other - beyond), (2 * vectors + ids) * beyond
    if placement == "table_wise":
        return once_inside, once_beyond
    if placement == "row_wise":
        sums_beyond = 2 * vectors * (ranks - near) / near
        return 2 * vectors * (ranks - 1) - sums_beyond + ids * (other - beyond), sums_beyond + ids * beyond
    return once_inside + 2 * vectors * (near - 1), once_beyond


def step(work: Workload, ranks: int, placement: Placement, gpus: Gpus | None = None) -> Step:
    """One step on ``ranks`` GPUs."""
    gpus = gpus or Gpus()
    inside, beyond = exchanged_bytes(work, ranks, placement, node=gpus.node)
    rows_read = work.batch * work.fields * work.ids
    touched = rows_read * (3 * work.width + 2) * _FP32  # read, then read and written with the accumulator
    # An all-reduce: every number twice, inside the node by each GPU, between nodes by each GPU's eighth.
    near = min(gpus.node, ranks)
    averaged = 2 * work.dense * _BF16 * (near - 1) / near
    averaged_beyond = 2 * work.dense * _BF16 / near * (ranks - near) / ranks
    collectives, doublings = 3, (ranks - 1).bit_length()
    memory = work.rows * (work.width + 1) * _FP32 / ranks + work.dense * (2 * _BF16 + 2 * _FP32)
    return Step(
        ranks=ranks,
        memory=memory + work.batch * work.kept * _BF16,
        exchanged=inside + beyond,
        averaged=averaged + averaged_beyond,
        look_ups=touched / (gpus.memory_rate * gpus.reached),
        products=3 * work.flops * work.batch / (gpus.flops * gpus.mfu),
        exchange=inside / (gpus.inside * gpus.reached) + beyond / (gpus.outside * gpus.reached) + collectives * doublings * gpus.start,
        average=averaged / (gpus.inside * gpus.reached) + averaged_beyond / (gpus.outside * gpus.reached) + doublings * gpus.start,
    )


def table(work: Workload, ranks: Sequence[int], placements: Sequence[Placement], gpus: Gpus | None = None) -> str:
    """The steps on so many ranks in Markdown; efficiency is samples a second and rank over what the products alone would allow."""
    gpus = gpus or Gpus()
    lines = ["| GPUs | placement | memory of a rank | sent for look-ups | step | binds | samples a second | efficiency |", "|" + "---|" * 8]
    for count in ranks:
        for placement in placements:
            one = step(work, count, placement, gpus)
            fits = "" if one.memory <= gpus.memory else " (does not fit)"
            rate = work.batch * count / one.seconds
            lines.append(
                f"| {count:,} | {placement} | {one.memory / 1e9:.1f} GB{fits} | {one.exchanged / 1e6:,.0f} MB | {one.seconds * 1e3:.1f} ms "
                f"| {one.binds} | {rate / 1e6:.2f} M | {one.products / one.seconds:.0%} |"
            )
    return "\n".join(lines) + "\n"
