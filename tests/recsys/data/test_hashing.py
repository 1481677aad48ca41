# SPDX-License-Identifier: Apache-2.0
"""Hashed ids: what is stable, what collides, and how an encoder gives them out."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import chisquare

from recsys.core.config import parse
from recsys.core.errors import ConfigError, SchemaError
from recsys.core.hashing import hash64
from recsys.data.encode import Encoder
from recsys.data.encoding.hashing import hashed_rows, raw_ids, sharing
from recsys.embedding.tables import EmbeddingTables

WORDS = ["", "a", "b", "ab", "ba", "aa", "user/1", "user/11", "ä€𝄞", "x" * 1000, "1", "2"]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_hash_does_not_depend_on_the_layout(seed: int) -> None:
    expected = hash64(pa.array(WORDS), seed)
    assert expected.dtype == np.uint64 and len(set(expected.tolist())) == len(WORDS)
    layouts = [pa.array(WORDS, type=t) for t in (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())]
    layouts += [
        pa.array(WORDS).dictionary_encode(),
        pa.chunked_array([WORDS[:3], WORDS[3:3], WORDS[3:]]),
        pa.array(["?", *WORDS, "?"])[1:-1],
    ]
    for layout in layouts:
        assert np.array_equal(hash64(layout, seed), expected), layout.type
    for i, word in enumerate(WORDS):
        assert hash64(pa.array([word]), seed)[0] == expected[i]


def test_a_hash_of_strings_is_that_of_its_definition() -> None:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def slow(data: bytes, seed: int) -> int:
        total = sum(mix(i << 8 | byte) for i, byte in enumerate(data)) + len(data) * 0x94D049BB133111EB
        return mix((total & mask) ^ mix(seed & mask))

    for seed in (0, 3, -1):
        assert hash64(pa.array(WORDS), seed).tolist() == [slow(word.encode(), seed) for word in WORDS]
        assert hash64(pa.array([5, -5]), seed).tolist() == [mix((x & mask) ^ mix(seed & mask)) for x in (5, -5)]
    assert mix(0) == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0


def test_a_hash_is_the_same_in_another_process() -> None:
    code = "import pyarrow as pa; from recsys.core.hashing import hash64; print(hash64(pa.array(['a', 'user/1'])).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"})
    assert printed.stdout.strip() == str(hash64(pa.array(["a", "user/1"])).tolist())


def test_numbers_hash_alike_in_every_integer_type() -> None:
    numbers = [0, 1, 2, 100, 127]
    expected = hash64(pa.array(numbers, type=pa.int64()))
    for t in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        assert np.array_equal(hash64(pa.array(numbers, type=t)), expected)
    assert hash64(pa.array([2**64 - 1], type=pa.uint64())).shape == (1,)
    assert hash64(pa.array(["1"]))[0] != hash64(pa.array([1]))[0]
    many = np.arange(-50_000, 50_000)
    assert len(np.unique(hash64(pa.array(many)))) == len(many) == len(np.unique(hash64(pa.array(many.astype(str)))))
    for bad in (pa.array([1.0]), pa.array([True]), pa.array([["a"]])):
        with pytest.raises(SchemaError, match="expected strings, binary or integers"):
            hash64(bad)


def test_nulls_have_the_row_of_no_value() -> None:
    words = ["a", None, "b"]
    layouts = pa.array(words), pa.array([1, None, 2]), pa.chunked_array([words[:2], words[2:]]), pa.array(words).dictionary_encode()
    for values in layouts:
        rows, ids = hashed_rows(values, 50), raw_ids(values)
        assert rows[1] == 0 == ids[1] and rows.dtype == ids.dtype == np.int64
        assert rows[[0, 2]].min() >= 2 and rows.max() < 50 and ids[[0, 2]].min() >= 1 and ids.max() <= 2**63 - 2
    assert hashed_rows(pa.array([], type=pa.string()), 5).shape == raw_ids(pa.array([], type=pa.int64())).shape == (0,)
    assert hashed_rows(pa.nulls(2, pa.string()), 5).tolist() == [0, 0]
    with pytest.raises(ConfigError, match="at least 3"):
        hashed_rows(pa.array(["a"]), 2)


@pytest.mark.parametrize("kind", ["numbers", "strings"])
def test_rows_are_uniform_and_the_sharing_is_the_expected_one(kind: str) -> None:
    ids, rows = 20_000, 10_002
    values = np.arange(ids) * 64
    hashed = hashed_rows(pa.array(values if kind == "numbers" else [f"item/{v:08d}" for v in values]), rows)
    assert chisquare(np.bincount(hashed - 2, minlength=rows - 2)).pvalue > 1e-4
    used = Counter(hashed.tolist())
    shared = sum(n for n in used.values() if n > 1) / ids
    assert shared == pytest.approx(sharing(ids, rows), abs=0.02) and 0.8 < shared < 0.9
    assert sharing(10**6, 10**6 + 2) == pytest.approx(1 - np.exp(-1), abs=1e-3) and sharing(10**4, 10**6) < 0.01
    assert sharing(1, 100) == 0.0 and sharing(5, 3) == 1.0
    other = hashed_rows(pa.array(values), rows, seed=1)
    assert np.mean(other == hashed) < 0.001


# The encoder's

FEATURES: list[dict[str, Any]] = [
    {"kind": "categorical", "feature": "city", "ids": "hashed", "rows": 12},
    {"kind": "bag", "feature": "tags", "table": "tag", "ids": "raw", "rows": 9},
    {"kind": "categorical", "feature": "tag", "ids": "raw", "rows": 9},
    {"kind": "sequence", "name": "history", "items": "seen", "target": "item", "max_length": 2, "ids": "raw", "rows": 7},
]
ROWS = pa.table(
    {
        "city": ["x", None, "y"],
        "tags": pa.array([["a", "b"], None, []], pa.list_(pa.string())),
        "tag": ["b", "c", None],
        "seen": pa.array([["1", "2", "3"], [], ["3"]], pa.list_(pa.string())),
        "item": ["3", "9", None],
    }
)


def encoder(features: list[dict[str, Any]] = FEATURES) -> Encoder:
    return Encoder.fit(parse(Encoder.Config, {"features": features}, source="test"), ROWS)


def test_an_encoder_gives_out_hashed_rows_and_raw_ids_without_a_vocabulary(tmp_path: Path) -> None:
    made = encoder()
    assert {t.name: (t.rows, t.ids) for t in made.spec.tables} == {"city": (12, "rows"), "tag": (9, "raw"), "item": (7, "raw")}
    batch = made.transform(ROWS)
    assert batch.sparse["city"].values().tolist() == hashed_rows(ROWS["city"], 12).tolist()
    a, b, c = raw_ids(pa.array(["a", "b", "c"])).tolist()
    assert batch.sparse["tags"].values().tolist() == [a, b, 0] and batch.sparse["tags"].lengths().tolist() == [2, 1, 0]
    assert batch.sparse["tag"].values().tolist() == [b, c, 0]
    two, three, nine = raw_ids(pa.array(["2", "3", "9"])).tolist()
    assert batch.sequences["seen"].values().tolist() == [two, three, three]
    assert batch.sequences["item"].values().tolist() == [three, nine, 0]
    made.save(tmp_path)
    again = Encoder.load(tmp_path)
    assert again.fingerprint() == made.fingerprint() and again.spec == made.spec
    assert torch.equal(again.transform(ROWS).sparse.values(), batch.sparse.values())


def test_managed_tables_read_what_the_encoder_gives() -> None:
    managed = {"tag": {"interval": 1}, "item": {"interval": 1}}
    tables = EmbeddingTables(encoder().spec, parse(EmbeddingTables.Config, {"dim": 4, "managed": managed}, source="test"))
    embedded = tables.train()(encoder().transform(ROWS))
    seen, target = embedded.sequences["seen"].values(), embedded.sequences["item"].values()
    assert torch.equal(seen[1], target[0]) and torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])


def test_a_vocabulary_has_the_fingerprint_of_before_there_was_anything_else() -> None:
    content = encoder([{"kind": "categorical", "feature": "city"}]).config.model_dump(mode="json")
    assert content["features"] == [{"kind": "categorical", "feature": "city", "table": None, "min_count": 1}]
    assert encoder().config.model_dump(mode="json")["features"][0]["rows"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": "raw"}, "rows: `ids: raw` needs the number of rows"),
        ({"rows": 9}, "rows: a vocabulary decides the rows of its table; expected `ids: hashed` or `ids: raw` beside 9"),
        ({"ids": "hashed", "rows": 3}, "rows.*greater than or equal to 4"),
        ({"ids": "hashed", "rows": 9, "min_count": 2}, "min_count: `ids: hashed` leaves no value out; expected 1, got 2"),
        ({"ids": "hash", "rows": 9}, "ids.*'hash'"),
        ({"table": "tag", "ids": "hashed", "rows": 9}, r"table 'tag' is used for .*\(ids hashed, 9 rows\).*\(ids raw, 9 rows\)"),
    ],
)
def test_what_does_not_fit_together_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder([{"kind": "categorical", "feature": "city"} | changes, *FEATURES[1:3]])
