# SPDX-License-Identifier: Apache-2.0
"""One-hot rows against a loop, and as the input of scikit-learn's logistic regression."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression

from recsys.core.config import parse
from recsys.core.errors import DataError
from recsys.data.encode import Encoder
from recsys.data.onehot import one_hot

FEATURES = [
    {"kind": "categorical", "feature": "city"},
    {"kind": "bag", "feature": "tags"},
    {"kind": "sequence", "name": "history", "items": "items", "target": "item_id", "max_length": 4},
    {"kind": "dense", "feature": "x", "standardize": False},
]
TABLE = pa.table(
    {
        "city": ["a", "b", None, "a"],
        "tags": [["t", "u", "t"], [], None, ["u"]],
        "items": [["1", "2", "1", "9"], ["2"], [], None],
        "item_id": ["2", "1", "2", "9"],
        "x": [0.5, None, 2.0, -1.0],
    }
)


@pytest.mark.parametrize("sequences", [False, True])
def test_equals_a_loop(sequences: bool) -> None:
    encoder = Encoder.fit(parse(Encoder.Config, {"features": FEATURES}, source="test"), TABLE)
    batch, spec = encoder.transform(TABLE), encoder.spec
    before = batch.sparse.values().clone(), batch.sequences.values().clone()
    matrix = one_hot(batch, spec, sequences=sequences).toarray()
    assert (batch.sparse.values() == before[0]).all() and (batch.sequences.values() == before[1]).all()
    rows = {key: t.rows for t in spec.tables for key in (*t.bags, *t.sequences)}
    jagged = {k: v.to_dense() for k, v in (batch.sparse.to_dict() | batch.sequences.to_dict()).items()}
    expected = []
    for b in range(4):
        row: list[float] = []
        for key in ("city", "tags", "item_id", *(("items",) if sequences else ())):
            block = np.zeros(rows[key])
            values = jagged[key][b].tolist()
            for value in values:
                block[value] = block[value] + 1 / len(values) if key == "items" else 1
            row += block.tolist()
        expected.append([*row, *batch.dense[b].tolist()])
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_logistic_regression_learns_from_it() -> None:
    rng = np.random.default_rng(0)
    city = rng.choice(["a", "b", "c"], 400)
    table = pa.table({"city": city, "tags": [["t"]] * 400, "items": [[]] * 400, "item_id": ["1"] * 400, "x": rng.normal(size=400)})
    table = table.set_column(2, "items", pa.array([[]] * 400, pa.list_(pa.string())))
    encoder = Encoder.fit(parse(Encoder.Config, {"features": FEATURES}, source="test"), table)
    model = LogisticRegression().fit(one_hot(encoder.transform(table), encoder.spec), city == "a")
    assert model.score(one_hot(encoder.transform(table), encoder.spec), city == "a") == 1.0


def test_raw_ids_are_spread_over_the_rows_of_their_table() -> None:
    raw = [{"kind": "categorical", "feature": "city", "ids": "raw", "rows": 7}]
    encoder = Encoder.fit(parse(Encoder.Config, {"features": raw}, source="test"), TABLE)
    batch = encoder.transform(TABLE)
    matrix = one_hot(batch, encoder.spec).toarray()
    ids = batch.sparse["city"].values().tolist()
    assert matrix.shape == (4, 7) and matrix.argmax(1).tolist() == [2 + i % 5 if i else 0 for i in ids]
    assert matrix[2, 0] == 1 and (matrix[0] == matrix[3]).all()


def test_a_row_beyond_its_table_is_an_error_that_names_the_field() -> None:
    encoder = Encoder.fit(parse(Encoder.Config, {"features": FEATURES[:1]}, source="test"), TABLE)
    small = encoder.spec.model_copy(update={"tables": (encoder.spec.tables[0].model_copy(update={"rows": 3}),)})
    with pytest.raises(DataError, match="field 'city': expected rows of table 'city', 0 to 2, got 0 to 3"):
        one_hot(encoder.transform(TABLE), small)
