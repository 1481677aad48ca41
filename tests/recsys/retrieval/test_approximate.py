# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from recsys.core.errors import BundleError, DataError
from recsys.retrieval.catalogue import Catalogue, CatalogueView, DenseIndex, HNSWIndex, IVFIndex
from recsys.retrieval.catalogue.approximate import ApproximateIndex, recall_of
from recsys.retrieval.state import SlotVectors

N, DIM, USERS, K = 3000, 16, 40, 10
KINDS: list[type[ApproximateIndex]] = [IVFIndex, HNSWIndex]


def vectors(count: int, seed: int) -> np.ndarray:
    """Around the same centres for every seed."""
    centres = np.random.default_rng(0).normal(size=(40, DIM))
    random = np.random.default_rng(seed)
    found: np.ndarray = (centres[random.integers(0, 40, count)] + 0.6 * random.normal(size=(count, DIM))).astype(np.float32)
    return found


def states(seed: int) -> SlotVectors:
    return SlotVectors(torch.from_numpy(vectors(USERS, seed))[:, None])


def view_of(share: float) -> CatalogueView:
    ids = [str(i) for i in range(N)]
    catalogue = Catalogue(ids)
    catalogue.set_live([ids[i] for i in np.random.default_rng(1).permutation(N)[round(share * N) :]], False)
    return catalogue.snapshot()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def index(request: pytest.FixtureRequest) -> ApproximateIndex:
    kind: type[ApproximateIndex] = request.param
    return kind.build(kind.Config(), vectors(N, 1), view_of(1.0), content_hash="m")


@pytest.fixture(scope="module")
def exact() -> DenseIndex:
    return DenseIndex.build(DenseIndex.Config(), vectors(N, 1), view_of(1.0), content_hash="m")


def test_the_effort_that_is_chosen_has_the_recall_on_other_users_at_every_share(index: ApproximateIndex, exact: DenseIndex) -> None:
    calibrated = index.calibrated(states(2), view_of(1.0), recall=0.99, k=K)
    assert calibrated.config.effort & (calibrated.config.effort - 1) == 0
    for share in (1.0, 0.3, 0.1, 0.03, 0.01):
        view = view_of(share)
        found, scores = calibrated.search(states(3), K, view)
        wanted, _ = exact.search(states(3), K, view)
        assert recall_of(found, wanted) > 0.97
        assert view.live[found].all()
        np.testing.assert_allclose(scores, exact.score(states(3), found), rtol=1e-5)


def test_less_effort_finds_less(index: ApproximateIndex, exact: DenseIndex) -> None:
    wanted, _ = exact.search(states(3), K, view_of(1.0))
    recalls = [recall_of(index._with(effort).search(states(3), K, view_of(1.0))[0], wanted) for effort in (1, 1 << 12)]
    assert recalls[0] < recalls[1] and recalls[1] > 0.999


def test_lists_that_are_short_for_want_of_effort_are_made_anew(index: ApproximateIndex, exact: DenseIndex) -> None:
    """One inverted list holds 13 items on average."""
    found, scores = index._with(1).search(states(3), 200, view_of(1.0))
    assert (found >= 0).all() and all(len(set(row)) == 200 for row in found.tolist())
    if isinstance(index, IVFIndex):
        wanted, best = exact.search(states(3), 200, view_of(1.0))
        assert recall_of(found, wanted) == 1.0
        np.testing.assert_allclose(scores, best, rtol=1e-5)


def test_excluded_items_never_cost_places(index: ApproximateIndex, exact: DenseIndex) -> None:
    view = view_of(0.5)
    best, _ = exact.search(states(3), 30, view)
    exclude = (best.reshape(-1), np.arange(USERS + 1) * 30)
    found, _ = index.search(states(3), K, view, exclude=exclude)
    assert (found >= 0).all() and not any(set(f) & set(b) for f, b in zip(found.tolist(), best.tolist(), strict=True))


