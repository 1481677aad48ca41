# SPDX-License-Identifier: Apache-2.0
"""The encoder against a slow loop over rows, and the contracts of its vocabulary, statuses, files and errors."""

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.core.config import parse
from recsys.core.errors import BundleError, ConfigError, DataError, SchemaError
from recsys.core.status import ValueStatus
from recsys.data.encode import Encoder
from recsys.data.spec import InputSpec

WORDS = ["a", "b", "é", "日本語の長い文字列がここにあります", "naïve café ☕ and more than twelve bytes", "", " ", "b\x00", "B", "10", "9"]
CONFIG: dict[str, Any] = {
    "features": [
        {"kind": "categorical", "feature": "city"},
        {"kind": "bag", "feature": "genres", "table": "genre", "min_count": 3},
        {"kind": "categorical", "feature": "genre", "min_count": 3},
        {"kind": "bucket", "feature": "age", "buckets": 4},
        {"kind": "dense", "feature": "price", "transform": "log1p"},
        {"kind": "dense", "feature": "raw", "standardize": False, "indicator": False},
        {
            "kind": "sequence",
            "name": "history",
            "items": "history_items",
            "target": "item_id",
            "max_length": 3,
            "extra": [
                {"feature": "history_rating", "values": [5, 1, 2.5]},
                {"feature": "history_age", "edges": [0, 7, 30]},
                {"feature": "history_genre"},
            ],
        },
        {"kind": "sequence", "name": "views", "items": "view_items", "target": "item_id", "max_length": 2},
    ],
    "tasks": [{"name": "like", "feature": "rating", "threshold": ">= 4"}, {"name": "stars", "feature": "rating"}],
}
NUMBERS = [1.0, 2.5, 5.0, -3.0, 0.0, 7.0, 30.0, 1e9, math.nan, math.inf]


def config(**changes: Any) -> Any:
    return parse(Encoder.Config, CONFIG | changes, source="test")


