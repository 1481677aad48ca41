# SPDX-License-Identifier: Apache-2.0
"""Bundles whose files are mapped are the same bundles, and processes share their pages; int8 tables take a quarter of the memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.data.batch import SequenceBatch
from recsys.data.encode import Encoder
from recsys.embedding.quantize import QuantizedTables
from recsys.embedding.served import ServedTables
from recsys.ranking.models.dcnv2 import DCNv2
from tests.recsys.bundle import mapped_process

ROWS, WIDTH = 1_000_000, 32
TABLE = 4 * ROWS * WIDTH


@pytest.fixture(scope="module")
def whole(tiny_run: Any) -> Bundle:
    return Bundle.load(tiny_run.directory / "bundle")


@pytest.fixture(scope="module")
def mapped(tiny_run: Any) -> Bundle:
    return Bundle.load(tiny_run.directory / "bundle", mmap=True)


@pytest.fixture(scope="module")
def large(whole: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with one large table."""
    features = [{"kind": "categorical", "feature": "user", "ids": "hashed", "rows": ROWS}, {"kind": "dense", "feature": "age"}]
    config = parse(Encoder.Config, {"features": features, "tasks": [{"name": "like", "feature": "y"}]}, source="test")
    encoder = Encoder.fit(config, pa.table({"user": ["a", "b"], "age": [1.0, 2.0], "y": [0, 1]}))
    torch.manual_seed(0)
    ranker = DCNv2(parse(DCNv2.Config, {"embedding": {"dim": WIDTH}, "layers": 1, "hidden": [8]}, source="test"), encoder.spec)
    manifest = whole.manifest.model_copy(update={"encoder": encoder.fingerprint()})
    directory = tmp_path_factory.mktemp("large") / "bundle"
    replace(whole, encoder=encoder, ranker=ranker.eval(), manifest=manifest).save(directory)
    return directory


def test_a_mapped_bundle_is_the_same_bundle(whole: Bundle, mapped: Bundle) -> None:
    assert isinstance(mapped.ranker.tables, ServedTables)
    for one, two in ((whole.ranker, mapped.ranker), (whole.retriever, mapped.retriever)):
        state = two.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
        assert not two.training
    assert mapped.manifest == whole.manifest and mapped.items.equals(whole.items)
    assert mapped.catalogue.version == whole.catalogue.version and mapped.encoder.fingerprint() == whole.encoder.fingerprint()
    histories = SequenceBatch(items=torch.tensor([3, 40, 77, 5]), offsets=torch.tensor([0, 3, 3, 4]))
    with torch.inference_mode():
        found = [b.index.search(b.retriever.encode(histories), 10, b.catalogue.snapshot()) for b in (whole, mapped)]
    for got, expected in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_files_are_mapped_and_not_copied(mapped: Bundle, tiny_run: Any) -> None:
    """All but the catalogue's, whose ids a dictionary holds in any case."""
    regions = Path("/proc/self/maps").read_text()
    files = ("ranker/model.safetensors", "retriever/model.safetensors", "index/vectors.faiss", "items.arrow", "encoder/vocabularies.arrow")
    assert mapped.items.num_rows
    assert [name for name in files if str(tiny_run.directory / "bundle" / name) not in regions] == []


def test_a_mapped_bundle_can_be_saved_again(mapped: Bundle, tmp_path: Path) -> None:
    assert mapped.save(tmp_path / "copy").files == mapped.manifest.files


def test_int8_takes_a_quarter_of_the_memory(large: Path) -> None:
    plain, small = Bundle.load(large, mmap=True).ranker, Bundle.load(large, quantize="int8").ranker
    assert isinstance(small.tables, QuantizedTables)
    assert small.tables.float_bytes == TABLE == sum(w.nbytes for w in plain.tables.parameters())
    assert small.tables.bytes == ROWS * (WIDTH + 4) < 0.3 * TABLE
    batch = Bundle.load(large).encoder.transform(pa.table({"user": [str(i) for i in range(300)], "age": np.linspace(0.0, 3.0, 300)}))
    difference = (plain.predict(batch) - small.predict(batch)).abs().max()
    assert 0 < difference < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mmap", [True, False])
def test_a_second_process_has_little_memory_of_its_own(large: Path, mmap: bool) -> None:
    """Unmapped, each process has the whole table: so the measure can tell."""
    script = [sys.executable, "-m", mapped_process.__name__, str(large), json.dumps(mmap)]
    processes = []
    try:
        for _ in range(2):
            process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            report = json.loads(process.stdout.readline())
    finally:
        for process in processes:
            process.communicate("\n", timeout=60)
    assert report["rows"] == ROWS
    assert report["resident"] > 0.9 * TABLE  # the table was read
    if mmap:
        assert report["private"] < 0.2 * TABLE
    else:
        assert report["private"] > 0.9 * TABLE
