# SPDX-License-Identifier: Apache-2.0
"""Histories as a source of sweeps: the splits, shares that hold each other, items that are never trained on, and errors."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core.errors import DataError, SchemaError
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData
from recsys.scaling.retrieval_data import only
from tests.recsys.scaling.small import ITEMS, USERS, source, write_histories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_histories(tmp_path)
    return tmp_path


def by_user(data: SequenceData) -> dict[str, list[int]]:
    """The items of each user who has some."""
    found = {user.as_py(): data.items[a:b].tolist() for user, a, b in zip(data.users, data.offsets[:-1], data.offsets[1:], strict=True)}
    return {user: items for user, items in found.items() if items}


def test_each_user_s_last_two_events_are_left_out(tmp_path: Path) -> None:
    walks = write_histories(tmp_path)
    split = source(tmp_path).split
    assert by_user(split.train) == {str(user): items[:-2] if len(items) > 2 else items for user, items in walks.items()}
    for steps, back in ((split.valid, 2), (split.test, 1)):
        wanted = {str(user): (items[-back], items[:-back]) for user, items in walks.items() if len(items) > 2}
        assert len(steps) == len(wanted)
        for number, user in enumerate(steps.user_id.to_pylist()):
            history = split.data.items[steps.start[number] : steps.event[number]].tolist()
            assert (steps.targets.values[number], history) == wanted[user]


def test_periods_split_by_global_time(tmp_path: Path) -> None:
    write_histories(tmp_path, "event_time")
    split = source(tmp_path, periods={"valid": 0.15, "test": 0.2}).split
    times = np.sort(split.data.known_times)
    train, valid, test = len(split.train.items), len(split.valid.targets.values), len(split.test.targets.values)
    assert train + valid + test == len(times)
    assert test == pytest.approx(0.2 * len(times), abs=1) and valid == pytest.approx(0.15 * len(times), abs=1)
    assert split.train.known_times.max() == times[train - 1]
    assert sorted(split.data.known_times[split.test.event]) == times[-test:].tolist()  # a second holds one event here


@pytest.mark.parametrize(("count", "amounts"), [("users", (5, 17, USERS)), ("events", (13, 60, 150))])
def test_a_larger_share_contains_the_smaller(folder: Path, count: str, amounts: tuple[int, ...]) -> None:
    data = source(folder, count=count, held_out=0.1)
    whole = by_user(data.split.train)
    for seed in (0, 1):
        drawn = [data.draw(rows, seed) for rows in amounts]
        for rows, part in zip(amounts, drawn, strict=True):
            assert (len(part.users) if count == "users" else len(part.items)) == rows
            for user, items in by_user(part).items():
                assert items == whole[user][: len(items)]
            cut = [user for user, items in by_user(part).items() if items != whole[user]]
            assert len(cut) <= (count == "events")
        for small, large in pairwise(drawn):
            more = by_user(large)
            assert all(items == more[user][: len(items)] for user, items in by_user(small).items())
    assert by_user(data.draw(amounts[0], 0)) != by_user(data.draw(amounts[0], 1))
    assert by_user(data.draw(amounts[0], 0)) == by_user(source(folder, count=count, held_out=0.1).draw(amounts[0], 0))


def test_the_whole_share_is_the_training_data(folder: Path) -> None:
    data = source(folder)
    assert by_user(data.draw(USERS, 3)) == by_user(data.split.train)
    with pytest.raises(DataError, match=f"rows: there are {USERS} training users, got {USERS + 1}"):
        data.draw(USERS + 1, 0)
    events = source(folder, count="events")
    total = len(events.split.train.items)
    assert by_user(events.draw(total, 0)) == by_user(events.split.train)
    with pytest.raises(DataError, match=f"rows: there are {total} training events, got {total + 1}"):
        events.draw(total + 1, 0)


def test_held_out_items_are_absent_from_training_and_there_in_the_test(folder: Path) -> None:
    data, plain = source(folder, held_out=0.3, seed=4), source(folder)
    assert data.held_out.sum() == int(0.3 * ITEMS)
    for rows, seed in ((10, 0), (USERS, 0), (USERS, 1)):
        assert not data.held_out[data.draw(rows, seed).items].any()
    kept = {user: [item for item in items if not data.held_out[item]] for user, items in by_user(plain.split.train).items()}
    assert by_user(data.split.train) == {user: items for user, items in kept.items() if items}
    assert not data.held_out[data.split.valid.targets.values].any()
    assert data.split.test.targets.values.tolist() == plain.split.test.targets.values.tolist()
    assert data.held_out[data.split.test.targets.values].any() and data.held_out[data.split.data.items].any()
    fewer, other = source(folder, held_out=0.1, seed=4), source(folder, held_out=0.3, seed=5)
    assert (data.held_out | fewer.held_out == data.held_out).all() and (data.held_out != other.held_out).any()


def test_steps_are_drawn(folder: Path) -> None:
    whole, data = source(folder).split, source(folder, valid=6, test=9).split
    assert (len(data.valid), len(data.test)) == (6, 9)
    assert set(data.test.event) < set(whole.test.event) and set(data.valid.event) < set(whole.valid.event)
    assert (source(folder, test=9).split.test.event == data.test.event).all()


def test_only_keeps_targets_and_drops_empty_steps(tmp_path: Path) -> None:
    write_histories(tmp_path, "event_time")
    steps = source(tmp_path, periods={}).split.test
    steps = steps.take(np.arange(6))
    object.__setattr__(steps, "targets", Jagged(np.arange(9), np.array([0, 1, 3, 3, 6, 7, 9])))
    kept = only(steps, np.array([0, 1, 1, 0, 1, 0, 0, 0, 1], bool))
    assert kept.event.tolist() == steps.event[[1, 3, 5]].tolist() and len(kept.user_id) == 3
    assert kept.targets.values.tolist() == [1, 2, 4, 8] and kept.targets.offsets.tolist() == [0, 2, 3, 4]


def test_the_fingerprint_says_what_decides_events_and_steps(folder: Path) -> None:
    before = source(folder).fingerprint
    same = source(folder, text=None, codes=None, collaborative=None, windows={"stride": 2})
    assert same.fingerprint == before
    for changed in ({"held_out": 0.1}, {"seed": 1}, {"valid": 5}, {"test": 5}, {"count": "events"}):
        assert source(folder, **changed).fingerprint != before
    table = pq.read_table(folder / "interactions.parquet")
    pq.write_table(table.slice(1), folder / "interactions.parquet")
    assert source(folder).fingerprint != before


def test_a_path_is_below_the_data_folder_unless_it_is_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_DATA", str(folder.parent))
    assert source(Path(folder.name)).fingerprint == source(folder).fingerprint
    monkeypatch.delenv("RECSYS_DATA")
    with pytest.raises(DataError, match="RECSYS_DATA"):
        source(Path(folder.name))


def test_files_that_do_not_fit_are_errors(folder: Path) -> None:
    file = folder / "interactions.parquet"
    table = pq.read_table(file)

    def wrong(changed: pa.Table, message: str, error: type[Exception], **settings: Any) -> None:
        pq.write_table(changed, file)
        with pytest.raises(error, match=message):
            _ = source(folder, **settings).split

    wrong(table, "periods: expected a column 'event_time', but only the order is known", SchemaError, periods={})
    wrong(table.rename_columns(["user_id", "item", "position"]), "missing column: unknown column 'item_id'", SchemaError)
    wrong(table.drop_columns(["position"]), "expected a column 'event_time' or 'position'; it has user_id, item_id", SchemaError)
    stranger = table.set_column(1, "item_id", pa.array([99] * table.num_rows))
    wrong(stranger, r"item '99' is not in items\.parquet", DataError)
    wrong(table.slice(0, 0), "valid: expected at least one step, got none", DataError)
    file.unlink()
    with pytest.raises(DataError, match=r"there is no interactions\.parquet"):
        source(folder)