def random_rows(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Rows as plain values. A value whose status is not PRESENT is sometimes there all the same."""

    def pick(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    def words(length: int) -> list[str | None]:
        return [pick([*WORDS, None]) for _ in range(length)]

    rows = []
    for _ in range(count):
        length = int(rng.integers(0, 6))
        row: dict[str, Any] = {
            "city": pick([*WORDS, None]),
            "genres": pick([words(int(rng.integers(0, 4))), None]),
            "genre": pick([*WORDS, None]),
            "age": pick([*NUMBERS, None]),
            "price": pick([*NUMBERS[:-2], None]),
            "raw": pick([*NUMBERS, None]),
            "history_items": pick([words(length), words(length), None]),
            "history_rating": pick([[pick([*NUMBERS, None]) for _ in range(length)], None]),
            "history_age": [pick([*NUMBERS, None]) for _ in range(length)],
            "history_genre": words(length),
            "view_items": pick([words(int(rng.integers(0, 4))), None]),
            "item_id": pick([*WORDS, None]),
        }
        for name in list(row):
            if name != "item_id":
                row[f"{name}__status"] = int(pick([0, 0, 0, 1, 2, 3, 4]))
        rows.append(row | {"rating": float(rng.integers(1, 6))})
    return rows


SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("city", "genre", "item_id")]
    + [(n, pa.list_(pa.string())) for n in ("genres", "history_items", "history_genre", "view_items")]
    + [(n, pa.float64()) for n in ("age", "price", "raw", "rating")]
    + [(n, pa.list_(pa.float64())) for n in ("history_rating", "history_age")]
    + [
        (f"{n}__status", pa.uint8())
        for n in (
            "city",
            "genre",
            "genres",
            "history_items",
            "history_genre",
            "view_items",
            "age",
            "price",
            "raw",
            "history_rating",
            "history_age",
        )
    ]
)


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class SlowEncoder:
    """The definition, one row at a time, in plain Python."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        lookups: dict[str, list[str | None]] = {t: [] for t in ("city", "genre", "item_id", "history_genre")}
        for row in rows:
            lookups["city"].append(self.value(row, "city"))
            lookups["genre"] += [*(self.value(row, "genres") or []), self.value(row, "genre")]
            items = self.value(row, "history_items")
            lookups["item_id"] += [*(items or [])[-3:], *(self.value(row, "view_items") or [])[-2:], self.value(row, "item_id")]
            lookups["history_genre"] += (self.value(row, "history_genre") or [])[-3:] if items is not None else []
        self.vocabulary = {
            table: sorted((w for w, n in Counter(values).items() if w is not None and n >= (3 if table == "genre" else 1)))
            for table, values in lookups.items()
        }
        for table, values in lookups.items():
            counts = Counter(values)
            self.vocabulary[table].sort(key=lambda word, counts=counts: (-counts[word], word.encode()))
        ages = sorted(a for row in rows if (a := self.number(row, "age")) is not None)
        edges = {ages[math.ceil(q / 4 * (len(ages) - 1) - 1e-9)] for q in (1, 2, 3)}
        self.edges = sorted(e for e in edges if e > ages[0])
        prices = [self.log1p(p) for row in rows if (p := self.number(row, "price")) is not None]
        self.mean = sum(prices) / len(prices)
        self.deviation = math.sqrt(sum((p - self.mean) ** 2 for p in prices) / len(prices))

    @staticmethod
    def log1p(x: float) -> float:
        return math.copysign(math.log1p(abs(x)), x)

    @staticmethod
    def value(row: dict[str, Any], name: str) -> Any:
        return row[name] if row.get(f"{name}__status", ValueStatus.PRESENT) == ValueStatus.PRESENT else None

    def number(self, row: dict[str, Any], name: str) -> float | None:
        x = self.value(row, name)
        return x if x is not None and math.isfinite(x) else None

    def word(self, table: str, word: str | None) -> int:
        if word is None:
            return 0
        return self.vocabulary[table].index(word) + 2 if word in self.vocabulary[table] else 1

    def bucket(self, edges: list[float], x: float | None) -> int:
        return 2 + sum(x >= edge for edge in edges) if x is not None and math.isfinite(x) else 0

    def encode(self, row: dict[str, Any]) -> tuple[dict[str, list[int]], list[float]]:
        genres = self.value(row, "genres")
        items = self.value(row, "history_items")
        items = [] if items is None else items
        aligned = {}
        for name in ("history_rating", "history_age", "history_genre"):
            found = self.value(row, name)
            aligned[name] = [None] * len(items) if found is None else found
        ratings = [0 if r is None or not math.isfinite(r) else {5.0: 2, 1.0: 3, 2.5: 4}.get(r, 1) for r in aligned["history_rating"]]
        price, raw = self.number(row, "price"), self.number(row, "raw")
        jagged = {
            "city": [self.word("city", self.value(row, "city"))],
            "genres": [0] if genres is None else [self.word("genre", g) for g in genres],
            "genre": [self.word("genre", self.value(row, "genre"))],
            "age": [self.bucket(self.edges, self.value(row, "age"))],
            "item_id": [self.word("item_id", row["item_id"])],
            "history_items": [self.word("item_id", i) for i in items[-3:]],
            "view_items": [self.word("item_id", i) for i in (self.value(row, "view_items") or [])[-2:]],
            "history_rating": ratings[-3:] if items else [],
            "history_age": [self.bucket([0, 7, 30], a) for a in aligned["history_age"][-3:]] if items else [],
            "history_genre": [self.word("history_genre", g) for g in aligned["history_genre"][-3:]] if items else [],
        }
        scaled = 0.0 if price is None else (self.log1p(price) - self.mean) / self.deviation
        return jagged, [scaled, float(price is None), raw or 0.0]


def assert_equals_loop(batch: Any, slow: SlowEncoder, rows: list[dict[str, Any]]) -> None:
    expected = [slow.encode(row) for row in rows]
    jagged = batch.sparse.to_dict() | batch.sequences.to_dict()
    assert set(jagged) == set(expected[0][0])
    for key, tensor in jagged.items():
        assert [part.tolist() for part in tensor.to_dense()] == [e[0][key] for e in expected], key
    np.testing.assert_allclose(batch.dense.numpy(), [e[1] for e in expected], rtol=1e-6, atol=1e-6)
    assert batch.labels.tolist() == [[float(row["rating"] >= 4), row["rating"]] for row in rows]


@pytest.mark.parametrize("seed", range(8))
def test_equals_a_loop_over_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    train, later = random_rows(rng, 60), random_rows(rng, 25)
    later[0]["city"], later[0]["city__status"] = "nowhere", 0
    encoder, slow = Encoder.fit(config(), to_table(train)), SlowEncoder(train)
    for rows in (train, later, later[:1]):
        batch = encoder.transform(to_table(rows))
        assert_equals_loop(batch, slow, rows)
        assert batch.sparse.keys() == list(encoder.spec.bag_keys) and batch.sequences.keys() == list(encoder.spec.sequence_keys)
        for jagged in (batch.sparse, batch.sequences):
            assert jagged.values().dtype == torch.int64 and jagged.lengths().dtype == torch.int32 and jagged.stride() == len(rows)
        assert batch.dense.dtype == batch.labels.dtype == torch.float32


def test_chunks_slices_batches_and_wide_types_change_nothing() -> None:
    rng = np.random.default_rng(5)
    rows = random_rows(rng, 40)
    table = to_table(rows)
    encoder, slow = Encoder.fit(config(), table), SlowEncoder(rows)
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7, 0), table.slice(7)])
    assert Encoder.fit(config(), chunked).fingerprint() == encoder.fingerprint()
    assert_equals_loop(encoder.transform(chunked), slow, rows)
    assert_equals_loop(encoder.transform(table.slice(11, 13)), slow, rows[11:24])
    assert_equals_loop(encoder.transform(chunked.combine_chunks().to_batches()[0].slice(3)), slow, rows[3:])
    wide = {
        "city": pa.large_string(),
        "genre": pa.string_view(),
        "genres": pa.large_list(pa.large_string()),
        "history_items": pa.large_list(pa.string()),
    }
    casts = [field.with_type(wide.get(field.name, field.type)) for field in table.schema]
    assert_equals_loop(encoder.transform(table.cast(pa.schema(casts))), slow, rows)
    dictionary = table.set_column(0, "city", table["city"].dictionary_encode())
    assert_equals_loop(encoder.transform(dictionary), slow, rows)


