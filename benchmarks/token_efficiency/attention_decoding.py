# SPDX-License-Identifier: Apache-2.0
"""FASA and TokenSelect: one query, or one chunk of queries, that asks a long cached history."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.frame import Check
from benchmarks.token_efficiency.attention_planted import Loss, Planted, loss, rotated, sessions, topical, weights
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.fasa import FasaAttention
from recsys.efficiency.attention.token_select import TokenSelectAttention
from recsys.efficiency.cost import Cost

FASA_LENGTH, FASA_HEADS, FASA_WIDTH = 32_768, 8, 128
SELECT_LENGTH, SELECT_HEADS, SELECT_WIDTH, SELECT_CHUNK = 65_536, 8, 64, 128
SELECT = TokenSelectAttention.Config(min_length=0, keep=2048, initial=128, local=512, chunk=SELECT_CHUNK)
STEPS = 4


def frequent(length: int = FASA_LENGTH, heads: int = FASA_HEADS, pairs: int = 16) -> Planted:
    """Rotated queries and keys of which few frequencies have long vectors, as in trained models.

    In each head ``pairs`` of the 64 pairs, three quarters of them the slowest and the others drawn, are five times as long as the rest.
    """
    data = topical(sessions(length, 16, 112), heads, FASA_WIDTH, topics=256, sharp=1.5)
    drawn = torch.Generator().manual_seed(1)
    size = torch.full((heads, FASA_WIDTH // 2), 0.3)
    size[:, -pairs * 3 // 4 :] = 1.5
    for row in size:
        row[torch.randperm(FASA_WIDTH // 2 - pairs * 3 // 4, generator=drawn)[: pairs // 4]] = 1.5
    both = size.repeat(1, 2)[None, :, None]
    return Planted(rotated(data.q * both), rotated(data.k * both), data.v, data.begins)


def fasa(data: Planted, dominant: int, keep: int = 256) -> FasaAttention:
    """Calibrated on the first 4096 events (or all, where there are fewer)."""
    module = FasaAttention(FasaAttention.Config(min_length=0, dominant=dominant, keep=keep))
    length = min(4096, data.k.shape[2])
    module.calibrate([(data.q[:, :, length - 16 : length], data.k[:, :, :length])])
    return module


def fasa_macs(length: int, width: int, dominant: int, keep: int) -> int:
    """Multiply-adds of a step for each head: the dominant columns of all keys, then those that are read."""
    return 2 * dominant * length + 2 * keep * width


def fasa_counted(module: FasaAttention, data: Planted) -> tuple[int, int]:
    """Multiply-adds of a dense step, and of FASA's with packed columns."""
    packed, query = module.pack(data.k), data.q[:, :, -1:]
    with Cost() as dense:
        dense_attend(query, data.k, data.v)
    with Cost() as ours:
        module(query, data.k, data.v, packed=packed)
    return dense.macs, ours.macs


def fasa_loss(module: FasaAttention, data: Planted) -> tuple[Loss, float]:
    """The loss of the last steps, and the share of attention that the best choice of as many keys would drop."""
    length = data.k.shape[2]
    at = torch.arange(length - STEPS, length)
    attention = weights(data.q[:, :, at], data.k, at)
    chosen = [module.choose(data.q[:, :, i : i + 1], data.k, at[i - length + STEPS :][:1], None).mask(length) for i in at.tolist()]
    best = 1 - float(attention.topk(module.config.keep, dim=-1).values.sum(-1).mean())
    return loss(attention, torch.cat(chosen, 2), data.v), best


