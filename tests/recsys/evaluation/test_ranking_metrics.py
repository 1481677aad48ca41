# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from recsys.data.jagged import Jagged
from recsys.evaluation.full_ranking import target_ranks
from recsys.evaluation.metrics.ranking import mrr, ndcg_at, recall_at

N = 40


def lists(rng: np.random.Generator, sizes: list[int]) -> tuple[np.ndarray, Jagged]:
    """Distinct scores of N items and a few targets for each row."""
    scores = np.stack([rng.permutation(N) for _ in sizes]).astype(float)
    targets = np.concatenate([rng.choice(N, size, replace=False) for size in sizes])
    return scores, Jagged(targets, np.concatenate([[0], np.cumsum(sizes)]))


# In a process of its own: compiling ranx takes minutes, and whether numba compiles is settled when it is imported.
RANX = """
import json, sys
from ranx import Qrels, Run, evaluate
given = json.load(sys.stdin)
values = evaluate(Qrels(given["qrels"]), Run(given["run"]), given["metrics"], threads=1)
print(json.dumps({name: float(value) for name, value in values.items()}))
"""


def ranx(qrels: dict, run: dict, metrics: list[str]) -> dict[str, float]:
    given = json.dumps({"qrels": qrels, "run": run, "metrics": metrics})
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", RANX], input=given, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_lists_of_several_targets_agree_with_ranx() -> None:
    scores, targets = lists(np.random.default_rng(0), [1, 3, 7, 12, 2])
    ranks = target_ranks(scores, targets)
    run = {str(b): {str(i): float(s) for i, s in enumerate(row)} for b, row in enumerate(scores)}
    relevant = [targets.values[a:b] for a, b in zip(targets.offsets[:-1], targets.offsets[1:], strict=True)]
    qrels = {str(b): {str(i): 1 for i in row} for b, row in enumerate(relevant)}
    ours = {}
    for k in (1, 5, 20, N):
        ours[f"recall@{k}"] = recall_at(ranks, k, targets.offsets).mean()
        ours[f"ndcg@{k}"] = ndcg_at(ranks, k, targets.offsets).mean()
        ours[f"mrr@{k}"] = mrr(ranks, k, targets.offsets).mean()
    assert ours == pytest.approx(ranx(qrels, run, list(ours)), abs=1e-12)


def test_ndcg_agrees_with_sklearn() -> None:
    scores, targets = lists(np.random.default_rng(1), [2, 5, 9])
    relevance = np.zeros_like(scores)
    relevance[np.repeat(np.arange(3), np.diff(targets.offsets)), targets.values] = 1
    ours = ndcg_at(target_ranks(scores, targets), 10, targets.offsets)
    for b in range(3):
        assert ours[b] == pytest.approx(ndcg_score(relevance[b : b + 1], scores[b : b + 1], k=10), abs=1e-12)


def test_by_hand() -> None:
    ranks = [1, 2, 3, 11, np.inf]
    assert recall_at(ranks, 2).tolist() == [1, 1, 0, 0, 0]
    assert ndcg_at(ranks, 10).tolist() == pytest.approx([1, 1 / np.log2(3), 0.5, 0, 0])
    assert mrr(ranks).tolist() == pytest.approx([1, 0.5, 1 / 3, 1 / 11, 0])
    assert mrr(ranks, 2).tolist() == [1, 0.5, 0, 0, 0]
    # Three targets at 1, 3 and 4, cut at 2: the ideal list is cut at 2 as well.
    assert ndcg_at([1, 3, 4], 2, [0, 3])[0] == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert ndcg_at([1, 2, 7], 2, [0, 3])[0] == 1.0
    assert recall_at([1, 2, 7], 2, [0, 3])[0] == pytest.approx(2 / 3)


def test_a_list_of_one_target_is_an_event() -> None:
    ranks = np.array([1, 4.5, 30, np.inf])
    offsets = np.arange(5)
    for k in (1, 4, 5, 50):
        assert recall_at(ranks, k, offsets).tolist() == recall_at(ranks, k).tolist()
        assert ndcg_at(ranks, k, offsets).tolist() == ndcg_at(ranks, k).tolist()
        assert mrr(ranks, k, offsets).tolist() == mrr(ranks, k).tolist()


def test_a_list_without_targets_has_no_value() -> None:
    for metric in (lambda r, o: recall_at(r, 3, o), lambda r, o: ndcg_at(r, 3, o), lambda r, o: mrr(r, 3, o)):
        values = metric([2.0, 1.0], [0, 0, 1, 1, 2, 2])
        assert np.isnan(values).tolist() == [True, False, True, False, True]
        assert values[3] == 1.0
        assert np.isnan(metric([], [0, 0])).tolist() == [True]
        assert len(metric([], None)) == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="ranks: expected one axis of values of at least 1"):
        recall_at([0, 1], 5)
    with pytest.raises(ValueError, match="ranks: expected one axis"):
        mrr([1, np.nan])
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        ndcg_at([1.0], 0)
    with pytest.raises(ValueError, match="offsets: expected them to rise from 0 to 2"):
        recall_at([1.0, 2.0], 5, [0, 1])
