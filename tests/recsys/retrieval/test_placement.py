# SPDX-License-Identifier: Apache-2.0
"""Searching where no selector is taken. There is no GPU here: a FAISS index of the host stands for one, with its limits."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.components import component_config
from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError
from recsys.retrieval.catalogue import Catalogue, CatalogueView, DenseIndex, IVFIndex, load_index, placement
from recsys.retrieval.state import SlotVectors
from tests.recsys.retrieval.test_dense import brute, jagged, state_of

ON_GPU = placement._on_gpu


class LikeOnGPU:
    """A FAISS index that refuses selectors, and more than 2,048 rows or lists for a query."""

    def __init__(self, index: Any) -> None:
        self._index, self.ntotal = index, index.ntotal
        self.fetched: list[int] = []

    def search(self, queries: np.ndarray, count: int, params: Any = None) -> Any:
        if params is not None and params.sel is not None:
            raise RuntimeError("selectors are not supported")
        if count > 2048 or getattr(params, "nprobe", 0) > 2048:
            raise RuntimeError("at most 2048")
        self.fetched.append(count)
        return self._index.search(queries, count, params=params)


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr(placement, "_on_gpu", LikeOnGPU)


def view_of(live: np.ndarray) -> CatalogueView:
    ids = [str(i) for i in range(len(live))]
    catalogue = Catalogue(ids)
    catalogue.set_live([ids[i] for i in np.flatnonzero(~live)], False)
    return catalogue.snapshot()


def dense(vectors: np.ndarray, view: CatalogueView) -> DenseIndex:
    return DenseIndex.build(DenseIndex.Config(device="cuda"), vectors, view, content_hash="m")


def ivf(vectors: np.ndarray, view: CatalogueView, **options: Any) -> IVFIndex:
    return IVFIndex.build(IVFIndex.Config(device="cuda", **options), vectors, view, content_hash="m")


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_dense_lists_are_those_of_brute_force(data: st.DataObject) -> None:
    """Small integers, so that scores are exact and often equal."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, b = draw(st.sampled_from([1, 30, 500])), draw(st.integers(0, 9))
    spread = draw(st.sampled_from([1, 100]))
    vectors, queries = (rng.integers(-spread, spread + 1, (size, 3)).astype(np.float32) for size in (n, b))
    live = rng.random(n) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    scorable = rng.random(n) < 0.6 if draw(st.booleans()) else None
    exclude = [rng.integers(-1, n, rng.integers(0, 4)).tolist() for _ in range(b)]
    k = draw(st.sampled_from([1, 2, 7, n + 3]))
    view = view_of(live)
    rows, scores = dense(vectors, view).search(state_of(queries), k, view, jagged(exclude), scorable)
    expected_rows, expected_scores = brute(queries @ vectors.T, k, live if scorable is None else live & scorable, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_appended_rows_are_compared_on_the_host_beside_what_the_device_finds(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, new, b, k = 500, draw(st.integers(1, 50)), 5, draw(st.sampled_from([1, 7, 60]))
    spread = draw(st.sampled_from([1, 100]))
    vectors, queries = (rng.integers(-spread, spread + 1, (size, 3)).astype(np.float32) for size in (n + new, b))
    live = rng.random(n + new) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    exclude = [rng.integers(-1, n + new, rng.integers(0, 4)).tolist() for _ in range(b)]
    index, view = dense(vectors[:n], view_of(np.ones(n, bool))), view_of(live)
    longer = index.extended(vectors[n:], view)
    assert longer._placed is index._placed, "one copy there, and one turn for the threads of both"
    rows, scores = longer.search(state_of(queries), k, view, jagged(exclude))
    expected_rows, expected_scores = brute(queries @ vectors.T, k, live, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_an_ivf_that_probes_all_lists_finds_what_brute_force_does(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, k = 500, draw(st.sampled_from([1, 5, 30]))
    vectors, queries = (rng.normal(size=(size, 6)).astype(np.float32) for size in (n, 8))
    live = rng.random(n) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    exclude = [rng.integers(-1, n, rng.integers(0, 4)).tolist() for _ in queries]
    view = view_of(live)
    rows, scores = ivf(vectors, view, lists=5, effort=5).search(state_of(queries), k, view, jagged(exclude))
    expected_rows, expected_scores = brute(queries.astype(np.float64) @ vectors.T.astype(np.float64), k, live, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("live_share", [1.0, 0.3])
def test_where_enough_is_fetched_nothing_is_compared_on_the_host(live_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    n, k = 4000, 10
    vectors, queries = (rng.normal(size=(size, 12)).astype(np.float32) for size in (n, 40))
    live = rng.random(n) < live_share
    view, scores64 = view_of(live), queries.astype(np.float64) @ vectors.T.astype(np.float64)
    exclude = [np.argsort(-own)[: i % 7].tolist() for i, own in enumerate(scores64)]
    index = dense(vectors, view)
    monkeypatch.setattr(index, "_search_all", lambda *_: pytest.fail("computed all scores"))
    rows, _ = index.search(state_of(queries), k, view, jagged(exclude))
    np.testing.assert_array_equal(rows, brute(scores64, k, live, exclude)[0])
    wanted = k + max(live[own].sum() for own in exclude if own) + 1
    assert index._placed.index.fetched == [wanted if live_share == 1 else np.ceil(2 * wanted / live.mean())]


@pytest.mark.parametrize("build", [dense, ivf], ids=["dense", "ivf"])
def test_where_all_that_is_fetched_is_dead_the_lists_are_full_still(build: Any) -> None:
    """Half of the items point where the users look, and are retired."""
    rng = np.random.default_rng(1)
    n, k = 3000, 12
    vectors = rng.normal(size=(n, 4)).astype(np.float32)
    live = np.arange(n) % 2 == 0
    vectors[~live] += 9
    queries = np.ones((5, 4), np.float32) + rng.random((5, 4)).astype(np.float32)
    view, exclude = view_of(live), [[0, 2, 4]] * 5
    index = build(vectors, view)
    rows, _ = index.search(state_of(queries), k, view, jagged(exclude))
    np.testing.assert_array_equal(rows, brute(queries.astype(np.float64) @ vectors.T, k, live, exclude)[0])
    assert index._placed.index.fetched, "it was asked, and had too little to say"


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_lists_longer_than_a_search_may_be_are_made_whole(share: float) -> None:
    rng = np.random.default_rng(2)
    n, k = 20_000, 2100
    vectors, queries = (rng.integers(-1000, 1001, (size, 4)).astype(np.float32) for size in (n, 2))
    live = rng.random(n) < share
    view = view_of(live)
    index = dense(vectors, view)
    rows, _ = index.search(state_of(queries), k, view)
    np.testing.assert_array_equal(rows, brute(queries @ vectors.T, k, live, [[], []])[0])
    assert index._placed.index.fetched == [2048]


def test_an_effort_is_chosen_on_the_host_and_serves_on_the_device() -> None:
    rng = np.random.default_rng(3)
    vectors, queries = (rng.normal(size=(size, 8)).astype(np.float32) for size in (3000, 30))
    view, state = view_of(np.ones(3000, bool)), SlotVectors(torch.from_numpy(queries)[:, None])
    index = ivf(vectors, view)
    calibrated = index.calibrated(state, view, recall=0.95, k=10)
    host = IVFIndex.build(IVFIndex.Config(), vectors, view, content_hash="m").calibrated(state, view, recall=0.95, k=10)
    assert index._placed.index.fetched == [] and calibrated.config.effort == host.config.effort > 1
    for live in (np.ones(3000, bool), rng.random(3000) < 0.4):
        one, other = (which.search(state, 10, view_of(live)) for which in (calibrated, host))
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    assert len(calibrated._placed.index.fetched) == 2


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    vectors, view = rng.normal(size=(500, 4)).astype(np.float32), view_of(np.ones(500, bool))
    index, state = dense(vectors, view), state_of(rng.normal(size=(3, 4)).astype(np.float32))
    search, inside, most = index._placed.index.search, [], []

    def noting(*args: Any, **options: Any) -> Any:
        inside.append(1)
        time.sleep(0.005)
        most.append(len(inside))
        inside.pop()
        return search(*args, **options)

    monkeypatch.setattr(index._placed.index, "search", noting)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: index.search(state, 5, view), range(8)))
    assert most == [1] * 8


@pytest.mark.parametrize("build", [dense, ivf], ids=["dense", "ivf"])
def test_what_is_saved_is_the_form_of_the_host(build: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    vectors, view = rng.normal(size=(600, 4)).astype(np.float32), view_of(rng.random(600) < 0.5)
    index, state = build(vectors, view), state_of(rng.normal(size=(3, 4)).astype(np.float32))
    index.save(tmp_path / "index")
    for file in (tmp_path / "index").glob("*.faiss"):
        assert isinstance(faiss.read_index(str(file)), faiss.IndexFlatIP | faiss.IndexIVFFlat)
    loaded = load_index(tmp_path / "index", view)
    assert loaded.config == index.config and isinstance(loaded._placed.index, LikeOnGPU)
    for ours, theirs in zip(loaded.search(state, 5, view), index.search(state, 5, view), strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Recipe(Config):
    index: component_config("index")  # type: ignore[valid-type]


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    view = view_of(np.ones(20, bool))
    dense(np.eye(20, dtype=np.float32), view).save(tmp_path / "index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_on_gpu", ON_GPU)
        patch.setattr(faiss, "get_num_gpus", lambda: 0)
        for build in (dense, ivf, lambda *_: load_index(tmp_path / "index", view)):
            with pytest.raises(ConfigError, match=r"index\.device: expected 'cpu', since this FAISS has no GPU, got 'cuda'"):
                build(np.eye(20, dtype=np.float32), view)
    for name in ("hnsw", "gather", "beam"):
        with pytest.raises(ConfigError, match=r"test: index\.device"):
            parse(Recipe, {"index": {"name": name, "device": "cuda"}}, source="test")
