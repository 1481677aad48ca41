# SPDX-License-Identifier: Apache-2.0
"""SV-15, EV-7: a recorded decision comes out to the bit with the bundle that made it; whatever was changed is found and named."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.core.errors import DataError
from recsys.core.schema import TIME
from recsys.decisions.decision import Decision, decision_of, evidence_of
from recsys.decisions.parts import read_decisions
from recsys.decisions.recorded import recorded_features
from recsys.decisions.replay import replay
from recsys.inference.recommender import Recommender
from recsys.inference.recorded import RecordedReader
from recsys.inference.request import Request
from recsys.registry import Location
from tests.recsys.decisions.simulation import decision, log_decisions

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def recommender(tiny_run) -> Recommender:
    bundle = Bundle.load(tiny_run.directory / "bundle")
    store = SQLiteStore.open(Location.under(tiny_run.home).online_store(bundle.manifest.feature_versions))
    return Recommender(bundle, OnlineReader(parse(FeatureRepo, bundle.features, source="features.json"), store))


def recommend(recommender: Recommender, requests: list[Request]) -> list[Decision]:
    """Answered in one batch."""
    users = recommender.users([each.user_id for each in requests], pa.array([each.at for each in requests], TIME))
    ranked = recommender.rank(users, recommender.retrieve(users, recommender.wanted(requests)))
    return [
        decision_of(
            recommender,
            request,
            recommender.respond(request, b, users, ranked),
            evidence_of(recommender, users, ranked, b, kind="recommend"),
            request_id=f"{request.user_id}-{request.k}",
            kind="recommend",
            version=1,
        )
        for b, request in enumerate(requests)
    ]


def rank(recommender: Recommender, request: Request, items: list[str]) -> Decision:
    users = recommender.users([request.user_id], pa.array([request.at], TIME))
    ranked = recommender.rank(users, recommender.score(users, recommender.view.rows(items)[None]))
    response, evidence = recommender.respond(request, 0, users, ranked), evidence_of(recommender, users, ranked, 0, kind="rank")
    assert response == recommender.rank_items(request, items)
    return decision_of(recommender, request, response, evidence, request_id=f"rank {request.user_id}", kind="rank")


@pytest.fixture(scope="module")
def decisions(recommender: Recommender) -> list[Decision]:
    requests = [Request(user, k, NOW + timedelta(hours=n)) for n, (user, k) in enumerate([(str(u), 5 + u % 7) for u in range(0, 150, 9)])]
    requests.append(Request("never seen", 10, NOW))
    made = [recommend(recommender, [request])[0] for request in requests]
    return [*made, *(rank(recommender, request, ["3", "40", "77", "5"]) for request in requests[:5])]


def test_the_bundle_of_the_record_gives_the_same_bits(recommender: Recommender, decisions: list[Decision], tmp_path: Path) -> None:
    log_decisions(tmp_path, decisions, share=1.0)
    report = replay(recommender.bundle, read_decisions(tmp_path))
    assert report.decisions == report.own == report.exact == len(decisions)
    assert report.largest == {"log_probability": 0.0, "probability": 0.0, "score": 0.0} and report.largest_difference == 0
    assert (report.reordered, report.overlap, report.score_drift, report.score_shift, report.worst) == (0, 1.0, 0.0, 0.0, None)
    assert report.rows == sum(each.evidence.candidates.num_rows for each in decisions) and not report.skipped


def test_a_batch_comes_out_up_to_rounding(recommender: Recommender) -> None:
    requests = [Request(str(user), 10, NOW) for user in range(1, 40, 3)]
    report = replay(recommender.bundle, recommend(recommender, requests))
    assert report.decisions == len(requests) and report.largest_difference < 1e-5 and report.overlap == 1.0


def test_features_come_from_the_record_alone(recommender: Recommender, decisions: list[Decision]) -> None:
    """What the bundle now computes follows the features that were written down, and no store is asked."""
    given = decisions[2]
    status, name = "user_mean__status", "user_mean"
    user = given.evidence.user
    other = user.set_column(user.schema.get_field_index(name), user.schema.field(name), [[user.column(name)[0].as_py() - 2.0]])
    report = replay(recommender.bundle, [replace(given, evidence=replace(given.evidence, user=other))])
    assert report.largest["probability"] > 0 and report.largest["log_probability"] == 0 and report.exact == 0
    assert report.worst == given.request_id
    assert status in user.column_names  # so that the status was served and recorded beside the value


def test_one_changed_number_is_found(recommender: Recommender, decisions: list[Decision]) -> None:
    changed = decisions[4].evidence.candidates.to_pylist()
    changed[1]["probability"] = float(np.float32(changed[1]["probability"] + 0.125))
    candidates = pa.Table.from_pylist(changed, schema=decisions[4].evidence.candidates.schema)
    given = [*decisions[:4], replace(decisions[4], evidence=replace(decisions[4].evidence, candidates=candidates)), *decisions[5:]]
    report = replay(recommender.bundle, given)
    assert report.largest == {"log_probability": 0.0, "probability": pytest.approx(0.125, abs=1e-6), "score": 0.0}
    assert (report.exact, report.worst) == (len(given) - 1, decisions[4].request_id)


def test_other_candidates_and_another_order_are_differences(recommender: Recommender, decisions: list[Decision]) -> None:
    given = decisions[3]
    fewer = replace(
        given, evidence=replace(given.evidence, candidates=given.evidence.candidates.slice(1), items=given.evidence.items.slice(1))
    )
    report = replay(recommender.bundle, [fewer])
    assert report.largest_difference == np.inf and report.as_json()["largest"]["score"] == "infinity"
    swapped = given.shown.take([1, 0, *range(2, given.k)])
    report = replay(recommender.bundle, [replace(given, shown=swapped)])
    assert (report.reordered, report.exact, report.largest_difference, report.overlap) == (1, 0, 0.0, 1.0)
    # A list that a policy drew at random need not be in the order of the scores.
    drawn = swapped.set_column(5, "propensity", pa.array([0.5] * given.k))
    assert replay(recommender.bundle, [replace(given, shown=drawn)]).exact == 1


def test_another_bundle_gives_its_opinion_of_the_same_candidates(recommender: Recommender, decisions: list[Decision]) -> None:
    """Another λ is another bundle whose scores are known: what changes is (λ' − λ) · log p."""
    bundle, moved = recommender.bundle, 0.75
    settings = bundle.settings.model_copy(update={"rank_weight": bundle.settings.rank_weight + moved})
    other = replace(bundle, settings=settings, manifest=bundle.manifest.model_copy(update={"seed": bundle.manifest.seed + 1}))
    report = replay(other, decisions)
    assert (report.decisions, report.own) == (len(decisions), 0)
    logs = np.concatenate([np.log(np.asarray(each.evidence.candidates.column("probability"), np.float64)) for each in decisions])
    assert report.score_drift == pytest.approx(moved * logs.mean(), abs=1e-4)
    assert report.score_shift == pytest.approx(-moved * logs.mean(), abs=1e-4)
    assert report.largest["score"] == pytest.approx(-moved * logs.min(), abs=1e-4)
    assert report.largest["probability"] < 1e-5 and 0.3 < report.overlap <= 1.0


def test_what_cannot_be_computed_again_is_counted(recommender: Recommender, decisions: list[Decision]) -> None:
    first = decisions[0]
    given = [
        first,
        replace(first, evidence=None),
        replace(first, evidence=replace(first.evidence, items=None)),
        replace(first, feature_versions={**first.feature_versions, "item": "another"}),
        decision(1, 0, "u", ["x"]),
    ]
    report = replay(recommender.bundle, given)
    assert report.decisions == 1 and report.skipped == {"not_ranked": 1, "not_recorded": 2, "other_features": 1}
    nothing = replay(recommender.bundle, [])
    assert (nothing.decisions, nothing.overlap, nothing.score_drift, nothing.largest_difference) == (0, None, None, 0.0)


def test_the_recorded_reader_is_a_feature_reader(recommender: Recommender, decisions: list[Decision]) -> None:
    given, reader, seen_feature = decisions[1], RecordedReader(), recommender.bundle.settings.seen_feature
    with pytest.raises(DataError, match="service 'user': recorded are none"):
        reader.read("user", pa.table({"user_id": ["1"]}))
    reader.show(recorded_features(given, seen_feature))
    ids = given.evidence.candidates.column("item_id").to_pylist()
    spine = pa.table({"item_id": ["no such item", ids[2], ids[0]], "request_time": pa.array([given.time] * 3, TIME), "kept": [1, 2, 3]})
    read = reader.read("item", spine)
    assert read.select(spine.column_names).equals(spine)
    assert read.column("item_events__status").to_pylist()[0] == 2 and read.column("item_events")[0].as_py() is None
    served = recommender.features.read("item", spine)
    assert read.slice(1).select(served.column_names).equals(served.slice(1).cast(read.select(served.column_names).schema))
    seen = reader.read("seen", pa.table({"user_id": [given.user_id]})).column(seen_feature)[0].as_py()
    assert set(seen) and set(seen).isdisjoint(ids) and pc.count_distinct(pa.array(seen)).as_py() == len(seen)
    with pytest.raises(DataError, match="the features that were served were not recorded"):
        recorded_features(decision(1, 0, "u", ["x"]), seen_feature)