def test_elements_under_a_null_list_do_not_count() -> None:
    """Arrow allows a null list to span elements."""
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 3, 3]), pa.array(["x", "y", "z"]), mask=pa.array([True, False, False]))
    only = parse(Encoder.Config, {"features": [{"kind": "bag", "feature": "tags"}]}, source="test")
    encoder = Encoder.fit(only, pa.table({"tags": lists}))
    assert encoder.spec.tables[0].rows == 3
    assert [t.tolist() for t in encoder.transform(pa.table({"tags": lists})).sparse["tags"].to_dense()] == [[0], [2], []]


def test_spec_names_every_input() -> None:
    encoder = Encoder.fit(config(), to_table(random_rows(np.random.default_rng(0), 60)))
    spec = encoder.spec
    assert isinstance(spec, InputSpec)
    assert [t.name for t in spec.tables] == ["city", "genre", "age", "item_id", "history_rating", "history_age", "history_genre"]
    assert spec.bag_keys == ("city", "genres", "genre", "age")
    assert spec.sequence_keys == ("history_items", "item_id", "view_items", "history_rating", "history_age", "history_genre")
    assert spec.sequences[0].keys == ("history_items", "history_rating", "history_age", "history_genre")
    assert spec.dense == ("price", "price__absent", "raw") and spec.tasks == ("like", "stars")
    rows = {t.name: t.rows for t in spec.tables}
    assert rows["history_rating"] == 2 + 3 and rows["history_age"] == 2 + 4 and rows["age"] <= 2 + 4
    assert encoder.label_columns == ("rating",)
    assert set(encoder.feature_columns) == {n for n in SCHEMA.names if not n.endswith("__status")} - {"rating"}


def test_rows_stay_below_the_table_size() -> None:
    rng = np.random.default_rng(3)
    encoder = Encoder.fit(config(), to_table(random_rows(rng, 30)))
    batch = encoder.transform(to_table(random_rows(rng, 300)))
    jagged = batch.sparse.to_dict() | batch.sequences.to_dict()
    for table in encoder.spec.tables:
        for key in (*table.bags, *table.sequences):
            assert int(jagged[key].values().max()) < table.rows and int(jagged[key].values().min()) >= 0


