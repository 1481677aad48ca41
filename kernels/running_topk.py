# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""A running list of the K best in registers: keys that order by score, then number, and a bitonic network that merges tiles of them.

A key is an int64: the score's bits, so turned that they order as numbers do, above what is subtracted from 2^32 - 1: of a larger key the
score is better, or the number smaller. NaN, of whatever sign, stands above infinity.

The network is a loop of gathers, and not the unrolled one of ``tl.topk``: that took a minute to compile for 1,024 keys, and Triton's
interpreter computes its exclusive ors element by element.
"""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(1 << 63))  # below the key of every score
LAST = tl.constexpr((1 << 32) - 1)


def warps_of(block: int) -> int:
    """Warps of a program that does little but merge tiles of so many keys: with 4, some of 256 and of 1,024 keep 8 bytes on the stack."""
    return 4 if block < 256 else 8


@triton.jit
def key_of(score, number):
    """The int64 key of a float32 score and a number of 0 to 2^32 - 1, int64."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    bits = tl.where(score == score, bits, 0x7FC00000)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (LAST - number)


@triton.jit
def score_of(key):
    """The float32 score of a key; -inf for `NO_KEY`."""
    ordered = (key >> 32).to(tl.int32)
    score = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    return tl.where(key == NO_KEY, float("-inf"), score)


@triton.jit
def number_of(key):
    """The number of a key, int64."""
    return LAST - (key & LAST)


@triton.jit
def _falling(keys, SIZE: tl.constexpr, first_run):
    """``keys [SIZE]`` in falling order, of which runs of half of ``first_run`` fall and rise in turn already."""
    at = tl.arange(0, SIZE)
    run = first_run
    while run <= SIZE:
        falls = (at & run) == 0  # runs of this size do so in turn after this
        distance = run // 2
        while distance > 0:
            partner = tl.gather(keys, at ^ distance, 0)
            takes_larger = ((at & distance) == 0) == falls
            keys = tl.where(takes_larger, tl.maximum(keys, partner), tl.minimum(keys, partner))
            distance //= 2
        run *= 2
    return keys


@triton.jit
def taken_in(best, keys, K: tl.constexpr, BLOCK: tl.constexpr):
    """The K best of ``best [K]``, falling, and of the tile ``keys [BLOCK]``, falling; powers of two, K at most BLOCK."""
    at = tl.arange(0, K)
    keys = _falling(keys, BLOCK, 2)
    rising = tl.gather(keys, K - 1 - at, 0)  # the K best of the tile
    return _falling(tl.maximum(best, rising), K, K)  # first down, then up


@triton.jit
def is_in(SORTED, begin, end, x):
    """Whether each number of x is among the ascending ones from ``begin`` to ``end``."""
    place = begin + tl.zeros_like(x)
    left = end - begin
    while left > 1:
        half = left // 2
        place = tl.where(tl.load(SORTED + place + half) <= x, place + half, place)
        left -= half
    return tl.load(SORTED + place, mask=place < end, other=-1) == x
