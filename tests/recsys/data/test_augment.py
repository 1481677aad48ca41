# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from datetime import UTC, datetime
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest

from recsys.core.errors import DataError
from recsys.data.augment import Augmentation, offsets, retell, shown
from recsys.data.sequences import SequenceData
from recsys.data.windows import SequenceLoader

ALL = Augmentation(reverse=0.5, jitter=1.0, hide=0.2)


def data(lengths: list[int], step: int = 1) -> SequenceData:
    """Users whose events are numbered through; ``step`` events of a user share a second."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.concatenate([np.arange(n) for n in lengths])
    events = int(offsets[-1])
    return SequenceData(pa.array([f"u{u}" for u in range(len(lengths))]), offsets, np.arange(events), place // step, np.arange(events))


def told(loader: SequenceLoader, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
    """(target, what its state has seen) of an epoch."""
    loader.set_epoch(epoch)
    found = []
    for batch in loader:
        items, offsets = batch.items.tolist(), batch.offsets.tolist()
        for target, row, position in zip(batch.targets.tolist(), batch.target_row.tolist(), batch.target_position.tolist(), strict=True):
            assert 0 <= position <= offsets[row + 1] - offsets[row]
            found.append((target, tuple(items[offsets[row] : offsets[row] + position])))
    return found


def test_users_keep_their_events_in_another_order() -> None:
    original = data([7, 0, 30, 1])
    orders = [retell(original, ALL, seed=3, epoch=e).items for e in range(4)]
    for items in orders:
        for begin, end in zip(original.offsets[:-1], original.offsets[1:], strict=True):
            assert sorted(items[begin:end]) == list(range(begin, end))
    assert len({tuple(items) for items in orders}) == 4
    assert (retell(original, ALL, 3, 1).items == orders[1]).all()


def test_reversal_alone_reads_whole_users_backwards() -> None:
    items = retell(data([5] * 400), Augmentation(reverse=0.25), seed=0, epoch=0).items.reshape(400, 5)
    backwards = items[:, 0] > items[:, -1]
    assert ((np.diff(items, axis=1) == 1).all(1) | (np.diff(items, axis=1) == -1).all(1)).all()
    assert 0.15 < backwards.mean() < 0.35


def test_jitter_moves_events_about_as_far_as_it_says() -> None:
    items = retell(data([1000]), Augmentation(jitter=2.0), seed=0, epoch=0).items
    moved = np.abs(items - np.arange(1000))
    assert 0 < moved.mean() < 4 and moved.max() < 20


def test_without_jitter_only_events_of_one_step_change_places() -> None:
    items = retell(data([400], step=4), Augmentation(), seed=0, epoch=0).items
    assert (items // 4 == np.arange(400) // 4).all()
    assert (items != np.arange(400)).any()


def test_every_event_is_a_target_once_and_predicts_the_next() -> None:
    loader = SequenceLoader(data([3, 25, 8], step=3), 10, 2, seed=1, config=SequenceLoader.Config(augmentation=Augmentation(reverse=0.5)))
    for epoch in range(3):
        found = told(loader, epoch)
        assert Counter(target for target, _ in found) == Counter(range(36))
        assert {len(seen) for _, seen in found} <= set(range(11))


def test_windows_begin_elsewhere_in_every_epoch_and_contexts_are_never_shorter_than_they_must() -> None:
    """One user, stride = length: the context of event i is i where no window ends before it, else what is left since the last beginning."""
    config = SequenceLoader.Config(stride=10, augmentation=Augmentation())
    loader = SequenceLoader(data([45]), 10, 4, seed=1, config=config)
    contexts = []
    for epoch in range(30):
        seen = dict(told(loader, epoch))
        late = int(offsets(loader.data, 10, seed=1, epoch=epoch)[0])
        first = 10 - late
        expected = [i if i <= first else (i - first - 1) % 10 + 1 for i in range(45)]
        assert [len(seen[i]) for i in range(45)] == expected
        assert all(seen[i] == tuple(range(i - n, i)) for i, n in enumerate(expected))
        contexts.append(tuple(expected))
    assert len(set(contexts)) > 5


def test_hidden_events_are_missing_from_their_epoch() -> None:
    plain = SequenceLoader(data([40] * 50), 10, 4, seed=1, config=SequenceLoader.Config(augmentation=Augmentation()))
    hiding = SequenceLoader(data([40] * 50), 10, 4, seed=1, config=SequenceLoader.Config(augmentation=Augmentation(hide=0.3)))
    whole, left = dict(told(plain, 2)), dict(told(hiding, 2))
    kept = shown(2000, Augmentation(hide=0.3), seed=1, epoch=2)
    assert 0.65 < kept.mean() < 0.75
    assert left.keys() == set(np.flatnonzero(kept).tolist())
    assert all(seen == tuple(i for i in whole[target] if kept[i]) for target, seen in left.items())


def test_a_restored_cursor_goes_on_in_the_order_of_its_epoch() -> None:
    config = SequenceLoader.Config(stride=4, augmentation=ALL)
    loader = SequenceLoader(data([3, 25, 8, 40]), 10, 2, seed=1, config=config)
    loader.set_epoch(3)
    whole = [batch.targets.tolist() for batch in loader]
    list(islice(loader, 2))
    other = SequenceLoader(data([3, 25, 8, 40]), 10, 2, seed=1, config=config)
    other.load_state_dict(loader.state_dict())
    assert [batch.targets.tolist() for batch in other] == whole[2:]


def test_windows_are_as_many_in_every_epoch_and_a_larger_stride_makes_fewer() -> None:
    def count(stride: int | None) -> int:
        loader = SequenceLoader(data([3, 100]), 10, 2, seed=1, config=SequenceLoader.Config(stride=stride, augmentation=ALL))
        lengths = {sum(len(batch) for batch in [*loader]) for epoch in range(3) if loader.set_epoch(epoch) is None}
        assert lengths == {loader.windows}
        return loader.windows

    # A user of n events has ceil((n - 1 - L + h - 1) / h) windows after the first: 18 + 1 and 9 + 1, and the other user one.
    assert count(None) == count(5) == 1 + 20
    assert count(10) == 1 + 11


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(DataError, match="stride: expected at most max_length=10, got 11"):
        SequenceLoader(data([3]), 10, 2, seed=1, config=SequenceLoader.Config(stride=11))
    with pytest.raises(DataError, match="expected no first_target_time"):
        SequenceLoader(data([3]), 10, 2, 1, datetime(2026, 1, 1, tzinfo=UTC), SequenceLoader.Config(augmentation=ALL))