def test_order_is_by_count_then_by_value() -> None:
    only = parse(Encoder.Config, {"features": [{"kind": "categorical", "feature": "c"}]}, source="test")
    encoder = Encoder.fit(only, pa.table({"c": ["b", "z", "a", "z", "é", "b", "q", None]}))
    rows = encoder.transform(pa.table({"c": ["b", "z", "a", "q", "é", "new", None]})).sparse["c"].values()
    assert rows.tolist() == [2, 3, 4, 5, 6, 1, 0]


def test_an_indicator_column_and_status_make_a_zero() -> None:
    only = parse(Encoder.Config, {"features": [{"kind": "dense", "feature": "x"}]}, source="test")
    train = pa.table({"x": [1.0, 3.0, 100.0], "x__status": pa.array([0, 0, 3], pa.uint8())})
    batch = Encoder.fit(only, train).transform(train)
    assert batch.dense.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert batch.labels is None and batch.sparse.keys() == [] and batch.sequences.stride() == 3
    assert batch.to(torch.device("cpu")).dense.shape == (3, 2)


def test_a_null_status_is_not_present() -> None:
    only = parse(Encoder.Config, {"features": [{"kind": "categorical", "feature": "c"}]}, source="test")
    table = pa.table({"c": ["a", "a"], "c__status": pa.array([0, None], pa.uint8())})
    assert Encoder.fit(only, table).transform(table).sparse.values().tolist() == [2, 0]


def test_constant_and_absent_columns_can_be_fitted() -> None:
    features = [
        {"kind": "dense", "feature": "x"},
        {"kind": "bucket", "feature": "y", "buckets": 8},
        {"kind": "categorical", "feature": "z"},
    ]
    only = parse(Encoder.Config, {"features": features}, source="test")
    encoder = Encoder.fit(only, pa.table({"x": [2.0, 2.0], "y": pa.nulls(2), "z": pa.nulls(2)}))
    batch = encoder.transform(pa.table({"x": [2.0, 3.0], "y": [1, 2], "z": ["new", None]}))
    assert batch.dense[:, 0].tolist() == [0.0, 1.0]
    assert batch.sparse.to_dict()["y"].values().tolist() == [2, 2] and batch.sparse.to_dict()["z"].values().tolist() == [1, 0]


def test_buckets_hold_equal_shares() -> None:
    only = parse(Encoder.Config, {"features": [{"kind": "bucket", "feature": "x", "buckets": 10}]}, source="test")
    table = pa.table({"x": np.random.default_rng(0).permutation(1000)})
    counts = np.bincount(Encoder.fit(only, table).transform(table).sparse.values().numpy())
    assert counts[:2].tolist() == [0, 0] and len(counts) == 12 and counts[2:].min() >= 99 and counts[2:].max() <= 101


@pytest.mark.parametrize(("threshold", "expected"), [("> 3", [0, 0, 1]), ("<=3", [1, 1, 0]), ("== 3", [0, 1, 0]), ("< 2.5", [1, 0, 0])])
def test_thresholds(threshold: str, expected: list[int]) -> None:
    only = parse(
        Encoder.Config,
        {"features": [{"kind": "dense", "feature": "x"}], "tasks": [{"name": "t", "feature": "y", "threshold": threshold}]},
        source="test",
    )
    table = pa.table({"x": [1, 2, 3], "y": [2, 3, 4]})
    labels = Encoder.fit(only, table).transform(table).labels
    assert labels is not None and labels[:, 0].tolist() == expected


