# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pyarrow as pa
import pytest

from recsys.core.errors import DataError
from recsys.data.domains import Domain, joined
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData


def ordered(histories: list[list[int]]) -> SequenceData:
    offsets = np.cumsum([0, *map(len, histories)])
    return SequenceData.from_order(
        [str(i) for i in range(len(histories))], Jagged(np.array([i for h in histories for i in h], np.int64), offsets)
    )


def test_histories_stay_and_rows_move_behind_those_of_the_domains_before() -> None:
    first, second = [[0, 2], [], [1]], [[3, 0, 0]]
    data = joined([Domain("a", ordered(first), 3), Domain("b", ordered(second), 4)])
    assert data.users.to_pylist() == ["a:0", "a:1", "a:2", "b:0"]
    found = [data.items[data.offsets[u] : data.offsets[u + 1]].tolist() for u in range(4)]
    assert found == [[0, 2], [], [1], [6, 3, 3]]
    assert data.times is None and data.seen.tolist() == [0, 1, 0, 0, 1, 2]


def test_times_and_steps_stay_where_all_have_them() -> None:
    def timed(steps: list[int], times: list[int]) -> SequenceData:
        return SequenceData(pa.array(["u"]), np.array([0, len(steps)]), np.zeros(len(steps), np.int64), np.array(steps), np.array(times))

    one, two = timed([7, 7, 9], [1, 1, 2]), timed([0, 1], [5, 6])
    data = joined([Domain("a", one, 1), Domain("b", two, 1)])
    assert data.known_times.tolist() == [1, 1, 2, 5, 6]
    assert data.seen.tolist() == [*one.seen.tolist(), *two.seen.tolist()] == [0, 0, 2, 0, 1]
    assert len(set(data.steps[:3]) & set(data.steps[3:])) == 0
    assert joined([Domain("a", one, 1), Domain("b", ordered([[0]]), 1)]).times is None


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([], "at least one"),
        ([Domain("a", ordered([[0]]), 1)] * 2, r"a name of its own for each, got \['a', 'a'\]"),
        ([Domain("a", ordered([[0, 3]]), 3)], "a: expected rows 0 to 2, got one of 3"),
    ],
)
def test_what_cannot_be_joined_is_refused(domains: list[Domain], message: str) -> None:
    with pytest.raises(DataError, match=message):
        joined(domains)
