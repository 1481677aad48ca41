# SPDX-License-Identifier: Apache-2.0
"""The one path from a request to a list, on a bundle that the whole road made."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from feature_store.online import OnlineReader, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.core.status import status_column
from recsys.data.datasets.synthetic import Synthetic
from recsys.inference import frame, rules
from recsys.inference.explain import erasure_effects
from recsys.inference.features import FeatureReader
from recsys.inference.recommender import Recommender
from recsys.inference.request import InvalidRequest, Request
from recsys.ranking.calibration import NoCalibration, Platt
from recsys.registry import Location

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def bundle(tiny_run) -> Bundle:
    return Bundle.load(tiny_run.directory / "bundle")


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    dataset = Synthetic(Synthetic.Config()).load()
    return {"interactions": dataset.interactions, "items": dataset.items, "users": dataset.users}


@pytest.fixture(scope="module")
def offline(bundle: Bundle, tables: dict[str, pa.Table]) -> Recommender:
    return Recommender(bundle, OfflineReader(parse(FeatureRepo, bundle.features, source="features.json"), tables))


@pytest.fixture(scope="module")
def online(bundle: Bundle, tiny_run) -> Recommender:
    store = SQLiteStore.open(Location.under(tiny_run.home).online_store(bundle.manifest.feature_versions))
    return Recommender(bundle, OnlineReader(parse(FeatureRepo, bundle.features, source="features.json"), store))


def ask(user: str, k: int = 5, **more) -> Request:
    return Request(user_id=user, k=k, at=NOW, **more)


def test_offline_and_online_lists_are_equal(offline: Recommender, online: Recommender) -> None:
    requests = [ask(str(user), explain=True) for user in range(0, 150, 10)] + [ask("never seen")]
    for one, two in zip(offline.recommend(requests), online.recommend(requests), strict=True):
        assert [item.item_id for item in one.items] == [item.item_id for item in two.items]
        np.testing.assert_allclose([i.score for i in one.items], [i.score for i in two.items], atol=1e-5)
        assert [[r.item_id for r in i.reasons] for i in one.items] == [[r.item_id for r in i.reasons] for i in two.items]


def test_a_list_does_not_depend_on_the_rest_of_the_batch(offline: Recommender) -> None:
    alone = offline.recommend([ask("3")])[0]
    among = offline.recommend([ask("100"), ask("3", k=5), ask("nobody")])[1]
    assert [i.item_id for i in alone.items] == [i.item_id for i in among.items]
    np.testing.assert_allclose([i.score for i in alone.items], [i.score for i in among.items], atol=1e-5)


def test_what_was_seen_is_not_recommended_and_all_else_can_be(offline: Recommender, tables: dict[str, pa.Table]) -> None:
    (response,) = offline.recommend([ask("7", k=1000)])
    events = tables["interactions"].filter(pa.compute.equal(tables["interactions"]["user_id"], "7"))
    seen = set(events["item_id"].to_pylist())
    listed = [item.item_id for item in response.items]
    assert len(listed) == len(set(listed)) == 100 - len(seen)
    assert seen.isdisjoint(listed)
    assert response.flags == ("short_list",)


def test_the_score_is_what_the_rules_say(offline: Recommender) -> None:
    weight = offline.bundle.settings.rank_weight
    for item in offline.recommend([ask("5", k=8)])[0].items:
        assert item.score == pytest.approx(item.log_probability + weight * np.log(item.probability), abs=1e-5)


def test_the_probability_is_the_calibrated_one_offline_and_online(offline: Recommender, online: Recommender) -> None:
    bundle, at, rows = offline.bundle, pa.array([NOW], pa.timestamp("us", tz="UTC")), np.arange(100)[None]

    def probability(recommender: Recommender) -> np.ndarray:
        users = recommender.users(["5"], at)
        return recommender.rank(users, recommender.score(users, rows)).probability[0]

    fitted, served = bundle.calibration, probability(online)
    assert isinstance(fitted, Platt) and (fitted.slope, fitted.intercept) != (1.0, 0.0)
    np.testing.assert_allclose(probability(offline), served, atol=1e-6)
    try:
        bundle.calibration = NoCalibration(NoCalibration.Config())
        raw = probability(offline)
    finally:
        bundle.calibration = fitted
    np.testing.assert_allclose(served, fitted.apply(raw), atol=1e-6)
    assert np.abs(served - raw).max() > 1e-3
    np.testing.assert_array_equal(np.argsort(served, kind="stable"), np.argsort(raw, kind="stable"))


def test_log_probabilities_are_normalised_over_the_live_catalogue(offline: Recommender) -> None:
    users = offline.users(["5"], pa.array([NOW], pa.timestamp("us", tz="UTC")))
    everything = offline.score(users, np.arange(100)[None])
    assert np.exp(everything.log_probability).sum() == pytest.approx(1, abs=1e-4)


def test_only_events_before_the_request_count(offline: Recommender, tables: dict[str, pa.Table]) -> None:
    first = min(tables["interactions"]["event_time"].to_pylist())
    before = Request(user_id="7", k=5, at=first.replace(year=first.year - 1))
    unknown = Request(user_id="nobody", k=5, at=before.at)
    assert "new_user" in offline.recommend([before])[0].flags
    one, two = offline.recommend([before, unknown])
    assert [i.log_probability for i in one.items] == pytest.approx([i.log_probability for i in two.items], abs=1e-5)


def test_a_new_user_gets_a_list(online: Recommender) -> None:
    (response,) = online.recommend([ask("brand new", explain=True)])
    assert len(response.items) == 5
    assert response.flags == ("new_user",)
    assert all(item.reasons == () for item in response.items)


def test_given_items_are_ranked_with_the_scores_that_a_list_has(online: Recommender) -> None:
    (listed,) = online.recommend([ask("9", k=6)])
    scores = {item.item_id: item.score for item in listed.items}
    ranked = online.rank_items(ask("9", k=6), list(reversed(list(scores))))
    assert [item.item_id for item in ranked.items] == list(scores)
    assert [item.score for item in ranked.items] == pytest.approx(list(scores.values()), abs=1e-5)
    with pytest.raises(InvalidRequest, match="item_ids: 'x' is not in the catalogue"):
        online.rank_items(ask("9"), ["1", "x"])


def test_erasing_an_event_is_what_the_event_store_without_it_would_give(bundle: Bundle, tables: dict[str, pa.Table]) -> None:
    """The retriever's part of the effect is exact: it reads nothing but the list."""
    repo = parse(FeatureRepo, bundle.features, source="features.json")
    whole = Recommender(bundle, OfflineReader(repo, tables))
    events = tables["interactions"]
    mine = np.flatnonzero(np.asarray(pa.compute.equal(events["user_id"], "11")))
    at = pa.array([NOW], pa.timestamp("us", tz="UTC"))
    rows = np.array([[3, 40, 77]])
    settings = bundle.settings
    bundle.settings = settings.model_copy(update={"rank_weight": 0.0})
    try:
        users = whole.users(["11"], at)
        effects = erasure_effects(whole, users, 0, rows[0])
        full = whole.score(users, rows).log_probability
        for place in (0, len(mine) // 2, len(mine) - 1):
            kept = np.delete(np.arange(events.num_rows), mine[place])
            without = Recommender(bundle, OfflineReader(repo, tables | {"interactions": events.take(pa.array(kept))}))
            fallen = full - without.score(without.users(["11"], at), rows).log_probability
            np.testing.assert_allclose(effects[place], fallen[0], atol=1e-4)
    finally:
        bundle.settings = settings


def test_reasons_are_events_of_the_history_strongest_first(online: Recommender) -> None:
    (response,) = online.recommend([ask("20", explain=True)])
    history = online.users(["20"], pa.array([NOW], pa.timestamp("us", tz="UTC"))).table["history_item"][0].as_py()
    weights = [[reason.weight for reason in item.reasons] for item in response.items]
    assert any(weights)
    for item, values in zip(response.items, weights, strict=True):
        assert {reason.item_id for reason in item.reasons} <= set(history)
        assert values == sorted(values, reverse=True)
        assert all(value > 0 for value in values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k: expected 1 or more, got 0"),
        ({"user_id": ""}, "user_id: expected a non-empty string"),
        ({"at": datetime(2030, 1, 1)}, "at: expected a time with a time zone"),
    ],
)
def test_a_malformed_request_names_its_field(values: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Request(**({"user_id": "1", "k": 1, "at": NOW} | values))


def test_rules() -> None:
    score = np.array([0.5, -np.inf, 0.5, 2.0], np.float32)
    assert rules.top(score, np.array([9, -1, 4, 1]), 3).tolist() == [3, 2, 0]
    combined = rules.combine(np.array([-1.0]), np.array([0.5]), 2.0)
    assert combined == pytest.approx(-1 + 2 * np.log(0.5))
    assert np.isfinite(rules.combine(np.array([-1.0]), np.array([0.0]), 1.0)).all()


def test_a_bundle_loads_as_it_was_saved(bundle: Bundle, tiny_run, tmp_path: Path) -> None:
    manifest = bundle.save(tmp_path / "copy")
    assert manifest.files == bundle.manifest.files
    assert manifest.sha256 == bundle.manifest.sha256
    with pytest.raises(FileExistsError):
        bundle.save(tmp_path / "copy")


class Counting:
    """A feature reader that remembers what was asked for."""

    def __init__(self, reader: FeatureReader) -> None:
        self._reader = reader
        self.asked: list[tuple[str, int]] = []

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        self.asked.append((service, spine.num_rows))
        return self._reader.read(service, spine)


@pytest.mark.parametrize("which", ["offline", "online"])
def test_the_ranker_says_what_it_says_of_the_join_written_out(request: pytest.FixtureRequest, which: str) -> None:
    recommender = request.getfixturevalue(which)
    bundle, at = recommender.bundle, pa.array([NOW] * 4, pa.timestamp("us", tz="UTC"))
    users = recommender.users(["5", "nobody", "17", "100"], at)
    rows = np.arange(40).reshape(4, 10).copy()
    rows[2], rows[3, 4:] = -1, -1
    ranked = recommender.rank(users, recommender.score(users, rows))
    known = {*bundle.encoder.feature_columns, *map(status_column, bundle.encoder.feature_columns)}
    read = users.table.select([name for name in users.table.column_names if name in known])
    joined = frame.join(read, np.nonzero(rows >= 0)[0], ranked.items)
    expected = bundle.calibration.apply(bundle.ranker.predict(bundle.encoder.transform(joined))[:, 0].numpy())
    np.testing.assert_allclose(ranked.probability[rows >= 0], expected, rtol=0, atol=1e-6)
    assert (ranked.probability[rows < 0] == 0).all() and np.isneginf(ranked.score[rows < 0]).all()


def test_what_is_a_users_is_looked_up_once_for_a_request(offline: Recommender) -> None:
    counts: list[tuple[int, int]] = []
    hook = offline.bundle.ranker.tables.register_forward_pre_hook(
        lambda _, given: counts.append(
            (given[0].sequences["history_item"].values().numel(), given[0].sparse["user_gender"].values().numel())
        )
    )
    try:
        users = offline.users(["5", "17"], pa.array([NOW] * 2, pa.timestamp("us", tz="UTC")))
        offline.rank(users, offline.retrieve(users, 20))
    finally:
        hook.remove()
    assert counts == [(len(users.history.values), 2)]


def test_reasons_cost_no_more_reading_of_items(online: Recommender) -> None:
    reader = Counting(online.features)
    counting = Recommender(online.bundle, reader)
    (plain,), (explained,) = counting.recommend([ask("20", k=4)]), counting.recommend([ask("20", k=4, explain=True)])
    assert [service for service, _ in reader.asked] == ["seen", "user", "item"] * 2
    assert [item.item_id for item in explained.items] == [item.item_id for item in plain.items]


def test_effects_are_the_same_whether_items_are_given_or_read(online: Recommender) -> None:
    users = online.users(["20", "7"], pa.array([NOW] * 2, pa.timestamp("us", tz="UTC")))
    ranked = online.rank(users, online.retrieve(users, 20))
    places = np.array([3, 0, 11])
    rows = ranked.candidates.rows[1][places]
    given = erasure_effects(online, users, 1, rows, ranked.items_of(1, places))
    assert ranked.items_of(1, places)["item_id"].to_pylist() == online.view.take(rows).to_pylist()
    np.testing.assert_allclose(given, erasure_effects(online, users, 1, rows), rtol=0, atol=1e-6)
    assert np.abs(given).max() > 1e-3