def test_save_and_load_are_bit_equal(tmp_path) -> None:
    rng = np.random.default_rng(1)
    train, later = to_table(random_rows(rng, 50)), to_table(random_rows(rng, 30))
    encoder = Encoder.fit(config(), train)
    encoder.save(tmp_path / "a")
    loaded = Encoder.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("encoder.json", "vocabularies.arrow"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["encoder.json", "vocabularies.arrow"]
    assert loaded.fingerprint() == encoder.fingerprint() and loaded.config == encoder.config and loaded.spec == encoder.spec
    one, two = encoder.transform(later), loaded.transform(later)
    for left, right in ((one.sparse, two.sparse), (one.sequences, two.sequences)):
        assert torch.equal(left.values(), right.values()) and torch.equal(left.lengths(), right.lengths())
    assert torch.equal(one.dense, two.dense) and torch.equal(one.labels, two.labels)


def test_an_encoder_without_vocabularies_can_be_saved(tmp_path) -> None:
    only = parse(Encoder.Config, {"features": [{"kind": "dense", "feature": "x"}]}, source="test")
    encoder = Encoder.fit(only, pa.table({"x": [0.1, 0.2]}))
    encoder.save(tmp_path)
    assert Encoder.load(tmp_path).fingerprint() == encoder.fingerprint()


def test_the_fingerprint_tells_encoders_apart() -> None:
    rows = random_rows(np.random.default_rng(1), 50)
    base = Encoder.fit(config(), to_table(rows)).fingerprint()
    assert base == Encoder.fit(config(), to_table(rows)).fingerprint()
    others = [Encoder.fit(config(tasks=()), to_table(rows)).fingerprint(), Encoder.fit(config(), to_table(rows[:40])).fingerprint()]
    only = parse(Encoder.Config, {"features": [{"kind": "bag", "feature": "b"}]}, source="test")
    others += [Encoder.fit(only, pa.table({"b": [words]})).fingerprint() for words in (["ab", "c"], ["a", "bc"], ["abc"])]
    assert len({base, *others}) == 6


def test_a_changed_file_is_refused(tmp_path) -> None:
    encoder = Encoder.fit(config(), to_table(random_rows(np.random.default_rng(1), 50)))
    encoder.save(tmp_path)
    path = tmp_path / "encoder.json"
    content = json.loads(path.read_text())
    content["scales"]["price"][0] += 1e-9
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="fingerprint"):
        Encoder.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(BundleError, match="not a saved encoder"):
        Encoder.load(tmp_path)
    with pytest.raises(BundleError, match="not a saved encoder"):
        Encoder.load(tmp_path / "nothing")


def test_errors_name_the_column() -> None:
    table = to_table(random_rows(np.random.default_rng(1), 50))
    encoder = Encoder.fit(config(), table)
    with pytest.raises(SchemaError, match=r"'city'.*did you mean 'citi'"):
        encoder.transform(table.rename_columns([{"city": "citi"}.get(n, n) for n in table.column_names]))
    with pytest.raises(SchemaError, match="column 'city': expected once"):
        encoder.transform(table.append_column("city", table["city"]))
    for name, wrong, expected in (
        ("city", pa.array([1] * 50), "column 'city': expected strings, got int64"),
        ("age", pa.array(["x"] * 50), "column 'age': expected numbers, got string"),
        ("genres", pa.array(["x"] * 50), "column 'genres': expected lists of strings, got string"),
        ("genres", pa.array([["x"]] * 50, pa.list_view(pa.string())), "column 'genres': expected lists of strings, got list_view"),
        ("history_age", pa.array([["x"]] * 50), "column 'history_age': expected lists of numbers, got list<item: string>"),
        ("city__status", pa.array([0.0] * 50), "column 'city__status': expected integers"),
    ):
        changed = table.set_column(table.column_names.index(name), name, wrong)
        for call in (encoder.transform, lambda t: Encoder.fit(config(), t)):
            if name == "history_age" and call is not encoder.transform:
                continue
            with pytest.raises(SchemaError) as caught:
                call(changed)
            assert expected in str(caught.value)


def test_lists_that_do_not_align_are_refused() -> None:
    rows = random_rows(np.random.default_rng(1), 4)
    for row in rows:
        row |= {"history_items": ["a"], "history_rating": [1.0], "history_age": [1.0], "history_genre": ["b"]}
        row |= {name: 0 for name in row if name.endswith("__status")}
    encoder = Encoder.fit(config(), to_table(rows))
    rows[2]["history_age"] = [1.0, 2.0]
    with pytest.raises(DataError, match="'history_age', row 2: 2 elements beside the 1 of 'history_items'"):
        encoder.transform(to_table(rows))
    rows[2]["history_age__status"] = int(ValueStatus.EXPIRED)
    assert encoder.transform(to_table(rows)).sequences.to_dict()["history_age"].values().tolist()[2] == 0


