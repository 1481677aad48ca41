# SPDX-License-Identifier: Apache-2.0
"""Recorded requests travel with a bundle and are answered again from what was recorded, to the bit."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.bundle.bundle import Bundle
from recsys.bundle.golden import Golden
from recsys.core.config import parse
from recsys.core.errors import BundleError
from recsys.core.status import ValueStatus
from recsys.data.datasets.synthetic import Synthetic
from recsys.inference import frame, golden
from recsys.inference.recommender import Recommender
from recsys.inference.recorded import RecordedReader
from recsys.inference.request import Request

NOW = datetime(2030, 1, 1, tzinfo=UTC)
REQUESTS = [Request(user_id=user, k=k, at=NOW) for user, k in (("1", 5), ("2", 10), ("1", 3), ("who?", 7))]


@pytest.fixture
def bundle(tiny_run) -> Bundle:
    return Bundle.load(tiny_run.directory / "bundle")


@pytest.fixture
def recommender(bundle: Bundle) -> Recommender:
    dataset = Synthetic(Synthetic.Config()).load()
    tables = {"interactions": dataset.interactions, "items": dataset.items, "users": dataset.users}
    return Recommender(bundle, OfflineReader(parse(FeatureRepo, bundle.features, source="features.json"), tables))


def holding(bundle: Bundle, recorded: Golden | None) -> Recommender:
    """A recommender of the bundle with these recorded requests, and with no features of its own."""
    return Recommender(replace(bundle, golden=recorded), None)


def test_a_run_records_requests_that_its_bundle_answers_to_the_bit(bundle: Bundle) -> None:
    assert bundle.golden is not None and len(bundle.golden.requests) == 5
    report = golden.check(holding(bundle, bundle.golden), tolerance=0)
    assert report.requests == 5 and report.exact


def test_what_is_recorded_is_what_was_answered(bundle: Bundle, recommender: Recommender, tmp_path: Path) -> None:
    recorded = golden.record(recommender, REQUESTS)
    for request, kept in zip(REQUESTS, recorded.requests, strict=True):
        (answer,) = recommender.recommend([request])
        assert kept.item_ids == tuple(item.item_id for item in answer.items)
        assert np.array_equal(np.float32(kept.scores), np.float32([item.score for item in answer.items]))
    replace(bundle, golden=recorded).save(tmp_path / "bundle")
    loaded = Bundle.load(tmp_path / "bundle")
    assert loaded.golden.requests == recorded.requests
    assert all(loaded.golden.features[service].equals(table) for service, table in recorded.features.items())
    assert golden.check(holding(loaded, loaded.golden), tolerance=0).exact


def test_a_request_at_another_place_of_the_batch_is_answered_alone(bundle: Bundle, recommender: Recommender) -> None:
    one, other = golden.record(recommender, REQUESTS), golden.record(recommender, REQUESTS[::-1])
    assert one.requests == other.requests[::-1]


def test_a_bundle_without_recorded_requests_has_none_to_check(bundle: Bundle, tmp_path: Path) -> None:
    assert golden.check(holding(bundle, None)) is None
    replace(bundle, golden=None).save(tmp_path / "bundle")
    assert Bundle.load(tmp_path / "bundle").golden is None
    assert not list((tmp_path / "bundle").glob("golden*"))


def test_a_model_that_computes_something_else_is_found(bundle: Bundle) -> None:
    for module in (bundle.ranker, bundle.retriever):
        parameter = max(module.parameters(), key=lambda p: p.numel())
        before = parameter.detach().clone()
        parameter.data.mul_(1.5)
        with pytest.raises(BundleError, match=r"golden request \d: place \d+: '.*' at .*, but recorded was '.*' at "):
            golden.check(holding(bundle, bundle.golden))
        parameter.data.copy_(before)
    assert golden.check(holding(bundle, bundle.golden)).exact


def test_the_tolerance_is_the_bound_of_the_difference(bundle: Bundle) -> None:
    first, *rest = bundle.golden.requests
    moved = first.model_copy(update={"scores": (first.scores[0] + 0.01, *first.scores[1:])})
    recommender = holding(bundle, replace(bundle.golden, requests=(moved, *rest)))
    with pytest.raises(BundleError, match="golden request 0: place 0"):
        golden.check(recommender, tolerance=0.009)
    report = golden.check(recommender, tolerance=0.011)
    assert report.largest_difference == pytest.approx(0.01, abs=1e-5) and not report.exact


def test_items_may_change_places_only_where_scores_are_equal(bundle: Bundle) -> None:
    first, *rest = bundle.golden.requests
    ids = (first.item_ids[1], first.item_ids[0], *first.item_ids[2:])
    recommender = holding(bundle, replace(bundle.golden, requests=(first.model_copy(update={"item_ids": ids}), *rest)))
    assert golden.check(recommender).moved == 2
    with pytest.raises(BundleError, match=r"place 0: .* but recorded was"):
        golden.check(recommender, tolerance=0)
    fewer = first.model_copy(update={"item_ids": first.item_ids[1:], "scores": first.scores[1:]})
    with pytest.raises(BundleError, match="10 items, but 9 were recorded"):
        golden.check(holding(bundle, replace(bundle.golden, requests=(fewer, *rest))))


def test_what_was_not_recorded_is_missing(bundle: Bundle, recommender: Recommender) -> None:
    recorded = golden.record(recommender, REQUESTS)
    reader, at = RecordedReader(recorded.features), pa.array([NOW, NOW], pa.timestamp("us", "UTC"))
    users = frame.read_users(reader, pa.array(["1", "stranger"]), at)
    known = frame.read_users(recommender.features, pa.array(["1"]), at[:1])
    assert users.slice(0, 1).to_pylist() == known.to_pylist()
    (stranger,) = users.slice(1, 1).to_pylist()
    for name, value in stranger.items():
        if name.endswith("__status"):
            assert value == ValueStatus.MISSING and stranger[name.removesuffix("__status")] is None


def test_a_changed_record_is_a_changed_bundle(tiny_run, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_run.directory / "bundle", tmp_path / "bundle"))
    (directory / "golden" / "user.arrow").write_bytes(b"")
    with pytest.raises(BundleError, match=r"golden/user\.arrow was changed"):
        Bundle.load(directory)
