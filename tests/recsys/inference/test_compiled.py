# SPDX-License-Identifier: Apache-2.0
"""Compiled rankers say what the rankers say that they were made from, or do not answer at all."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.bundle.bundle import Bundle
from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import RecsysError
from recsys.data.batch import TiledBatch
from recsys.data.datasets.synthetic import Synthetic
from recsys.embedding.quantize import quantize
from recsys.inference.compiled import CompiledRanker, compile_ranker
from recsys.inference.compiled import ranker as module
from recsys.inference.compiled.cache import ABOUT, GRAPH, Key, store, stored
from recsys.inference.compiled.graph import capture, export
from recsys.inference.frame import join
from recsys.inference.parity import LEAST_OVERLAP, LIST, MOST_DIFFERENCE, Parity
from recsys.inference.recommender import Recommender, Users

AT = datetime(2030, 1, 1, tzinfo=UTC)
OTHERS: dict[str, dict[str, Any]] = {
    "din": {"hidden": [9, 5]},
    "rankmixer": {"dim": 16, "blocks": 2, "tokenizer": {"name": "auto_split", "tokens": 4}},
    "unimixer": {"dim": 12, "history": {"name": "hstu", "max_length": 20, "attention": {"name": "target_attention", "unit": "dot"}}},
}
PRUNED = {"events": 4, "scorer": {"name": "context"}, "selector": {"name": "top_k"}}


@pytest.fixture(scope="module")
def bundle(tiny_run: Any) -> Bundle:
    return Bundle.load(tiny_run.directory / "bundle")


@pytest.fixture(scope="module")
def features(bundle: Bundle) -> OfflineReader:
    dataset = Synthetic(Synthetic.Config()).load()
    tables = {"interactions": dataset.interactions, "items": dataset.items, "users": dataset.users}
    return OfflineReader(parse(FeatureRepo, bundle.features, source="features.json"), tables)


@pytest.fixture
def recommender(bundle: Bundle, features: OfflineReader) -> Recommender:
    return Recommender(bundle, features)


def asked(recommender: Recommender, *ids: str) -> Users:
    return recommender.users(list(ids), pa.array([AT] * len(ids), pa.timestamp("us", tz="UTC")))


def tiled(recommender: Recommender, ids: tuple[str, ...], count: int) -> TiledBatch:
    users = asked(recommender, *ids)
    candidates = recommender.retrieve(users, count)
    return recommender.batch(users, candidates, recommender.items(users, candidates))


def with_ranker(bundle: Bundle, name: str, **more: Any) -> Bundle:
    """The same bundle with a fresh ranker of another kind."""
    cls = components.get("ranker", name)
    torch.manual_seed(0)
    config = parse(cls.Config, {"embedding": {"dim": 8, "init_std": 0.5}} | OTHERS.get(name, {}) | more, source="test")
    return replace(bundle, ranker=cls(config, bundle.encoder.spec).eval())


def bundles(bundle: Bundle) -> dict[str, Bundle]:
    return {"quickstart": bundle} | {name: with_ranker(bundle, name) for name in OTHERS}


BATCHES = [(("5", "17", "100", "40"), 30), (("5",), 3), (("nobody", "7"), 8), (("nobody",), 4), (("9",), 1)]


@pytest.mark.parametrize("name", ["quickstart", *OTHERS])
def test_the_graph_holds_for_any_number_of_rows_and_events(bundle: Bundle, features: OfflineReader, name: str) -> None:
    """Without a compiler: what `torch.export` captured, run as it stands."""
    given = bundles(bundle)[name]
    recommender = Recommender(given, features)
    captured = capture(given.ranker)
    assert captured.span == "vectors" and captured.passed_over is None
    compiled = CompiledRanker(given.ranker, captured.program.module(), captured.span)
    for ids, count in BATCHES:
        batch = tiled(recommender, ids, count)
        torch.testing.assert_close(compiled.predict(batch), given.ranker.predict(batch), rtol=0, atol=1e-6)
    whole = given.encoder.transform(_joined(recommender))
    torch.testing.assert_close(compiled.predict(whole), given.ranker.predict(whole), rtol=0, atol=1e-6)
    assert recommender.adopt(compiled, asked(recommender, "5", "17", "100", "40")).holds and recommender.ranker is compiled


def _joined(recommender: Recommender) -> pa.Table:
    users = asked(recommender, "5", "nobody")
    candidates = recommender.retrieve(users, 6)
    read = users.table.select([c for c in users.table.column_names if c not in ("user_id", "request_time")])
    return join(read, np.nonzero(candidates.rows >= 0)[0], recommender.items(users, candidates))


def test_the_graph_holds_no_table(bundle: Bundle) -> None:
    program = export(bundle.ranker, "vectors")
    tables = {tuple(weight.shape) for weight in bundle.ranker.tables.parameters()}
    held = [*program.state_dict.values(), *program.constants.values()]
    assert held and not any("tables" in name for name in program.state_dict)
    assert not any(isinstance(x, Tensor) and tuple(x.shape) in tables for x in held)


def test_a_history_encoder_that_does_not_export_is_left_out(bundle: Bundle, features: OfflineReader) -> None:
    given = with_ranker(bundle, "din", history={"name": "target_attention", "pruning": PRUNED})
    captured = capture(given.ranker)
    assert captured.span == "fields" and captured.passed_over
    recommender = Recommender(given, features)
    compiled = CompiledRanker(given.ranker, captured.program.module(), captured.span)
    for ids, count in BATCHES:
        batch = tiled(recommender, ids, count)
        torch.testing.assert_close(compiled.predict(batch), given.ranker.predict(batch), rtol=0, atol=1e-6)


def test_one_thread_after_another_is_in_the_graph(bundle: Bundle, recommender: Recommender) -> None:
    inside, most, exported = 0, 0, export(bundle.ranker, "vectors").module()

    def graph(*given: Tensor) -> Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        logits: Tensor = exported(*given)
        inside -= 1
        return logits

    compiled = CompiledRanker(bundle.ranker, graph, "vectors")
    batch = tiled(recommender, ("5", "17"), 20)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compiled.predict, [batch] * 8))
    assert most == 1
    for each in found:
        torch.testing.assert_close(each, bundle.ranker.predict(batch), rtol=0, atol=1e-6)


def test_int8_tables_go_with_a_graph(bundle: Bundle, recommender: Recommender) -> None:
    small = bundle.ranker.with_tables(quantize(bundle.ranker.tables))
    compiled = CompiledRanker(small, export(small, "vectors").module(), "vectors")
    batch = tiled(recommender, ("5", "17"), 20)
    torch.testing.assert_close(compiled.predict(batch), small.predict(batch), rtol=0, atol=1e-6)
    found = recommender.compared(small, asked(recommender, "5", "17", "100"))
    assert 0 < found.difference < 0.01 and found.overlap > 0.9 and found.rows > 0


class Off(nn.Module):
    """A ranker that is wrong by a little, from some row on."""

    def __init__(self, ranker: Any, by: float, error: Exception | None = None) -> None:
        super().__init__()
        self.ranker, self.by, self.error = ranker, by, error

    def predict(self, batch: TiledBatch) -> Tensor:
        if self.error is not None:
            raise self.error
        found: Tensor = self.ranker.predict(batch).clone()
        found[-1] += self.by
        return found


def test_what_disagrees_is_not_adopted_and_says_why(bundle: Bundle, recommender: Recommender) -> None:
    users = asked(recommender, "5", "17")
    own = recommender.ranker
    wrong = recommender.adopt(Off(bundle.ranker, 1e-4), users)
    assert not wrong.holds and wrong.difference == pytest.approx(1e-4, rel=0.01)
    assert wrong.reason is not None and wrong.reason.startswith("probabilities: expected differences of at most 1e-05, got 0.0001 among")
    failed = recommender.adopt(Off(bundle.ranker, 0.0, RuntimeError("no such kernel")), users)
    assert failed.reason == "RuntimeError: no such kernel"
    assert not recommender.adopt(Off(bundle.ranker, float("nan")), users).holds
    assert recommender.ranker is own
    right = Off(bundle.ranker, 1e-7)
    assert recommender.adopt(right, users).holds and recommender.ranker is right


def test_lists_in_another_order_are_not_adopted(bundle: Bundle, recommender: Recommender) -> None:
    class Shuffled:
        def predict(self, batch: TiledBatch) -> Tensor:
            found: Tensor = 1 - bundle.ranker.predict(batch)
            return found

    found = recommender.compared(Shuffled(), asked(recommender, "5", "17"))
    assert found.overlap < 0.9
    assert Parity(10, MOST_DIFFERENCE, LEAST_OVERLAP).holds and not Parity(10, 0.0, LEAST_OVERLAP - 0.001).holds
    assert Parity(10, 0.0, 0.5).reason == f"lists: expected at least 0.99 of the first {LIST} in common, got 0.5000"
    assert Parity(0).reason == "rows: expected candidates to compare, got none"


def written(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


def test_a_graph_is_found_by_its_key_alone(tmp_path: Path) -> None:
    key = Key.here("a" * 64)
    assert Key.here("a" * 64) == key and stored(tmp_path, key) is None
    path, about = store(tmp_path, key, "vectors", written(b"code"))
    assert stored(tmp_path, key) == (path, about) and path.read_bytes() == b"code" and about.span == "vectors"
    for name, value in (("bundle", "b" * 64), ("torch", "0.0"), ("machine", "vax"), ("processor", "none")):
        assert stored(tmp_path, key.model_copy(update={name: value})) is None
    store(tmp_path, key, "fields", written(b"other"))
    assert path.read_bytes() == b"code"  # what is there and whole stays


def test_what_was_changed_or_is_of_another_key_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, other = Key.here("a" * 64), Key.here("b" * 64)
    path, _ = store(tmp_path, key, "vectors", written(b"code"))
    path.parent.rename(tmp_path / other.digest)
    with caplog.at_level(logging.WARNING):
        assert stored(tmp_path, other) is None
        assert "expected the key" in caplog.text
        path, _ = store(tmp_path, key, "vectors", written(b"code"))
        path.write_bytes(b"evil")
        assert stored(tmp_path, key) is None
        assert f"{GRAPH} was changed: sha256" in caplog.text
        (path.parent / ABOUT).write_text("{")
        assert stored(tmp_path, key) is None
        assert "cannot be read" in caplog.text
    path, _ = store(tmp_path, key, "fields", written(b"new"))
    assert path.read_bytes() == b"new" and stored(tmp_path, key) is not None


def test_a_compilation_that_fails_leaves_nothing_and_is_told(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(program: Any, *, package_path: str) -> None:
        Path(package_path).write_bytes(b"half")
        raise RecsysError("no compiler")

    monkeypatch.setattr(module, "aoti_compile_and_package", fails)
    with caplog.at_level(logging.WARNING):
        assert compile_ranker(bundle, tmp_path / "cache") is None
    assert "is not compiled: RecsysError: no compiler" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", *OTHERS])
def test_a_compiled_ranker_is_the_ranker(
    bundle: Bundle, features: OfflineReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given = bundles(bundle)[name]
    recommender = Recommender(given, features)
    compiled = compile_ranker(given, tmp_path)
    assert compiled is not None and compiled.span == "vectors"
    for ids, count in BATCHES:
        batch = tiled(recommender, ids, count)
        torch.testing.assert_close(compiled.predict(batch), given.ranker.predict(batch), rtol=0, atol=1e-5)
    users = asked(recommender, "5", "17", "100")
    candidates = recommender.retrieve(users, 40)
    before = recommender.rank(users, candidates)
    assert recommender.adopt(compiled, users).reason is None and recommender.ranker is compiled
    np.testing.assert_allclose(recommender.rank(users, candidates).probability, before.probability, rtol=0, atol=1e-5)
    (directory,) = tmp_path.iterdir()
    assert sorted(path.name for path in directory.iterdir()) == sorted((ABOUT, GRAPH))
    assert (directory / GRAPH).stat().st_size < 50e6

    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(module, "aoti_compile_and_package", unwanted)
    again = compile_ranker(given, tmp_path)
    assert again is not None
    batch = tiled(recommender, *BATCHES[0])
    assert torch.equal(again.predict(batch), compiled.predict(batch))
