# SPDX-License-Identifier: Apache-2.0
"""Users and items encoded apart, and put together by rows, are the join encoded."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.core.errors import DataError, SchemaError
from recsys.core.status import status_column
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.inference.frame import join
from tests.recsys.data.test_encode import CONFIG, SCHEMA, WORDS, config, random_rows

HISTORY = ("history_items", "history_rating", "history_age", "history_genre")
UNITS = [
    ("city",),
    ("genres",),
    ("genre",),
    ("age",),
    ("price",),
    ("raw",),
    HISTORY,
    ("item_id",),
    ("view_items",),
    ("hashed",),
    ("managed",),
]
MORE = [
    {"kind": "categorical", "feature": "hashed", "ids": "hashed", "rows": 40},
    {"kind": "bag", "feature": "managed", "ids": "raw", "rows": 60},
]
COLUMNS = pa.schema([*SCHEMA, pa.field("hashed", pa.string()), pa.field("managed", pa.list_(pa.string()))])


def some(rng: np.random.Generator, count: int) -> pa.Table:
    """Random features, with nulls, values that no vocabulary holds, statuses and empty histories; and labels."""
    rows = random_rows(rng, count)
    for row in rows:
        row["hashed"] = [*WORDS, None][rng.integers(len(WORDS) + 1)]
        row["managed"] = None if rng.random() < 0.2 else [WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(0, 3))]
    return pa.Table.from_pylist(rows, schema=COLUMNS)


def fitted(rng: np.random.Generator) -> Encoder:
    return Encoder.fit(config(features=[*CONFIG["features"], *MORE]), some(rng, 60))


def of_units(table: pa.Table, units: list[tuple[str, ...]]) -> pa.Table:
    """The columns of some features, with their statuses."""
    names = [name for unit in units for column in unit for name in (column, status_column(column))]
    return table.select([name for name in names if name in table.column_names])


def assert_same(one: RankingBatch, two: RankingBatch) -> None:
    for got, expected in ((one.sparse, two.sparse), (one.sequences, two.sequences)):
        assert got.keys() == expected.keys()
        assert torch.equal(got.values(), expected.values()) and torch.equal(got.lengths(), expected.lengths())
        assert got.values().dtype == expected.values().dtype and got.lengths().dtype == expected.lengths().dtype
    assert torch.equal(one.dense, two.dense) and one.dense.dtype == two.dense.dtype
    assert one.labels is None and two.labels is None


@pytest.mark.parametrize("seed", range(12))
def test_put_together_it_is_the_join_to_the_bit_whichever_side_a_feature_is_of(seed: int) -> None:
    rng = np.random.default_rng(seed)
    encoder = fitted(rng)
    side = rng.integers(0, 2, len(UNITS))
    users, items = (
        of_units(some(rng, count), [u for u, s in zip(UNITS, side, strict=True) if s == own]) for own, count in ((0, 6), (1, 9))
    )
    user_of_row, item_of_row = rng.integers(0, 6, 25), rng.integers(0, 9, 25)
    expected = encoder.transform(join(users, user_of_row, items.take(pa.array(item_of_row))))
    assert_same(encoder.tiled(users, user_of_row, items, item_of_row).rows().batch(), expected)
    assert_same(encoder.tiled(users, user_of_row, items.take(pa.array(item_of_row))).rows().batch(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_a_tiled_batch_has_each_user_once_and_every_candidate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    encoder = fitted(rng)
    table = some(rng, 30)
    users, items = (
        of_units(table.slice(0, 6), [UNITS[0], UNITS[3], UNITS[5], HISTORY, UNITS[8]]),
        of_units(table, [*UNITS[1:3], UNITS[4], UNITS[7], *UNITS[9:]]),
    )
    user_of_row = np.sort(rng.choice([0, 2, 3, 5], 30))  # users 1 and 4 have no candidate
    whole, tiled = encoder.transform(join(users, user_of_row, items)), encoder.tiled(users, user_of_row, items).batch()
    assert tiled.once == {"city", "age", *HISTORY, "view_items"} and tiled.users == len(np.unique(user_of_row)) and len(tiled) == 30
    assert torch.equal(tiled.batch.dense, whole.dense)
    for got, expected in (
        (tiled.batch.sparse.to_dict(), whole.sparse.to_dict()),
        (tiled.batch.sequences.to_dict(), whole.sequences.to_dict()),
    ):
        for key, jagged in expected.items():
            lists, own = [x.tolist() for x in jagged.to_dense()], [x.tolist() for x in got[key].to_dense()]
            if key in tiled.once:
                assert [own[user] for user in tiled.user_of_row.tolist()] == lists
                assert own[tiled.users :] == [[]] * (30 - tiled.users)
            else:
                assert own == lists


def test_a_column_of_both_sides_or_of_none_is_named() -> None:
    rng = np.random.default_rng(0)
    encoder = fitted(rng)
    table = some(rng, 5)
    row = np.arange(5)
    with pytest.raises(SchemaError, match="column 'city': expected once, but the table of users and the table of items have it"):
        encoder.tiled(of_units(table, UNITS), row, of_units(table, [("city",)]))
    with pytest.raises(SchemaError, match="missing column: unknown column 'price'"):
        encoder.tiled(of_units(table, [u for u in UNITS if u != ("price",)]), row, of_units(table, []).append_column("x", pa.array(row)))
    with pytest.raises(SchemaError, match="'history_items' and 'history_age': aligned lists, expected in one table"):
        without = of_units(table, UNITS).drop_columns(["history_age", "history_age__status"])
        encoder.tiled(without, row, of_units(table, [("history_age",)]))


def test_no_candidate_is_an_error() -> None:
    rng = np.random.default_rng(0)
    table: Any = some(rng, 5)
    with pytest.raises(DataError, match="expected at least one row"):
        fitted(rng).tiled(of_units(table, UNITS[:5]), np.empty(0, np.int64), of_units(table, UNITS[5:]).slice(0, 0))
