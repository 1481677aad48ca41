# SPDX-License-Identifier: Apache-2.0
import datetime

import numpy as np
import pyarrow as pa
import pytest

from recsys.core.components import get, names
from recsys.core.errors import SchemaError
from recsys.text import HashingTextEncoder, encode_cached, item_text


class Counting:
    """An encoder that counts how often it is asked."""

    def __init__(self, identity="a"):
        self.identity = identity
        self.calls = 0

    def encode(self, texts, progress=None):
        self.calls += 1
        return np.array([[len(t), self.calls] for t in texts], dtype=np.float32).reshape(-1, 2)


def test_both_encoders_are_registered():
    assert {"hashing", "minilm"} <= set(names("text_encoder"))
    assert get("text_encoder", "hashing") is HashingTextEncoder


def test_item_text_joins_what_is_there():
    items = pa.table(
        {
            "title": ["Heat", "  Toy\nStory. ", None, ""],
            "genres": [["Action", "Crime"], ["Animation", ""], [], None],
            "year": [1995.0, None, 2001.5, float("nan")],
            "day": pa.array([datetime.date(1995, 12, 15), None, None, None]),
        }
    )
    assert item_text(items, ["title", "genres", "year"]) == ["Heat. Action, Crime. 1995", "Toy Story. Animation", "2001.5", ""]
    assert item_text(items, ["day", "title"])[0] == "1995-12-15. Heat"
    assert item_text(items, []) == [""] * 4


def test_item_text_names_an_unknown_column():
    with pytest.raises(SchemaError, match="unknown column 'titel'; did you mean 'title'"):
        item_text(pa.table({"title": ["a"]}), ["titel"])


def test_the_cache_answers_for_the_same_encoder_and_texts_only(tmp_path):
    encoder = Counting()
    first = encode_cached(encoder, ["x", "yy"], tmp_path / "cache")
    again = encode_cached(encoder, ["x", "yy"], tmp_path / "cache")
    assert encoder.calls == 1
    np.testing.assert_array_equal(first, again)
    for texts in (["xy", "y"], ["yy", "x"], ["x", "yy", ""], []):
        calls = encoder.calls
        assert len(encode_cached(encoder, texts, tmp_path / "cache")) == len(texts)
        assert encoder.calls == calls + 1
    other = Counting("b")
    encode_cached(other, ["x", "yy"], tmp_path / "cache")
    assert other.calls == 1
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".npy"}


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01", b"not an array"])
def test_a_damaged_cache_file_is_written_anew(tmp_path, damage):
    encoder = Counting()
    encode_cached(encoder, ["x"], tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    encode_cached(encoder, ["x"], tmp_path)
    assert encoder.calls == 2
    encode_cached(encoder, ["x"], tmp_path)
    assert encoder.calls == 2


def test_the_cache_never_unpickles(tmp_path):
    encoder = Counting()
    encode_cached(encoder, ["x"], tmp_path)
    (path,) = tmp_path.iterdir()
    np.save(path, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    assert encode_cached(encoder, ["x"], tmp_path).dtype == np.float32


def test_an_encoder_that_fails_leaves_no_file(tmp_path):
    class Failing(Counting):
        def encode(self, texts, progress=None):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        encode_cached(Failing(), ["x"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hashing_is_deterministic_unit_length_and_near_for_shared_words():
    texts = ["space adventure film", "an adventure in space", "french cooking lessons", ""]
    a, b = (HashingTextEncoder(HashingTextEncoder.Config()).encode(texts) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.dtype == np.float32 and a.shape == (4, 128)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), [1, 1, 1, 0], atol=1e-6)
    assert a[0] @ a[1] > a[0] @ a[2] + 0.2
    assert HashingTextEncoder(HashingTextEncoder.Config()).encode([]).shape == (0, 128)


def test_hashing_preserves_the_cosines_of_the_word_counts():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    texts = ["space adventure film", "an adventure in space", "french cooking lessons", "french film", "cooking in space"]
    vectors = HashingTextEncoder(HashingTextEncoder.Config(dim=4096)).encode(texts)
    expected = cosine_similarity(CountVectorizer(ngram_range=(1, 2)).fit_transform(texts))
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=0.06)


def test_hashing_identity_follows_the_settings():
    configs = [HashingTextEncoder.Config(), HashingTextEncoder.Config(seed=1), HashingTextEncoder.Config(dim=64)]
    assert len({HashingTextEncoder(c).identity for c in configs}) == 3
