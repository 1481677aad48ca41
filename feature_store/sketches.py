# SPDX-License-Identifier: Apache-2.0
"""Two summaries of bounded size that can be merged: how many distinct values there are, and a sample to take quantiles of.

Both are functions of sets: merging is associative, commutative and idempotent to the bit, so it does not matter what is merged first.

*Distinct values*: HyperLogLog (Flajolet et al., 2007), with the estimator of Ertl ("New cardinality estimation algorithms for HyperLogLog
sketches", 2017, algorithm 6), which has no bias for small sets and needs no tables. Only registers that were hit are kept.

*Quantiles*: the events with the smallest hashes of their identity, a uniform sample without replacement. A sketch that keeps what orders
tell of each other (KLL) has a smaller error for its size, but its content depends on the order of merging.
"""

import numpy as np

_RHO = 64
"""A register's code is its number times this, plus its content."""


def registers(hashes: np.ndarray, precision: int) -> np.ndarray:
    """int64 ``[N]``: the code of the register that each hash (uint64 ``[N]``) sets, of ``2**precision`` ones."""
    rest = np.uint64(64 - precision)
    content = np.int64(rest) - _bit_length(hashes & ((np.uint64(1) << rest) - np.uint64(1))) + 1
    return (hashes >> rest).astype(np.int64) * _RHO + content


def merge_registers(row: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greatest content of each register of each row: the rows and codes that are left, by row and register.

    Args:
        row: int64 ``[M]``.
        codes: int64 ``[M]``, each below 2**22.
    """
    joined = np.sort((row << np.int64(22)) | codes)
    last = np.ones(len(joined), bool)
    last[:-1] = joined[1:] // _RHO != joined[:-1] // _RHO
    kept = joined[last]
    return kept >> np.int64(22), kept & np.int64((1 << 22) - 1)


def estimate(offsets: np.ndarray, codes: np.ndarray, precision: int) -> np.ndarray:
    """float64 ``[R]``: how many distinct values there were, by merged codes; 0 where there are none.

    Args:
        offsets: int64 ``[R + 1]``, where each row's codes begin.
        codes: int64, each register at most once in a row.
        precision: of the registers.
    """
    count, rows, rest = 1 << precision, len(offsets) - 1, 64 - precision
    row = np.repeat(np.arange(rows), np.diff(offsets))
    held = np.bincount(row * _RHO + codes % _RHO, minlength=rows * _RHO).reshape(rows, _RHO)
    z = count * _tau(1 - held[:, rest + 1] / count)
    for content in range(rest, 0, -1):
        z = 0.5 * (z + held[:, content])
    z = z + count * _sigma(1 - np.diff(offsets) / count)
    return np.asarray(count * count / (2 * np.log(2) * z))


def smallest(row: np.ndarray, hashes: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The positions of the ``size`` smallest (hash, value) of each row, by row, hash and value.

    Args:
        row: int64 ``[M]``, ascending.
        hashes: int64 ``[M]``.
        values: float64 ``[M]``.
        size: how many are kept.
    """
    order = np.lexsort((values, hashes, row))
    return order[_rank(row) < size]


def quantiles(offsets: np.ndarray, values: np.ndarray, q: float) -> np.ndarray:
    """float64 ``[R]``: of each row the smallest value that at least the share ``q`` does not exceed; NaN where it has none.

    Args:
        offsets: int64 ``[R + 1]``, where each row's values begin.
        values: float64.
        q: from 0 to 1.
    """
    count = np.diff(offsets)
    ordered = np.append(values[np.lexsort((values, np.repeat(np.arange(len(count)), count)))], np.nan)
    place = np.maximum(np.ceil(q * count - 1e-9).astype(np.int64), 1) - 1
    return np.where(count > 0, ordered[np.where(count > 0, offsets[:-1] + place, -1)], np.nan)


def _rank(row: np.ndarray) -> np.ndarray:
    """The place of each element among those of its row, which ascends."""
    return np.arange(len(row)) - np.searchsorted(row, row)


def _bit_length(x: np.ndarray) -> np.ndarray:
    """int64: the bits that each uint64 needs, 0 for 0."""
    length = np.zeros(len(x), np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        large = x >= np.uint64(1) << np.uint64(step)
        length += step * large
        x = np.where(large, x >> np.uint64(step), x)
    return length + (x > 0)


def _sigma(x: np.ndarray) -> np.ndarray:
    """``x + sum(x**(2**k) * 2**(k - 1))`` over k from 1 on, for x in [0, 1]; infinite at 1."""
    full, power, weight = x == 1, np.where(x == 1, 0.0, x), 1.0
    total = power
    while True:
        power = power * power
        more = total + power * weight
        if (more == total).all():
            return np.where(full, np.inf, total)
        total, weight = more, 2 * weight


def _tau(x: np.ndarray) -> np.ndarray:
    """``(1 - x - sum((1 - x**(2**-k))**2 * 2**-k)) / 3`` over k from 1 on, for x in [0, 1]; 0 at 0 and 1."""
    edge, root, weight = (x == 0) | (x == 1), np.where(x == 0, 1.0, x), 1.0
    total = 1 - root
    while True:
        root, weight = np.sqrt(root), 0.5 * weight
        less = total - (1 - root) ** 2 * weight
        if (less == total).all():
            return np.where(edge, 0.0, total / 3)
        total = less
