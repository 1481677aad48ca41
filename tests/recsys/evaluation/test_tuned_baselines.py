# SPDX-License-Identifier: Apache-2.0
from itertools import product

import numpy as np
import pytest

from recsys.data.jagged import Jagged
from recsys.data.leave_one_out import LeaveOneOut, leave_one_out
from recsys.data.sequences import SequenceData
from recsys.evaluation.metrics.ranking import recall_at
from recsys.evaluation.retrieval import Scorer, event_ranks
from recsys.evaluation.tuned_baselines import DECAYS, tuned, tuned_item_knn, tuned_text_knn
from recsys.retrieval.baselines import ItemKNN, TextKNN

N, USERS, LONGEST = 24, 80, 8


@pytest.fixture(scope="module")
def data() -> SequenceData:
    """Walks from an item to one of the next few: what came last says most."""
    rng = np.random.default_rng(0)
    walks = (rng.integers(0, N, (USERS, 1)) + rng.integers(1, 5, (USERS, LONGEST)).cumsum(1)) % N
    return SequenceData.from_order([f"u{i}" for i in range(USERS)], Jagged(walks.reshape(-1), np.arange(USERS + 1) * LONGEST))


@pytest.fixture(scope="module")
def split(data: SequenceData) -> LeaveOneOut:
    return leave_one_out(data)


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """Neighbours on a circle."""
    angle = 2 * np.pi * np.arange(N) / N
    return np.stack((np.cos(angle), np.sin(angle)), 1).astype(np.float32)


def test_the_best_of_all_settings_on_validation_is_chosen(data: SequenceData, split: LeaveOneOut, text: np.ndarray) -> None:
    def quality(scorer: Scorer) -> float:
        return float(recall_at(event_ranks(scorer, data, split.valid, LONGEST), 3).mean())

    by_votes = {decay: quality(ItemKNN(ItemKNN.Config(neighbours=N, decay=decay)).fit(split.train, N).scores) for decay in DECAYS}
    chosen = tuned_item_knn(split.train, N, quality)
    assert (chosen.config.neighbours, chosen.config.decay) == (N, max(by_votes, key=lambda decay: by_votes[decay]))
    assert quality(chosen.scores) == max(by_votes.values()) > min(by_votes.values())

    settings = {(pooling, decay): TextKNN.Config(pooling=pooling, decay=decay) for pooling, decay in product(("mean", "max"), DECAYS)}
    by_text = {key: quality(TextKNN(config, text).fit(split.train, N).scores) for key, config in settings.items()}
    found = tuned_text_knn(split.train, text, quality)
    assert (found.config.pooling, found.config.decay) == max(by_text, key=lambda key: by_text[key])
    assert quality(found.scores) == max(by_text.values()) > min(by_text.values())


def test_of_equals_the_earlier_is_chosen(data: SequenceData) -> None:
    candidates = [ItemKNN(ItemKNN.Config(decay=decay)).fit(data, N) for decay in DECAYS]
    for values in ([0.1, 0.3, 0.2, 0.3, 0.0], [0.5] * 5):
        given = iter(values)
        assert tuned(iter(candidates), lambda scorer, given=given: next(given)) is candidates[int(np.argmax(values))]
