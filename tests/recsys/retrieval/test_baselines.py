# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics.pairwise import cosine_similarity

from recsys.core.errors import DataError
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData
from recsys.retrieval.baselines import Baseline, ItemKNN, Popularity, RepeatLast, TextKNN
from recsys.retrieval.baselines import item_knn as module

DAY = 86_400_000_000


def data_of(lists: list[list[int]], days: list[list[float]] | None = None) -> SequenceData:
    """Users by their items, oldest first; each event a step of its own."""
    days = days or [list(range(len(items))) for items in lists]
    offsets = np.cumsum([0, *map(len, lists)])
    flat = np.array([i for items in lists for i in items], np.int64)
    times = np.array([int(d * DAY) for user in days for d in user], np.int64)
    return SequenceData(pa.array([f"u{i}" for i in range(len(lists))]), offsets, flat, np.arange(len(flat)), times)


def batch_of(lists: list[list[int]]) -> SequenceBatch:
    return SequenceBatch(
        items=torch.tensor([i for items in lists for i in items], dtype=torch.int64), offsets=torch.tensor(np.cumsum([0, *map(len, lists)]))
    )


def random_lists(seed: int, users: int, items: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, items, rng.integers(0, longest + 1)).tolist() for _ in range(users)]


def test_popularity_counts_events() -> None:
    lists = random_lists(0, 30, 12, 9)
    scores = Popularity(Popularity.Config()).fit(data_of(lists), 15).scores(batch_of([[], [1, 2], [3]]))
    assert scores.dtype == np.float32 and scores.shape == (3, 15)
    for row in scores:
        assert row.tolist() == [sum(items.count(i) for items in lists) for i in range(15)]


def test_popularity_of_the_last_days() -> None:
    data = data_of([[0, 1, 2], [2, 3]], [[0, 8, 10], [3.5, 9.999]])
    scores = Popularity(Popularity.Config(window_days=2)).fit(data, 4).scores(batch_of([[]]))
    assert scores.tolist() == [[0, 0, 1, 1]]  # newest day 10; day 8 is two days older, not less
    with pytest.raises(DataError, match="at least one training event"):
        Popularity(Popularity.Config()).fit(data_of([[]]), 4)


def dense_users(lists: list[list[int]], items: int) -> np.ndarray:
    matrix = np.zeros((len(lists), items))
    for user, taken in enumerate(lists):
        matrix[user, taken] = 1
    return matrix


def test_similarity_is_the_cosine_of_scikit_learn() -> None:
    lists = random_lists(1, 40, 15, 10)
    model = ItemKNN(ItemKNN.Config(neighbours=15)).fit(data_of(lists), 17)
    expected = cosine_similarity(dense_users(lists, 17).T)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(model.similarity.toarray(), expected, atol=1e-6)


@pytest.mark.parametrize(("neighbours", "shrinkage", "decay", "rows_at_once"), [(3, 0.0, 1.0, 2048), (4, 2.5, 0.7, 4), (1, 10.0, 0.5, 5)])
def test_scores_against_brute_force(
    neighbours: int, shrinkage: float, decay: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows_at_once)
    n, lists = 14, random_lists(2, 40, 13, 8)
    config = ItemKNN.Config(neighbours=neighbours, shrinkage=shrinkage, decay=decay)
    model = ItemKNN(config).fit(data_of(lists), n)

    users = [{user for user, items in enumerate(lists) if i in items} for i in range(n)]
    similarity = np.zeros((n, n))
    for h in range(n):
        values = {}
        for i in range(n):
            if i != h and users[h] & users[i]:
                values[i] = len(users[h] & users[i]) / (np.sqrt(len(users[h]) * len(users[i])) + shrinkage)
        for i in sorted(values, key=lambda i: (-round(values[i], 12), i))[:neighbours]:
            similarity[h, i] = values[i]

    asked = [*random_lists(3, 20, n, 6), [], [5, 5, 5]]
    expected = np.zeros((len(asked), n))
    for b, history in enumerate(asked):
        for age, h in enumerate(reversed(history)):
            expected[b] += decay**age * similarity[h]
    scores = model.scores(batch_of(asked))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_a_repeated_event_counts_once_in_the_similarity() -> None:
    once = ItemKNN(ItemKNN.Config()).fit(data_of([[0, 1], [1, 2]]), 3)
    often = ItemKNN(ItemKNN.Config()).fit(data_of([[0, 1, 0, 1, 1], [2, 1, 2]]), 3)
    np.testing.assert_array_equal(once.similarity.toarray(), often.similarity.toarray())


