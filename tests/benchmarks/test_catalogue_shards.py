# SPDX-License-Identifier: Apache-2.0
"""The constants of a catalogue in parts: every kind is measured, what is merged are lists, and the plan follows from the figures."""

import numpy as np
import pytest

from benchmarks.catalogue_shards import indexes, liveness, merges, plan
from benchmarks.catalogue_shards.timing import in_a_process
from recsys.retrieval.catalogue.shards import merge


@pytest.mark.parametrize("kind", indexes.KINDS)
def test_every_kind_of_index_is_measured(kind: str) -> None:
    row = indexes.measured(kind, 2000)
    assert (row["index"], row["items"]) == (kind, 2000)
    assert all(value > 0 for name, value in row.items() if "core-" in name)
    assert indexes.QUICK.keys() == indexes.FULL.keys() == indexes.KINDS.keys()


def test_the_bytes_of_a_flat_index_are_those_of_its_vectors() -> None:
    (row,) = [in_a_process("indexes", "dense", 200_000)]
    assert row["bytes/item"] == pytest.approx(4 * indexes.DIM, rel=0.25)


def test_lists_that_are_merged_are_sorted_and_their_best_is_the_first() -> None:
    lists = merges.drawn(4, 3)
    assert all((np.diff(scores) <= 0).all() for _, scores in lists)
    rows, scores = merge(lists, [part * 10**6 for part in range(4)], merges.K)
    np.testing.assert_array_equal(scores[:, 0], np.max([scores[:, 0] for _, scores in lists], axis=0))
    assert rows.max() < 4 * 10**6


def test_a_catalogue_is_measured_and_its_bits_take_a_byte_and_an_eighth() -> None:
    row = liveness.measured(8000)
    assert row["bytes/item, bits alone"] == 1.125 and row["one bit, core-ms"] > 0


def test_the_plan_is_in_proportion_where_costs_are_and_silent_elsewhere() -> None:
    index = {"items": 10**6, "bytes/item": 256.0, "build, core-s": 6.0, "64 users, core-ms/user": 0.5}
    merged = [{"parts": 10, "64 users, core-ms": 3.0}, {"parts": 16, "64 users, core-ms": 2.0}]
    catalogue = [{"items": 10**6, "bytes/item": 200.0, "one bit, core-ms": 1.0}]
    (dense, beam) = plan.rows([{"index": "dense"} | index, {"index": "beam"} | index], merged, catalogue)
    assert dense["parts"] == 16 and dense["index, GB a part"] == 1.6 and dense["catalogue, GB a part"] == 1.25
    assert dense["search of 64 users, ms"] == 6.25 * 64 * 0.5 and dense["build, min a part"] == 0.625
    assert dense["merge of 64 users, ms"] == 2.0 and dense["one bit, ms"] == 6.25
    assert beam["index, GB a part"] == 1.6 and beam["search of 64 users, ms"] is None and beam["build, min a part"] is None