def fasa_rows(quick: bool) -> tuple[list[Row], list[Check]]:
    """At the paper's N_tip of 16 and of 8."""
    data, rows = frequent(), []
    query = data.q[:, :, -1:]
    for dominant in (16, 8):
        module = fasa(data, dominant)
        dense, ours = fasa_counted(module, data)
        packed = module.pack(data.k)
        wall = beside(
            lambda: dense_attend(query, data.k, data.v),
            partial(module, query, data.k, data.v, packed=packed),
            10 if quick else 20,
        )
        lost, best = fasa_loss(module, data)
        setting = f"decode, 32K keys, H={FASA_HEADS}, d={FASA_WIDTH}, N_tip={dominant}, N_fac={module.config.keep}"
        quality = f"{lost}; the best {module.config.keep} keys drop {best:.2%}"
        rows.append(Row("FASA", setting, dense / ours, "MACs", wall, "2.56x, end to end, AIME24", quality))
    note = (
        f"MACs (as many numbers are read) of a dense step over ours, counted, at the paper's default N_tip=16. This count cannot pass "
        f"d / N_tip = 8 at any length. With N_tip=8, which the paper also reports, {rows[1].saved:.2f}; wall-clock at 16: {rows[0].wall}"
    )
    return rows, [Check("fasa_32k", round(rows[0].saved, 3), at_least=8.0, note=note)]


def select_macs(length: int, width: int, config: TokenSelectAttention.Config) -> int:
    """Multiply-adds of the last chunk for each head: one query votes on the middle, then all read what was chosen."""
    before = length - config.chunk
    read = config.initial + config.keep + config.local + config.chunk
    return (before - config.local - config.initial) * width + 2 * config.chunk * read * width


def select_counted(config: TokenSelectAttention.Config, data: Planted) -> tuple[int, int]:
    """Multiply-adds of the last chunk, dense (all pairs) and ours."""
    query, positions = _last_chunk(data, config.chunk)
    with Cost() as dense:
        dense_attend(query, data.k, data.v)
    with Cost() as ours:
        TokenSelectAttention(config)(query, data.k, data.v, query_positions=positions)
    return dense.macs, ours.macs


def select_loss(config: TokenSelectAttention.Config, data: Planted) -> Loss:
    """The loss of every eighth query of the last chunk."""
    query, positions = _last_chunk(data, config.chunk)
    read = TokenSelectAttention(config).choose(query, data.k, positions, None).mask(data.k.shape[2])
    return loss(weights(query[:, :, ::8], data.k, positions[::8]), read, data.v)


def select_rows(quick: bool) -> tuple[list[Row], list[Check]]:
    """A chunk of 128 queries behind 64K keys."""
    data = topical(sessions(SELECT_LENGTH, 16, 112), SELECT_HEADS, SELECT_WIDTH, topics=32)
    dense, ours = select_counted(SELECT, data)
    query, positions = _last_chunk(data, SELECT_CHUNK)
    module = TokenSelectAttention(SELECT)
    wall = beside(
        lambda: dense_attend(query, data.k, data.v),
        lambda: module(query, data.k, data.v, query_positions=positions),
        5 if quick else 15,
    )
    first, mean = (select_loss(SELECT.model_copy(update={"representative": name}), data) for name in ("first", "mean"))
    longer = select_loss(SELECT, topical(sessions(SELECT_LENGTH, 128, 512), SELECT_HEADS, SELECT_WIDTH, topics=32))
    setting = f"chunk of {SELECT_CHUNK} queries, 64K keys, H={SELECT_HEADS}, d={SELECT_WIDTH}, k=2048, initial 128, local 512"
    quality = (
        f"sessions of 16 to 112 events, so that a chunk holds several: chosen by its first query {first}, by the mean as in the paper "
        f"{mean}; sessions of 128 to 512, first query {longer}"
    )
    row = Row("TokenSelect", setting, dense / ours, "MACs", wall, "6.09x of attention at 128K, 23.84x at 1M", quality)
    note = f"MACs of a chunk, dense over ours, counted; wall-clock {wall}"
    return [row], [Check("token_select_64k", round(row.saved, 3), at_least=5.0, note=note)]


def _last_chunk(data: Planted, chunk: int) -> tuple[Tensor, Tensor]:
    length = data.k.shape[2]
    return data.q[:, :, -chunk:], torch.arange(length - chunk, length)