def test_below_the_share_all_live_items_are_compared(index: ApproximateIndex, exact: DenseIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_nearest", lambda *_: pytest.fail("the structure was asked"))
    share = 0.9 * index.config.exact_below
    (rows, scores), (wanted, best) = (which.search(states(3), K, view_of(share)) for which in (index, exact))
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_allclose(scores, best, rtol=1e-5)


def test_new_rows_are_found_and_the_old_index_is_left_alone(index: ApproximateIndex) -> None:
    catalogue = Catalogue([str(i) for i in range(N)])
    catalogue.add([f"new{i}" for i in range(5)])
    new = 3 * vectors(5, 7)
    grown = index.extended(new, catalogue.snapshot())
    found, _ = grown._with(1 << 12).search(SlotVectors(torch.from_numpy(new)[:, None]), 1, catalogue.snapshot())
    best = (new @ np.concatenate((vectors(N, 1), new)).T).argmax(1)
    assert found[:, 0].tolist() == best.tolist() and (best >= N).all()
    assert grown.config == index.config and index.meta.rows == N
    with pytest.raises(DataError, match=r"vectors: expected \[5, 16\], one for each new row, got \[4, 16\]"):
        index.extended(new[:4], catalogue.snapshot())


NEW = 250


def with_new_rows(index: ApproximateIndex, dead: np.ndarray) -> tuple[ApproximateIndex, CatalogueView, np.ndarray]:
    """The index with as many more rows, its catalogue without some, and the vectors of all."""
    ids = [str(i) for i in range(N)] + [f"new{i}" for i in range(NEW)]
    catalogue = Catalogue(ids)
    catalogue.set_live([ids[i] for i in dead], False)
    new = vectors(NEW, 8)
    halfway = index.extended(new[:99], Catalogue(ids[: N + 99]).snapshot())
    return halfway.extended(new[99:], catalogue.snapshot()), catalogue.snapshot(), np.concatenate((vectors(N, 1), new))


def test_the_delta_is_compared_and_the_main_part_is_searched_as_before(index: ApproximateIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the least effort, which misses items of the main part."""
    monkeypatch.setattr(type(index), "_make", lambda _: pytest.fail("the structure was made anew"))
    monkeypatch.setattr(type(index), "_search_all", lambda *_: pytest.fail("computed all scores"))
    least = index._with(1)
    longer, view, everything = with_new_rows(least, np.arange(N, N + NEW, 3))
    assert longer._structure is index._structure and longer._rows.main is index._rows.main
    rows, scores = longer.search(states(3), 4, view)
    before, before_scores = least.search(states(3), 4, view_of(1.0))
    for user, query in enumerate(states(3).flat().numpy()):
        new = [(-float(query @ everything[row]), row) for row in range(N, N + NEW) if view.live[row]]
        pool = [*new, *zip((-before_scores[user]).tolist(), before[user].tolist(), strict=True)]
        expected = sorted(pool)[:4]
        assert rows[user].tolist() == [row for _, row in expected]
        np.testing.assert_allclose(scores[user], [-score for score, _ in expected], rtol=1e-5)
    assert (rows >= N).any() and (rows < N).any()


def test_a_delta_does_not_hide_that_the_main_part_gave_too_little(index: ApproximateIndex) -> None:
    longer, view, everything = with_new_rows(index._with(1), np.arange(0))
    found, _ = longer.search(states(3), 200, view)
    assert (found >= 0).all()
    if isinstance(index, IVFIndex):
        exact = DenseIndex.build(DenseIndex.Config(), everything, view, content_hash="m")
        assert recall_of(found, exact.search(states(3), 200, view)[0]) == 1.0


def test_lists_are_full_whatever_is_live_and_seen(index: ApproximateIndex) -> None:
    random = np.random.default_rng(2)
    for share in (0.02, 0.3, 0.9):
        dead = np.flatnonzero(random.random(N + NEW) > share)
        longer, view, everything = with_new_rows(index._with(1), dead)
        exact = DenseIndex.build(DenseIndex.Config(), everything, view, content_hash="m")
        best, _ = exact.search(states(3), 12, view)
        exclude = (best.reshape(-1), np.arange(USERS + 1) * 12)
        for k in (1, K, 5000):
            found, scores = longer.search(states(3), k, view, exclude=exclude)
            assert (np.count_nonzero(found >= 0, axis=1) == min(k, view.live_count - 12)).all()
            assert view.live[found[found >= 0]].all() and not any(
                set(f) & set(b) for f, b in zip(found.tolist(), best.tolist(), strict=True)
            )
            np.testing.assert_allclose(scores, exact.score(states(3), found), rtol=1e-4, atol=1e-5)


def test_an_effort_can_be_chosen_where_there_is_a_delta(index: ApproximateIndex) -> None:
    longer, view, everything = with_new_rows(index, np.arange(0))
    calibrated = longer.calibrated(states(2), view, recall=0.99, k=K)
    assert calibrated.config.effort == index.calibrated(states(2), view_of(1.0), recall=0.99, k=K).config.effort
    exact = DenseIndex.build(DenseIndex.Config(), everything, view, content_hash="m")
    assert recall_of(calibrated.search(states(3), K, view)[0], exact.search(states(3), K, view)[0]) > 0.97


def test_what_is_merged_or_saved_has_one_structure_of_all_rows(index: ApproximateIndex, tmp_path: Path) -> None:
    longer, view, everything = with_new_rows(index._with(1 << 12), np.arange(0))
    longer.save(tmp_path / "index")
    at_once = index._with(1 << 12).extended(
        np.concatenate((everything[N:],) * 2), Catalogue([str(i) for i in range(N + 2 * NEW)]).snapshot()
    )
    assert longer._structure.ntotal == N and at_once._structure.ntotal == N + 2 * NEW and index._structure.ntotal == N
    exact = DenseIndex.build(DenseIndex.Config(), everything, view, content_hash="m").search(states(3), K, view)[0]
    for whole in (longer.compacted(), type(index).load(tmp_path / "index", view)):
        assert whole.meta == longer.meta and whole.config == longer.config
        assert (whole._structure.ntotal, whole._rows.main.ntotal, whole._rows.delta.ntotal) == (N + NEW, N + NEW, 0)
        assert recall_of(whole.search(states(3), K, view)[0], exact) > 0.99


def test_it_is_saved_with_its_structure(index: ApproximateIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated = index.calibrated(states(2), view_of(1.0), k=K)
    calibrated.save(tmp_path / "index")
    monkeypatch.setattr(type(index), "_make", lambda _: pytest.fail("the structure was made anew"))
    loaded = type(index).load(tmp_path / "index", view_of(1.0))
    assert loaded.config == calibrated.config
    for ours, theirs in zip(loaded.search(states(3), K, view_of(0.6)), calibrated.search(states(3), K, view_of(0.6)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    faiss.write_index(faiss.IndexFlatIP(DIM), str(tmp_path / "index" / "structure.faiss"))
    with pytest.raises(BundleError, match=f"structure.faiss: expected an {index.structure.__name__}, got IndexFlatIP"):
        type(index).load(tmp_path / "index", view_of(1.0))
    (tmp_path / "index" / "structure.faiss").write_bytes(b"IxFI")
    with pytest.raises(BundleError, match="cannot read the index"):
        type(index).load(tmp_path / "index", view_of(1.0))


def test_an_effort_needs_users_to_be_chosen_by(index: ApproximateIndex) -> None:
    with pytest.raises(DataError, match="states: expected at least one user to choose the effort by, got none"):
        index.calibrated(SlotVectors(torch.zeros(0, 1, DIM)), view_of(1.0))


def test_recall_is_the_share_of_the_exact_list() -> None:
    exact = np.array([[1, 2, 3], [4, -1, -1], [-1, -1, -1]])
    assert recall_of(np.array([[3, 9, 1], [4, 5, 6], [7, 8, 9]]), exact) == pytest.approx((2 / 3 + 1 + 1) / 3)
