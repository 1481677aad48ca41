# SPDX-License-Identifier: Apache-2.0
from datetime import UTC, datetime

import numpy as np
import pytest

from recsys.core.errors import DataError
from recsys.data.augment import Augmentation
from recsys.data.jagged import Jagged
from recsys.data.leave_one_out import hold_out, leave_one_out
from recsys.data.sequences import SequenceData, evaluation_steps, histories
from recsys.data.windows import SequenceLoader

HISTORIES = {"a": [3, 1, 4, 1], "b": [5], "c": [], "d": [9, 2], "e": [6, 5, 3]}


def data() -> SequenceData:
    values = np.array([item for history in HISTORIES.values() for item in history])
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in HISTORIES.values()])])
    return SequenceData.from_order(list(HISTORIES), Jagged(values, offsets))


def test_the_last_event_tests_and_the_one_before_validates() -> None:
    split = leave_one_out(data())
    assert split.train.users.to_pylist() == list(HISTORIES)
    assert np.split(split.train.items, split.train.offsets[1:-1])[0].tolist() == [3, 1]
    assert [part.tolist() for part in np.split(split.train.items, split.train.offsets[1:-1])] == [[3, 1], [5], [], [9, 2], [6]]
    for steps, back in ((split.valid, 2), (split.test, 1)):
        assert steps.user_id.to_pylist() == ["a", "e"]
        assert steps.targets.values.tolist() == [HISTORIES["a"][-back], HISTORIES["e"][-back]]
        ((batch, seen),) = histories(data(), steps, max_length=2, chunk=10)
        whole = [HISTORIES["a"][:-back], HISTORIES["e"][:-back]]
        assert np.split(seen.values, seen.offsets[1:-1])[0].tolist() == whole[0]
        assert batch.items.tolist() == [item for history in whole for item in history[-2:]]
        assert steps.request_time.null_count == 2


def test_times_are_kept_where_they_are_known() -> None:
    known = data()
    timed = SequenceData(known.users, known.offsets, known.items, known.steps, np.arange(len(known.items)) * 1_000_000)
    split = leave_one_out(timed)
    assert split.train.known_times.tolist() == [0, 1_000_000, 4_000_000, 5_000_000, 6_000_000, 7_000_000]
    assert split.test.request_time.cast("int64").to_pylist() == [2_999_999, 8_999_999]


def test_items_that_are_held_out_are_new_in_test() -> None:
    split = hold_out(leave_one_out(data()), np.array([1, 5, 9]))
    assert [part.tolist() for part in np.split(split.train.items, split.train.offsets[1:-1])] == [[3], [], [], [2], [6]]
    assert split.valid.user_id.to_pylist() == ["a"] and split.valid.targets.values.tolist() == [4]
    assert split.test.targets.values.tolist() == [1, 3]
    ((_, seen),) = histories(data(), split.test, max_length=2, chunk=10)
    assert np.split(seen.values, seen.offsets[1:-1])[1].tolist() == [6, 5], "what a user really took stays in the history"


def test_every_training_event_is_a_target_once() -> None:
    train = leave_one_out(data()).train
    loader = SequenceLoader(train, max_length=3, batch_size=2, seed=0, config=SequenceLoader.Config(augmentation=Augmentation(hide=0.0)))
    targets = [item for batch in loader for item in batch.targets.tolist()]
    assert sorted(targets) == sorted(train.items.tolist())


def test_what_needs_times_says_so() -> None:
    for call in (
        lambda: data().before(datetime(2026, 1, 1, tzinfo=UTC)),
        lambda: evaluation_steps(data(), datetime(2026, 1, 1, tzinfo=UTC)),
    ):
        with pytest.raises(DataError, match="only their order is known"):
            call()
    with pytest.raises(DataError, match="histories: expected one for each of 2 users, got 1"):
        SequenceData.from_order(["a", "b"], Jagged(np.array([1]), np.array([0, 1])))
