# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import CheckpointError, DataError
from recsys.core.schema import TIME
from recsys.data.augment import Augmentation
from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged
from recsys.data.loader import Loader
from recsys.data.sequences import SequenceData, evaluation_steps, histories
from recsys.data.splits import TimeSplit, evaluation_segments, order_events
from recsys.data.windows import SequenceLoader

START = datetime(2026, 1, 1, tzinfo=UTC)
N = 500


def rows_of(ids: pa.ChunkedArray) -> np.ndarray:
    return np.array([int(i[1:]) if i[0] == "i" else -1 for i in ids.to_pylist()], np.int64)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def table(events: list[tuple[str, str, float]]) -> pa.Table:
    """Events (user, item, seconds), already in order, with the steps that `order_events` would give."""
    steps, last = [], {}
    for user, _, second in events:
        number, previous = last.get(user, (-1, None))
        number += previous != int(second)
        last[user] = (number, int(second))
        steps.append(number)
    users, items, seconds = zip(*events, strict=True) if events else ((), (), ())
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "event_time": pa.array([at(s) for s in seconds], TIME),
            "step": pa.array(steps, pa.int64()),
        }
    )


def random_events(seed: int, users: int, longest: int, burst: float) -> list[tuple[str, str, float]]:
    """Users of up to ``longest`` events; an event shares its predecessor's second with probability ``burst``."""
    rng = np.random.default_rng(seed)
    events = []
    for u in range(users):
        length = int(rng.integers(1, longest + 1))
        seconds = np.cumsum(rng.random(length) >= burst) + rng.integers(0, 20)
        events += [(f"u{u}", f"i{rng.integers(N)}", float(s)) for s in seconds]
    return events


def brute_histories(events: list[tuple[str, str, float]]) -> list[list[int]]:
    """For each event, the rows of its user's events in earlier seconds, in order: by looking at all pairs."""
    return [[int(i[1:]) for u, i, s in events if u == user and int(s) < int(second)] for user, _, second in events]


def rows(batch: SequenceBatch) -> list[list[int]]:
    return [part.tolist() for part in torch.tensor_split(batch.items, batch.offsets[1:-1])]


def epoch_targets(loader: SequenceLoader) -> list[tuple[int, tuple[int, ...], int]]:
    """(target, the history that its state has seen, the longest that the window could give) of one epoch."""
    found = []
    for batch in loader:
        lists = rows(batch)
        for target, row, position in zip(batch.targets.tolist(), batch.target_row.tolist(), batch.target_position.tolist(), strict=True):
            assert 0 <= position <= len(lists[row])
            found.append((target, tuple(lists[row][:position]), len(lists[row])))
    return found


cases = st.tuples(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1, 5, 40]), st.sampled_from([0.0, 0.3, 0.9]))