def test_an_item_without_events_gets_no_votes_and_gives_none() -> None:
    model = ItemKNN(ItemKNN.Config()).fit(data_of([[0, 1], []]), 3)
    scores = model.scores(batch_of([[2], [0, 2]]))
    assert scores[:, 2].tolist() == [0, 0]
    assert scores[0].tolist() == [0, 0, 0]
    assert ItemKNN(ItemKNN.Config()).fit(data_of([]), 0).scores(batch_of([[], []])).shape == (2, 0)


def texts(seed: int, items: int, without: tuple[int, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found: np.ndarray = (rng.normal(size=(items, 6)) * rng.uniform(0.1, 9, (items, 1))).astype(np.float32)
    found[list(without)] = 0
    return found


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(("decay", "at_once"), [(1.0, 1 << 22), (0.6, 1), (0.6, 70)])
def test_text_scores_against_brute_force(
    pooling: Literal["mean", "max"], decay: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys.retrieval.baselines.text_knn._COSINES_AT_ONCE", at_once)
    n, without = 14, (3, 9)
    text = texts(4, n, without)
    model = TextKNN(TextKNN.Config(pooling=pooling, decay=decay), torch.from_numpy(text)).fit(data_of([[0, 1]]), n)
    cosine = cosine_similarity(text.astype(np.float64))
    asked = [*random_lists(5, 30, n, 7), [], [5, 5, 5], [3, 9], [2, 3], [9, 2]]
    expected = np.zeros((len(asked), n))
    for b, history in enumerate(asked):
        votes = [(decay**age, cosine[h]) for age, h in enumerate(reversed(history)) if h not in without]
        if votes and pooling == "mean":
            expected[b] = sum(w * c for w, c in votes) / sum(w for w, _ in votes)
        elif votes:
            expected[b] = np.max([w * c for w, c in votes], axis=0)
        expected[b, list(without)] = -np.inf
    scores = model.scores(batch_of(asked))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert model.scores(batch_of([])).shape == (0, n)


def test_text_finds_items_without_events_and_does_not_look_at_lengths() -> None:
    text = texts(6, 5)
    text[4] = 0.01 * text[1]  # item 4 has no event
    for pooling in ("mean", "max"):
        model = TextKNN(TextKNN.Config(pooling=pooling), text).fit(data_of([[0, 1, 2, 3]]), 5)
        (scores,) = model.scores(batch_of([[1]]))
        assert scores[4] == pytest.approx(1, abs=1e-6) and (scores[[0, 2, 3]] < 0.999).all()


def test_text_that_does_not_fit_is_named() -> None:
    config, data = TextKNN.Config(), data_of([[0, 1]])
    with pytest.raises(DataError, match=r"text_knn: text: expected shape \[3, D\], one row for each item, got \[2, 6\]"):
        TextKNN(config, texts(0, 2)).fit(data, 3)
    text = texts(0, 3)
    text[1, 2] = np.inf
    with pytest.raises(DataError, match="text_knn: text: row 1 is not finite"):
        TextKNN(config, text).fit(data, 3)


def test_all_have_the_one_interface_and_reject_nonsense() -> None:
    models: list[Baseline] = [
        Popularity(Popularity.Config()),
        ItemKNN(ItemKNN.Config()),
        RepeatLast(RepeatLast.Config()),
        TextKNN(TextKNN.Config(), texts(0, 3)),
    ]
    for model in models:
        assert model.fit(data_of([[0, 1]]), 3) is model
        assert model.scores(batch_of([[0, 2], []])).shape == (2, 3)
    for wrong in ({"neighbours": 0}, {"decay": 0.0}, {"decay": 1.5}, {"shrinkage": -1}, {"neighbors": 3}):
        with pytest.raises(ValidationError):
            ItemKNN.Config(**wrong)
    for other in ({"decay": 0.0}, {"decay": 1.5}, {"pooling": "sum"}):
        with pytest.raises(ValidationError):
            TextKNN.Config(**other)
    with pytest.raises(ValidationError):
        Popularity.Config(window_days=0)