def test_labels_are_all_there_or_none() -> None:
    rows = random_rows(np.random.default_rng(1), 10)
    table = to_table(rows)
    encoder = Encoder.fit(config(), table)
    assert encoder.transform(table.drop_columns("rating")).labels is None
    rows[3]["rating"] = None
    with pytest.raises(DataError, match="label 'rating' of task 'like': row 3"):
        encoder.transform(to_table(rows))
    two = config(tasks=[{"name": "a", "feature": "rating"}, {"name": "b", "feature": "click"}])
    with pytest.raises(SchemaError, match="missing label column 'click'"):
        Encoder.fit(two, table).transform(table)
    with pytest.raises(DataError, match="at least one row"):
        encoder.transform(table.slice(0, 0))


def weighted(values: list[Any], **columns: list[Any]) -> pa.Table:
    return pa.table({"x": [1.0] * len(values), "label": [1.0] * len(values), "importance": values, **columns})


def weighted_encoder(weight: str | None = "importance") -> Encoder:
    content = {"features": [{"kind": "dense", "feature": "x"}], "tasks": [{"name": "t", "feature": "label"}], "weight": weight}
    return Encoder.fit(parse(Encoder.Config, content, source="test"), weighted([1.0]))


def test_weights_stand_beside_the_labels(tmp_path: Any) -> None:
    encoder, table = weighted_encoder(), weighted([2, 0, 0.5])
    assert (encoder.weight_column, encoder.feature_columns, encoder.label_columns) == ("importance", ("x",), ("label",))
    weights = encoder.transform(table).weights
    assert weights is not None and weights.dtype == torch.float32 and weights.tolist() == [2.0, 0.0, 0.5]
    assert encoder.transform(table.drop_columns(["label", "importance"])).weights is None
    assert weighted_encoder(None).transform(table).weights is None
    encoder.save(tmp_path)
    assert torch.equal(Encoder.load(tmp_path).transform(table).weights, weights)
    with pytest.raises(SchemaError, match=r"missing column.*'importance'"):
        encoder.transform(table.drop_columns("importance"))


@pytest.mark.parametrize(
    ("value", "found"),
    [(-0.5, "-0.5"), (math.nan, "null, not PRESENT or not finite"), (math.inf, "null, not PRESENT"), (None, "null, not PRESENT")],
)
def test_a_weight_that_is_none_is_an_error_that_names_column_and_row(value: float | None, found: str) -> None:
    with pytest.raises(DataError, match=f"weight 'importance': row 1 is {found}"):
        weighted_encoder().transform(weighted([1.0, value]))


def test_a_weight_that_is_not_present_is_an_error() -> None:
    status = [int(ValueStatus.PRESENT), int(ValueStatus.EXPIRED)]
    with pytest.raises(DataError, match="weight 'importance': row 1"):
        weighted_encoder().transform(weighted([1.0, 1.0], importance__status=status))


def test_an_encoder_without_weights_has_the_fingerprint_of_before_there_were_any() -> None:
    config = weighted_encoder(None).config
    assert "weight" not in config.model_dump(mode="json")
    assert weighted_encoder().config.model_dump(mode="json")["weight"] == "importance"
    assert weighted_encoder().fingerprint() != weighted_encoder(None).fingerprint()
    with pytest.raises(ConfigError, match="weight: expected tasks beside 'w'"):
        parse(Encoder.Config, {"features": [], "weight": "w"}, source="test")


GROUPS = {
    "place": ["city"],
    "item": ["item_id", "genre", "genres"],
    "numbers": ["raw", "price", "price__absent", "age"],
    "past": ["views", "history"],
}