@given(cases, st.integers(1, 9), st.sampled_from([1, 3, 50]))
@settings(max_examples=80, deadline=None)
def test_every_event_is_a_target_once_from_the_steps_before_it(case: tuple, max_length: int, batch_size: int) -> None:
    events = random_events(*case)
    known = brute_histories(events)
    loader = SequenceLoader(SequenceData.from_events(table(events), rows_of), max_length, batch_size, seed=1)
    got = epoch_targets(loader)

    # Exactly once: as many of each (target, suffix-of-known-history) as there are events.
    by_target = Counter(int(item[1:]) for _, item, _ in events)
    assert Counter(target for target, _, _ in got) == by_target
    wanted = Counter()
    for (_, item, _), before in zip(events, known, strict=True):
        if len(before) <= max_length:
            context = len(before)
        else:
            stride = max(1, max_length // 2)
            context = len(before) - -(-(len(before) - max_length) // stride) * stride
            assert max_length / 2 < context <= max_length
        wanted[int(item[1:]), tuple(before[len(before) - context :])] += 1
    assert Counter((target, seen) for target, seen, _ in got) == wanted
    assert all(length <= max_length for _, _, length in got)


def test_no_window_is_longer_than_its_targets_need_and_none_is_without_targets() -> None:
    events = random_events(3, 5, 60, 0.5)
    for batch in SequenceLoader(SequenceData.from_events(table(events), rows_of), 8, 4, seed=0):
        needed = torch.full((len(batch),), -1).scatter_reduce(0, batch.target_row, batch.target_position, "amax")
        assert needed.equal(batch.lengths)


def test_a_long_user_by_hand() -> None:
    """Ten events in ten seconds, at most four in a window, stride two."""
    events = [("u", f"i{s}", float(s)) for s in range(10)]
    loader = SequenceLoader(SequenceData.from_events(table(events), rows_of), 4, 1, seed=0)
    windows = {tuple(rows(b)[0]): list(zip(b.targets.tolist(), b.target_position.tolist(), strict=True)) for b in loader}
    assert windows == {
        (0, 1, 2, 3): [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)],
        (2, 3, 4, 5): [(5, 3), (6, 4)],
        (4, 5, 6, 7): [(7, 3), (8, 4)],
        (6, 7, 8): [(9, 3)],
    }


def test_a_step_longer_than_a_window_is_predicted_as_one() -> None:
    events = [("u", "i0", 0.0), *[("u", f"i{i}", 1.0) for i in range(1, 8)], ("u", "i8", 2.0)]
    loader = SequenceLoader(SequenceData.from_events(table(events), rows_of), 3, 8, seed=0)
    got = {target: seen for target, seen, _ in epoch_targets(loader)}
    assert got[0] == ()
    assert all(got[i] == (0,) for i in range(1, 8))
    assert got[8] == (5, 6, 7)


def test_events_before_the_first_target_time_are_history_only() -> None:
    events = random_events(5, 6, 40, 0.4)
    known = brute_histories(events)
    loader = SequenceLoader(SequenceData.from_events(table(events), rows_of), 100, 4, 0, first_target_time=at(15))
    wanted = Counter((int(i[1:]), tuple(h)) for (_, i, s), h in zip(events, known, strict=True) if s >= 15)
    assert wanted
    assert Counter((target, seen) for target, seen, _ in epoch_targets(loader)) == wanted
    nothing = SequenceLoader(loader.data, 100, 4, 0, first_target_time=at(1000))
    assert list(nothing) == [] and len(nothing) == 0


def test_order_is_a_function_of_seed_and_epoch() -> None:
    data = SequenceData.from_events(table(random_events(6, 40, 10, 0.2)), rows_of)

    def epoch(seed: int, number: int) -> list[tuple]:
        loader = SequenceLoader(data, 4, 3, seed)
        loader.set_epoch(number)
        return epoch_targets(loader)

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1) != epoch(2, 1)
    assert Counter(epoch(1, 0)) == Counter(epoch(1, 1)) == Counter(epoch(2, 7))


