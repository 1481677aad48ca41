# SPDX-License-Identifier: Apache-2.0
"""The exact rank of targets among the whole catalogue.

Sampled negatives are not offered: their metrics are inconsistent with the exact ones even in expectation (Krichene & Rendle, On Sampled
Metrics for Item Recommendation, CACM 2022).
"""

from typing import Any, Literal, get_args

import numpy as np

from recsys.data.jagged import Jagged

Ties = Literal["average", "pessimistic", "optimistic", "random"]

_BUDGET = 1 << 22  # comparisons of a chunk: keeps the temporaries of a chunk in tens of megabytes


def target_ranks(
    scores: Any,
    targets: Jagged | np.ndarray,
    exclude: Jagged | None = None,
    eligible: np.ndarray | None = None,
    ties: Ties = "average",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """The rank of every target among the items that may be recommended to its row: the eligible ones less the excluded ones.

    With G items of a higher score and E of an equal one (the target among them), the rank is G + (E + 1) / 2 for ``average``, G + E for
    ``pessimistic``, G + 1 for ``optimistic``, and for ``random`` one of G + 1 to G + E, drawn from ``rng``. Under ``random`` every metric
    is unbiased for a list that breaks ties at random, so a constant scorer has Recall@k = k / n in expectation; under ``average`` it
    has the mean rank (n + 1) / 2, and no metric of the head of the list gets credit for ties that reach beyond k.

    Other targets of the same row compete like any other item.

    Args:
        scores: ``[B, N]``, higher is better, on the CPU. Infinities are allowed: an item that a model cannot score has -inf, and ties
            with all others of that kind.
        targets: for each row its target items, values within 0 to N − 1; or ``[B]``, one target for each row.
        exclude: for each row the items not to be recommended, such as those already seen; repeats are allowed.
        eligible: bool ``[N]`` or ``[B, N]``: the items that may be recommended at all; all of them by default.
        ties: the rank within a run of equal scores.
        rng: for ``random``.

    Returns:
        float64 ``[M]`` in the order of the targets, 1 is best. A target that may not be recommended itself (excluded, as on a repeat, or
        not eligible) has the rank infinity, since no list can show it: it counts as a miss, and ``np.isinf(ranks)`` counts such targets.

    Raises:
        ValueError: shapes do not agree, a score is NaN, or a target or an excluded item is not within 0 to N − 1.
    """
    scores = _check_scores(scores)
    rows, items = _flatten(targets, scores, "targets")
    excluded = _flatten(exclude, scores, "exclude") if exclude is not None else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    eligible = _check_eligible(eligible, scores)
    if ties not in get_args(Ties):
        raise ValueError(f"ties: expected one of {', '.join(get_args(Ties))}, got {ties!r}")
    if ties == "random" and rng is None:
        raise ValueError("ties 'random': expected rng, a numpy Generator")
    chunk = max(1, _BUDGET // max(1, scores.shape[1]))
    above, equal = np.zeros(len(items), np.int64), np.zeros(len(items), np.int64)
    for start in range(0, len(items), chunk):
        part = slice(start, start + chunk)
        above[part], equal[part] = _count(scores, rows[part], items[part], excluded, eligible)
    return _rank(above, equal, ties, rng)


def _count(
    scores: np.ndarray, rows: np.ndarray, items: np.ndarray, excluded: tuple[np.ndarray, np.ndarray], eligible: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """How many allowed items score above each target, and how many as much; the latter 0 where the target itself is not allowed."""
    first, last = int(rows[0]), int(rows[-1]) + 1  # rows rise
    allowed = np.ones((last - first, scores.shape[1]), bool)
    if eligible is not None:
        allowed &= eligible if eligible.ndim == 1 else eligible[first:last]
    from_, to = np.searchsorted(excluded[0], [first, last])
    allowed[excluded[0][from_:to] - first, excluded[1][from_:to]] = False
    # NaN is neither above nor equal to anything, which takes an item out of the competition.
    competing = np.where(allowed, scores[first:last], np.nan)[rows - first]
    own = scores[rows, items][:, None]
    above, equal = (competing > own).sum(axis=1), (competing == own).sum(axis=1)
    return above, np.where(allowed[rows - first, items], equal, 0)


def _rank(above: np.ndarray, equal: np.ndarray, ties: Ties, rng: np.random.Generator | None) -> np.ndarray:
    if ties == "average":
        place = (equal + 1) / 2
    elif ties == "pessimistic":
        place = equal.astype(np.float64)
    elif ties == "optimistic":
        place = np.ones(len(equal))
    else:
        assert rng is not None
        place = 1 + np.floor(rng.random(len(equal)) * equal)
    return np.where(equal > 0, above + place, np.inf)


def _flatten(lists: Jagged | np.ndarray, scores: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The row and the item of every element, rows rising."""
    count, catalogue = scores.shape
    if isinstance(lists, tuple):
        items, offsets = np.asarray(lists[0]), np.asarray(lists[1])
        if offsets.shape != (count + 1,) or offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{name}: expected {count + 1} offsets that rise from 0 to {len(items)}, got {offsets}")
        rows = np.repeat(np.arange(count), np.diff(offsets))
    else:
        items, rows = np.asarray(lists), np.arange(count)
        if items.shape != (count,):
            raise ValueError(f"{name}: expected one for each of the {count} rows, got the shape {items.shape}")
    wrong = (items < 0) | (items >= catalogue)
    if wrong.any():
        raise ValueError(f"{name}: expected catalogue rows from 0 to {catalogue - 1}, got {items[wrong][0]}")
    return rows, items


def _check_scores(scores: Any) -> np.ndarray:
    array: np.ndarray = np.asarray(scores)
    if array.ndim != 2:
        raise ValueError(f"scores: expected two axes, users and items, got the shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError("scores: expected numbers, got NaN")
    return array


def _check_eligible(eligible: np.ndarray | None, scores: np.ndarray) -> np.ndarray | None:
    if eligible is None:
        return None
    eligible = np.asarray(eligible)
    if eligible.dtype != bool or eligible.shape not in (scores.shape, scores.shape[1:]):
        raise ValueError(f"eligible: expected bool {scores.shape[1:]} or {scores.shape}, got {eligible.dtype} {eligible.shape}")
    return eligible
