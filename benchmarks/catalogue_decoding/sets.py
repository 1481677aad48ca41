# SPDX-License-Identifier: Apache-2.0
"""All slots of the next item in one pass, beside its codes one after another: does the time saved follow the operations saved?

Both read the same encoded history through the same transformer of TIGER's size, with the same decoder. All at once, the slots are queries
that see the history and not each other (SETRec); one after another, beams go on from code to code, with their keys and values kept. A
history is as many tokens as its items have slots, or with ``pooled`` one token for each item.
"""

from collections.abc import Callable
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import recsys.ranking.mixers.attention  # noqa: F401  teaches the counter the fused attention of CPUs
from benchmarks.frame import Check, Ratio, ratio
from recsys.retrieval.t5 import T5, BeamDecoder, T5Config
from recsys.training.progress import track

SLOTS, BEAMS, HISTORIES, CODES, USERS = (4, 8, 16, 32), (1, 10, 50), (10, 50), 256, 4


def at_once(model: T5, tokens_bs: Tensor, valid_bs: Tensor, slots: int) -> Tensor:
    """``[B, K, d]``: the states of K queries."""
    decoder = BeamDecoder(model, model.encode(tokens_bs, valid_bs), valid_bs)
    queries = torch.arange(1, slots + 1).expand(len(tokens_bs), -1)
    return decoder.advance(torch.full_like(queries, -1), queries)


def one_by_one(model: T5, tokens_bs: Tensor, valid_bs: Tensor, slots: int, width: int) -> Tensor:
    """``[B, W]``: the scores of the best sequences of K codes."""
    users = len(tokens_bs)
    decoder = BeamDecoder(model, model.encode(tokens_bs, valid_bs), valid_bs)
    scores, tokens, parents = torch.zeros(users, 1), torch.zeros(users, 1, dtype=torch.int64), torch.full((users, 1), -1)
    for _ in range(slots):
        log_probs = model.logits(decoder.advance(parents, tokens), slice(1, 1 + CODES)).log_softmax(-1)
        scores, place = (scores[..., None] + log_probs).flatten(1).topk(min(width, log_probs.shape[1] * CODES))
        parents, tokens = place // CODES, 1 + place % CODES
    return scores


def _operations(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _compare(model: T5, slots: int, width: int, history: int, pooled: bool, pairs: int) -> tuple[Ratio, float]:
    """How much faster all at once is, and how many times fewer operations it has."""
    length = history if pooled else history * slots
    tokens = torch.randint(1, 1 + CODES, (USERS, length))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    calls = (lambda: one_by_one(model, tokens, valid, slots, width), lambda: at_once(model, tokens, valid, slots))
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs + 1):
        for call, kept in zip(calls, seconds, strict=True):
            start = perf_counter()
            call()
            if turn:
                kept.append(perf_counter() - start)
    return ratio(*seconds), _operations(calls[0]) / _operations(calls[1])


@torch.inference_mode()
def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """The rows and the checks of this part."""
    torch.manual_seed(0)
    model = T5(T5Config(), 1 + CODES).eval()
    rows = []
    grid = list(product((4, 32) if quick else SLOTS, (1, 50) if quick else BEAMS, HISTORIES))
    for slots, width, history in track(grid, "sets and tokens"):
        speed, fewer = _compare(model, slots, width, history, pooled=False, pairs=5)
        rows.append(_row(slots, width, history, "tokens", speed, fewer))
    shares = [row["share"] for row in rows]
    mean = float(np.exp(np.mean(np.log(shares))))
    note = f"geometric mean over {len(rows)} settings; {min(shares):.2f} to {max(shares):.2f}"
    speed, fewer = _compare(model, 32, 50, 50, pooled=True, pairs=5)
    rows.append(_row(32, 50, 50, "pooled", speed, fewer))
    return rows, [Check("set_vs_token_flops", round(mean, 3), at_least=0.8, note=note), speed.at_least("set_over_token_32", 10)]


def _row(slots: int, width: int, history: int, read: str, speed: Ratio, fewer: float) -> dict[str, Any]:
    shape = {"slots": slots, "beams": width, "history": history, "history read as": read}
    return shape | {"times faster": speed.estimate, "times fewer operations": fewer, "share": speed.estimate / fewer}