@pytest.mark.parametrize("batch_size", [3, 7])
def test_a_restored_cursor_goes_on_exactly(batch_size: int) -> None:
    data = SequenceData.from_events(table(random_events(7, 30, 10, 0.2)), rows_of)
    first: Loader[SequenceBatch] = SequenceLoader(data, 4, 3, seed=5)
    first.set_epoch(2)
    whole = [w for batch in first for w in rows(batch)]
    assert len(first) == -(-len(whole) // 3)
    assert first.state_dict() == {"epoch": 2, "samples": len(whole)}

    taken = [w for batch in islice(first, 4) for w in rows(batch)]
    assert first.state_dict() == {"epoch": 2, "samples": 12}
    second = SequenceLoader(data, 4, batch_size, seed=5)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    second.set_epoch(2)  # as a training loop does at the start of every epoch
    taken += [w for batch in second for w in rows(batch)]
    assert taken == whole
    assert [w for batch in second for w in rows(batch)] == whole  # only the first iteration was a rest
    second.set_epoch(3)
    assert second.state_dict() == {"epoch": 3, "samples": 0}
    assert [w for batch in second for w in rows(batch)] != whole


def test_cursor_errors() -> None:
    loader = SequenceLoader(SequenceData.from_events(table(random_events(8, 3, 5, 0.2)), rows_of), 4, 3, seed=5)
    for state in ({}, {"epoch": -1, "samples": 0}, {"epoch": 0, "samples": loader.windows + 1}, {"epoch": "0", "samples": 0}):
        with pytest.raises(CheckpointError, match="cursor: expected epoch >= 0 and samples from 0 to"):
            loader.load_state_dict(state)


def test_data_are_flat_arrays() -> None:
    data = SequenceData.from_events(table([("b", "i3", 1.5), ("b", "i1", 1.0), ("b", "i2", 4.0), ("a", "i9", 0.0)]), rows_of)
    assert data.users.to_pylist() == ["b", "a"]
    assert data.offsets.tolist() == [0, 3, 4]
    assert data.items.tolist() == [3, 1, 2, 9]
    assert data.seen.tolist() == [0, 0, 2, 0]
    assert data.owner.tolist() == [0, 0, 0, 1]
    assert data.times.tolist() == [int(at(s).timestamp() * 1e6) for s in (1.5, 1, 4, 0)]
    assert all(a.dtype == np.int64 for a in (data.offsets, data.items, data.steps, data.times, data.seen, data.owner))


def test_before_keeps_users_without_events() -> None:
    events = random_events(9, 8, 20, 0.3)
    early = SequenceData.from_events(table(events), rows_of).before(at(12))
    kept = [e for e in events if e[2] < 12]
    assert early.items.tolist() == [int(i[1:]) for _, i, _ in kept]
    assert np.diff(early.offsets).tolist() == [sum(u == user for u, _, _ in kept) for user in early.users.to_pylist()]
    assert 0 in np.diff(early.offsets)
    known = brute_histories(kept)
    assert early.seen.tolist() == [len(h) for h in known]
    got = Counter((target, seen) for target, seen, _ in epoch_targets(SequenceLoader(early, 50, 3, 0)))
    assert got == Counter((int(i[1:]), tuple(h)) for (_, i, _), h in zip(kept, known, strict=True))


def test_no_events_at_all() -> None:
    data = SequenceData.from_events(table([]), rows_of)
    assert list(SequenceLoader(data, 4, 3, seed=5)) == []
    steps = evaluation_steps(data, at(0), at(9))
    assert len(steps) == 0 and list(histories(data, steps, 4, 3)) == []


def test_data_errors() -> None:
    good = table([("a", "i1", 1.0), ("a", "i2", 2.0), ("b", "i3", 1.0)])

    def load(changed: pa.Table) -> SequenceData:
        return SequenceData.from_events(changed, rows_of)

    with pytest.raises(DataError, match="missing column: unknown column 'step'"):
        load(good.drop_columns(["step"]))
    with pytest.raises(DataError, match="'item_id': expected no null, got 1"):
        load(good.set_column(1, "item_id", pa.array(["i1", None, "i2"])))
    with pytest.raises(DataError, match="2 items are not in the catalogue, such as 'x1'"):
        load(good.set_column(1, "item_id", pa.array(["x1", "x2", "i2"])))
    with pytest.raises(DataError, match="2 users have 3 runs"):
        load(good.take([0, 2, 1]))
    for seconds, steps in (([2, 1], [0, 1]), ([1, 2], [0, 0]), ([1, 1], [0, 1]), ([1, 2], [1, 0])):
        wrong = table([("a", "i1", seconds[0]), ("a", "i2", seconds[1])]).set_column(3, "step", pa.array(steps))
        with pytest.raises(DataError, match="those of user 'a' are not in the order"):
            load(wrong)
    with pytest.raises(DataError, match="max_length: expected at least 1, got 0"):
        SequenceLoader(load(good), 0, 1, 0)
    with pytest.raises(DataError, match="batch_size: expected at least 1, got 0"):
        SequenceLoader(load(good), 1, 0, 0)
    with pytest.raises(DataError, match="chunk: expected at least 1, got 0"):
        next(histories(load(good), evaluation_steps(load(good), at(0)), 4, 0))
    with pytest.raises(DataError, match="expected a time with a zone"):
        load(good).before(datetime(2026, 1, 1))


@given(cases, st.integers(1, 9), st.sampled_from([1, 4, 1000]))
@settings(max_examples=60, deadline=None)
def test_evaluation_steps_and_histories_against_brute_force(case: tuple, max_length: int, chunk: int) -> None:
    events = random_events(*case)
    known = brute_histories(events)
    data = SequenceData.from_events(table(events), rows_of)
    steps = evaluation_steps(data, at(8), at(30))

    wanted: dict[tuple[str, float], tuple[list[int], list[int]]] = {}
    for (user, item, second), before in zip(events, known, strict=True):
        if 8 <= second < 30:
            wanted.setdefault((user, second), ([], before))[0].append(int(item[1:]))
    targets = [part.tolist() for part in np.split(steps.targets.values, steps.targets.offsets[1:-1])] if len(steps) else []
    assert steps.user_id.to_pylist() == [user for user, _ in wanted]
    assert steps.request_time.to_pylist() == [at(second) - timedelta(microseconds=1) for _, second in wanted]
    assert targets == [t for t, _ in wanted.values()]

    recent, everything = [], []
    for batch, seen in histories(data, steps, max_length, chunk):
        assert len(batch) == len(seen.offsets) - 1 <= chunk
        assert batch.targets is None and batch.items.dtype == batch.offsets.dtype == torch.int64
        recent += rows(batch)
        everything += [part.tolist() for part in np.split(seen.values, seen.offsets[1:-1])]
    assert recent == [h[-max_length:] for _, h in wanted.values()]
    assert everything == [h for _, h in wanted.values()]


def test_a_second_is_one_step_also_where_times_are_finer_or_the_period_cuts_it() -> None:
    events = [("u", "i0", 3.0), ("u", "i1", 5.25), ("u", "i2", 5.75), ("u", "i3", 6.5)]
    data = SequenceData.from_events(table(events), rows_of)
    steps = evaluation_steps(data, at(5.5), at(7))
    assert steps.request_time.to_pylist() == [at(5) - timedelta(microseconds=1), at(6) - timedelta(microseconds=1)]
    assert steps.targets.values.tolist() == [2, 3] and steps.targets.offsets.tolist() == [0, 1, 2]
    ((batch, seen),) = histories(data, steps, 10, 10)
    assert rows(batch) == [[0], [0, 1, 2]]
    assert seen.values.tolist() == [0, 0, 1, 2]


def test_taken_steps_are_those_steps() -> None:
    data = SequenceData.from_events(table(random_events(12, 6, 20, 0.5)), rows_of)
    steps = evaluation_steps(data, at(5))
    places = np.array([7, 0, 3])
    taken = steps.take(places)
    assert len(taken) == 3
    for place, one in zip(places, range(3), strict=True):
        assert (taken.user_id[one], taken.request_time[one]) == (steps.user_id[int(place)], steps.request_time[int(place)])
        ours, theirs = (s.targets.values[s.targets.offsets[i] : s.targets.offsets[i + 1]] for s, i in ((taken, one), (steps, place)))
        assert ours.tolist() == theirs.tolist()
    ((batch, seen),), ((whole, everything),) = histories(data, taken, 4, 100), histories(data, steps, 4, 100)
    assert rows(batch) == [rows(whole)[place] for place in places]
    assert np.diff(seen.offsets).tolist() == np.diff(everything.offsets)[places].tolist()


def test_events_as_the_splits_order_them() -> None:
    """From raw interactions: all test events are targets, in the order of the split's own test part."""
    raw = table(random_events(11, 12, 30, 0.5))
    shuffled = raw.take(np.random.default_rng(0).permutation(raw.num_rows)).drop_columns(["step"])
    ordered = order_events(shuffled, seed=3)
    split = TimeSplit(at(10), at(15))
    data = SequenceData.from_events(ordered, rows_of)
    steps = evaluation_steps(data, split.test_start)
    test = split.parts(ordered)["test"]
    assert steps.targets.values.tolist() == rows_of(test["item_id"]).tolist()
    assert data.before(split.valid_start).items.tolist() == rows_of(split.parts(ordered)["train"]["item_id"]).tolist()
    established = evaluation_segments(ordered, split)["established"]
    seen = np.repeat(steps.event - steps.start, np.diff(steps.targets.offsets))
    assert ((seen >= 5) == established).all() and established.any() and not established.all()


def test_batches_of_windows_alike_have_as_many_events_and_little_padding() -> None:
    data = SequenceData.from_events(table(random_events(9, 200, 12, 0.0)), rows_of)
    plain, alike = (SequenceLoader(data, 12, 16, seed=5, config=SequenceLoader.Config(alike=on)) for on in (False, True))
    padding, targets = {}, {}
    for loader in (plain, alike):
        batches = list(loader)
        assert len(batches) == len(loader)
        padding[loader] = sum(int((own.lengths.max() - own.lengths).sum()) for own in batches)
        targets[loader] = np.array([len(own.targets) for own in batches])
    assert padding[alike] < padding[plain] / 5
    assert targets[alike].std() < 0.3 * targets[alike].mean() and targets[alike].max() <= 1.01 * 16 * targets[plain].sum() / plain.windows
    epochs = []
    for epoch in (0, 1):
        alike.set_epoch(epoch)
        epochs.append([[tuple(w) for w in rows(batch)] for batch in alike])
    assert epochs[0] != epochs[1]
    longest = [max(map(len, batch)) for batch in epochs[0]]
    assert longest != sorted(longest), "short and long batches come mixed"
    assert Counter(w for batch in epochs[0] for w in batch) == Counter(tuple(w) for batch in plain for w in rows(batch))


def test_a_cursor_among_windows_alike_goes_on_exactly_with_the_same_batch_size() -> None:
    data = SequenceData.from_events(table(random_events(9, 60, 12, 0.2)), rows_of)
    config = SequenceLoader.Config(alike=True)
    first, second = (SequenceLoader(data, 6, 8, seed=5, config=config) for _ in range(2))
    first.set_epoch(2)
    whole = [w for batch in first for w in rows(batch)]
    taken = [w for batch in islice(first, 2) for w in rows(batch)]
    second.load_state_dict(first.state_dict())
    assert taken + [w for batch in second for w in rows(batch)] == whole
    assert second.state_dict() == {"epoch": 2, "samples": len(whole)}
    other = SequenceLoader(data, 6, 3, seed=5, config=config)
    other.load_state_dict({"epoch": 2, "samples": 1})
    other._cuts = np.array([0, 2, other.windows])
    with pytest.raises(DataError, match="alike: expected to go on with the batch size"):
        list(other)


def test_windows_alike_need_lengths_that_stay() -> None:
    data = SequenceData.from_events(table(random_events(9, 5, 5, 0.0)), rows_of)
    with pytest.raises(DataError, match="alike: expected no augmentation"):
        SequenceLoader(data, 6, 8, seed=5, config=SequenceLoader.Config(alike=True, augmentation=Augmentation(hide=0.1)))
    empty = SequenceData.from_order(["a"], Jagged(np.zeros(0, np.int64), np.array([0, 0])))
    assert list(SequenceLoader(empty, 6, 8, seed=5, config=SequenceLoader.Config(alike=True))) == []


def test_sampled_steps_are_some_of_the_steps_in_their_order() -> None:
    data = SequenceData.from_events(table(random_events(9, 40, 8, 0.2)), rows_of)
    steps = evaluation_steps(data, at(0))
    some = steps.sample(7, 3)
    assert len(some) == 7 and (np.diff(some.event) > 0).all() and np.isin(some.event, steps.event).all()
    assert (steps.sample(7, 3).event == some.event).all() and (steps.sample(7, 4).event != some.event).any()
    assert steps.sample(len(steps), 3) is steps


def test_the_rows_that_have_events() -> None:
    data = SequenceData.from_order(["a", "b"], Jagged(np.array([4, 1, 1]), np.array([0, 2, 3])))
    assert np.flatnonzero(data.occurring(6)).tolist() == [1, 4]