def test_groups_reach_the_spec_and_decide_nothing_about_the_encoding(tmp_path: Any) -> None:
    table = to_table(random_rows(np.random.default_rng(1), 50))
    plain, grouped = Encoder.fit(config(), table), Encoder.fit(config(groups=GROUPS), table)
    assert grouped.spec.groups == {name: tuple(fields) for name, fields in GROUPS.items()} and plain.spec.groups == {}
    assert grouped.fingerprint() == plain.fingerprint()
    assert "groups" not in plain.config.model_dump(mode="json")
    grouped.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert loaded.config == grouped.config and list(loaded.spec.groups) == list(GROUPS)  # the order of the groups is that of the tokens


def test_the_fingerprint_of_an_encoder_is_what_it_was_before_there_were_weights_and_groups() -> None:
    content = {
        "features": [{"kind": "dense", "feature": "x"}],
        "tasks": [{"name": "t", "feature": "label"}],
        "groups": {"all": ["x", "x__absent"]},
    }
    encoder = Encoder.fit(parse(Encoder.Config, content, source="test"), weighted([1.0]))
    assert encoder.fingerprint() == "e90587e37ec0b3208dff8082fb6551531f7c6a52a2891869e7e30972be7da85f"


def test_a_spec_keeps_its_groups_and_one_without_them_loads() -> None:
    spec = Encoder.fit(config(groups=GROUPS), to_table(random_rows(np.random.default_rng(0), 60))).spec
    content = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert parse(InputSpec, content, source="test") == spec
    del content["groups"]
    assert parse(InputSpec, content, source="test") == spec.model_copy(update={"groups": {}})
    with pytest.raises(ConfigError, match="test: groups: field 'city' is in no group"):
        parse(InputSpec, content | {"groups": {"rest": list(spec.fields)[1:]}}, source="test")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (GROUPS | {"more": ["ctiy"]}, "test: groups: 'more': unknown field 'ctiy'; did you mean 'city'"),
        (GROUPS | {"more": ["history_rating"]}, "test: groups: 'more': unknown field 'history_rating'; did you mean 'history'"),
        (GROUPS | {"more": ["city"]}, "test: groups: field 'city' is in 'place' and again in 'more'; expected exactly one group"),
        (GROUPS | {"place": ["city", "city"]}, "test: groups: field 'city' is in 'place' and again in 'place'"),
        (GROUPS | {"past": ["history"]}, r"test: groups: field 'views' is in no group; expected every field in exactly one \(views\)"),
        (GROUPS | {"more": []}, "test: groups: 'more' holds no field"),
    ],
)
def test_groups_that_are_not_a_partition_are_named(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(groups=groups)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            [{"kind": "bucket", "feature": "x", "buckets": 3, "tabel": "t"}],
            r"features\.0\.tabel: unknown key 'tabel' \(known: buckets, feature, kind\)",
        ),
        ([{"kind": "buckets", "feature": "x"}], "unknown kind of feature 'buckets'; did you mean 'bucket'"),
        ([{"feature": "x"}], "expected a mapping with the key 'kind'"),
        ([{"kind": "dense", "feature": "x"}, {"kind": "bucket", "feature": "x", "buckets": 3}], "every field must be distinct, but 'x'"),
        (
            [{"kind": "categorical", "feature": "x", "table": "t"}, {"kind": "bag", "feature": "y", "table": "t", "min_count": 2}],
            "table 't' is used for pooled values \\(min_count 1\\) and for pooled values \\(min_count 2\\)",
        ),
        (
            [
                {"kind": "categorical", "feature": "x"},
                {"kind": "sequence", "name": "s", "items": "i", "target": "t", "table": "x", "max_length": 1},
            ],
            "table 'x' is used for pooled values",
        ),
        (
            [{"kind": "sequence", "name": "s", "items": "i", "target": "t", "max_length": 1, "extra": [{"feature": "e", "edges": [2, 1]}]}],
            "features.0.extra.0.edges: expected ascending numbers",
        ),
        (
            [{"kind": "sequence", "name": n, "items": n, "target": "t", "table": n, "max_length": 1} for n in ("a", "b")],
            "target 't' is looked up in two tables",
        ),
    ],
)
def test_config_errors(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(features=features)


def test_a_bad_threshold_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.0\.threshold"):
        config(tasks=[{"name": "t", "feature": "x", "threshold": "about 4"}])
