# SPDX-License-Identifier: Apache-2.0
import json
import math
import time
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from recsys.core.errors import DataError
from recsys.retrieval.tokenizers import LevelHealth, health


def test_by_hand() -> None:
    codes = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 1, 1], [2, 0, 0], [2, 0, 0], [2, 0, 0], [3, 1, 1]])
    report = health(codes, (4, 2, 3))
    assert (report.items, report.distinct, report.collisions, report.largest) == (8, 5, 2, 3)
    assert report.colliding == 5 / 8
    first, second, third = report.levels
    assert (first.level, first.size, first.used, first.prefixes) == (0, 4, 3 / 4, 3)
    assert first.entropy == pytest.approx(1 / 2 + 3 / 8 * math.log2(8 / 3) + 3 / 8)
    assert first.prefix_entropy == first.entropy and first.perplexity == pytest.approx(2**first.entropy)
    assert (second.used, third.used) == (1, 2 / 3)
    assert (second.prefixes, third.prefixes) == (4, 5)
    assert second.prefix_entropy == pytest.approx(1 / 2 + 1 / 2 + 3 / 8 * math.log2(8 / 3) + 3 / 8)
    assert third.entropy == pytest.approx(1)


def test_even_codes_have_the_entropy_of_their_number() -> None:
    report = health(torch.cartesian_prod(torch.arange(4), torch.arange(8)), (4, 8))
    assert [(level.entropy, level.perplexity, level.prefix_entropy) for level in report.levels] == [(2, 4, 2), (3, 8, 5)]
    assert (report.distinct, report.colliding, report.collisions, report.largest) == (32, 0, 0, 1)


def test_collapsed_codes_have_none() -> None:
    report = health(torch.zeros(9, 2, dtype=torch.int64), (4, 8))
    assert report.levels[1] == LevelHealth(1, 8, 1 / 8, 0.0, 1.0, 1, 0.0)
    assert math.copysign(1, report.levels[0].entropy) == 1
    assert (report.distinct, report.colliding, report.collisions, report.largest) == (1, 1, 1, 9)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_against_brute_force(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    items = data.draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in sizes)), min_size=1, max_size=40))
    report = health(torch.tensor(items), sizes)
    groups = Counter(items)
    assert report.items == len(items) and report.distinct == len(groups)
    assert report.colliding == pytest.approx(sum(groups[item] > 1 for item in items) / len(items))
    assert report.collisions == sum(count > 1 for count in groups.values())
    assert report.largest == max(groups.values())
    for number, level in enumerate(report.levels):
        counts = Counter(item[number] for item in items)
        prefixes = Counter(item[: number + 1] for item in items)
        assert (level.level, level.size) == (number, sizes[number])
        assert level.used == pytest.approx(len(counts) / sizes[number])
        assert level.entropy == pytest.approx(entropy(list(counts.values()), base=2), abs=1e-12)
        assert level.perplexity == pytest.approx(2**level.entropy)
        assert level.prefixes == len(prefixes)
        assert level.prefix_entropy == pytest.approx(entropy(list(prefixes.values()), base=2), abs=1e-12)


def test_the_report_is_a_table_and_json() -> None:
    report = health(torch.tensor([[0, 1], [1, 1], [1, 1]]), (2, 3))
    assert [list(row) for row in report.rows()] == [list(LevelHealth.__dataclass_fields__)] * 2
    assert report.summary() == {"items": 3, "distinct": 2, "colliding": 2 / 3, "collisions": 1, "largest": 2}
    assert json.loads(json.dumps(asdict(report))) == {**report.summary(), "levels": report.rows()}


def test_sizes_whose_product_is_no_int64() -> None:
    size = 1 << 62
    codes = torch.tensor([[0, size - 1, size - 1], [size - 1, 0, size - 1], [0, size - 1, 0], [7, 1, 0], [8, 1, 0], [9, 1, 0]])
    assert [level.prefixes for level in health(codes, (size,) * 3).levels] == [5, 5, 6]


def test_malformed_codes_are_an_error() -> None:
    with pytest.raises(DataError, match="at least one item"):
        health(torch.zeros(0, 2, dtype=torch.int64), (4, 8))
    with pytest.raises(DataError, match="at least one item and one level"):
        health(torch.zeros(3, 0, dtype=torch.int64), ())
    with pytest.raises(DataError, match=r"level 1 .*, got 8"):
        health(torch.tensor([[0, 8]]), (4, 8))
    with pytest.raises(DataError, match=r"int64 \[N, 2\]"):
        health(torch.tensor([[0, 1, 2]]), (4, 8))


def test_a_million_items_take_seconds() -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1_000_000, 4)))
    begin = time.perf_counter()
    report = health(codes, (256,) * 4)
    assert time.perf_counter() - begin < 20  # of about 1 on an idle core
    assert report.levels[3].prefixes == report.distinct
