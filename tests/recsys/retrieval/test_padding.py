# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.core.errors import CannotScoreNewItems, DataError
from recsys.retrieval.padding import pad_last, require_known_rows, training_targets
from tests.recsys.retrieval.coded import batch_of, build

HISTORIES = st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6)


@given(HISTORIES, st.integers(1, 8))
def test_pad_last_keeps_the_newest_events_of_each_history(histories, max_length):
    padded, lengths = pad_last(batch_of(histories), max_length)
    kept = [h[-max_length:] for h in histories]
    width = max(map(len, kept))
    assert padded.tolist() == [h + [0] * (width - len(h)) for h in kept]
    assert lengths.tolist() == [len(h) for h in kept]


@given(HISTORIES, st.data())
def test_states_are_distinct_and_lead_every_target_back_to_its_prefix(histories, data):
    places = [(row, position) for row, h in enumerate(histories) for position in range(len(h) + 1)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=20))
    batch = batch_of(histories, [(*place, 1) for place in chosen])
    targets, states = training_targets(batch, max_length=7, known=None)
    pairs = list(zip(states.row.tolist(), states.position.tolist(), strict=True))
    assert pairs == sorted(set(chosen))
    assert [pairs[s] for s in states.of_target] == chosen
    assert targets.tolist() == [1] * len(chosen)
    positions, column = states.padded(len(histories))
    assert torch.equal(positions[states.row, column], states.position)
    assert positions.shape[1] == max(sum(row == r for row, _ in pairs) for r in range(len(histories)))


def test_targets_that_are_no_candidates_are_left_out():
    batch = batch_of([[1, 2], [3]], [(0, 0, 1), (0, 1, 2), (1, 0, 3)])
    known = torch.tensor([True, True, False, True])
    targets, states = training_targets(batch, max_length=5, known=known)
    assert targets.tolist() == [1, 3]
    assert states.row.tolist() == [0, 1]


def test_a_batch_without_targets_cannot_train():
    with pytest.raises(DataError, match="no targets"):
        training_targets(batch_of([[1]]), 5, None)


def test_a_row_longer_than_the_window_is_named():
    with pytest.raises(DataError, match=r"row 1 has 3 events.*max_length=2"):
        training_targets(batch_of([[1], [1, 2, 3]], [(0, 0, 1)]), 2, None)


@pytest.mark.parametrize("row, position", [(0, 2), (0, -1), (2, 0), (-1, 0)])
def test_a_target_outside_its_history_is_named(row, position):
    batch = batch_of([[1], [1, 2]], [(0, 0, 1), (row, position, 1)])
    with pytest.raises(DataError, match=rf"target 1 has target_row={row}, target_position={position}"):
        training_targets(batch, 5, None)


@pytest.mark.parametrize(
    "histories, target, message", [([[1, 4]], 0, "items: row 4"), ([[1, -2]], 0, "items: row -2"), ([[1]], 7, "targets: row 7")]
)
def test_rows_beyond_the_catalogue_are_refused(histories, target, message):
    with pytest.raises(CannotScoreNewItems, match=rf"{message}: .* rows 0 to 3"):
        require_known_rows(batch_of(histories, [(0, 0, target)]), 4)
    require_known_rows(batch_of([[0, 3]], [(0, 0, 3)]), 4)
    require_known_rows(batch_of([[]]), 4)


def test_a_model_says_what_is_wrong_with_a_batch_before_it_trains_on_it():
    model = build("rpg")
    assert model.diagnose(batch_of([[1], [1, 2]], [(1, 2, 1)])) is None
    assert "target 0 has target_row=1, target_position=3" in model.diagnose(batch_of([[1], [1, 2]], [(1, 3, 1)]))
