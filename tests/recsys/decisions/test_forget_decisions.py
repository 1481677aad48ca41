# SPDX-License-Identifier: Apache-2.0
"""A user goes from a decision log and from impressions; the job goes on for everybody else as if nothing had been."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recsys.core.errors import DataError
from recsys.core.files import exclusive
from recsys.decisions.feedback import increments, join_decisions
from recsys.decisions.forget import forget_decisions, forget_impressions
from recsys.decisions.parts import read_decisions
from tests.recsys.decisions.simulation import WINDOW, at, emitted, labels_of, log_decisions, simulate, write_events
from tests.recsys.decisions.test_log import with_evidence

USER = "user 3"


def test_the_parts_hold_everybody_else(tmp_path: Path) -> None:
    given = [with_evidence(n, f"user {n % 5}") for n in range(60)]
    log_decisions(tmp_path, given, share=1.0)
    assert forget_decisions(tmp_path, USER) == 12
    assert [each.request_id for each in read_decisions(tmp_path)] == [each.request_id for each in given if each.user_id != USER]
    # Also inside what stands in a part as a stream of its own.
    assert all(USER not in each.evidence.user.column("user_id").to_pylist() for each in read_decisions(tmp_path))
    assert forget_decisions(tmp_path, USER) == 0


def test_a_damaged_part_is_named_before_anything_is_rewritten(tmp_path: Path) -> None:
    log_decisions(tmp_path, simulate(0).decisions)
    before = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    (tmp_path / "part-9.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"part-9\.parquet: not a whole Parquet file"):
        forget_decisions(tmp_path, USER)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_impressions_and_feedback_go_and_the_job_goes_on(tmp_path: Path) -> None:
    world, decisions, out = simulate(6, requests=400), tmp_path / "decisions", tmp_path / "out"
    log_decisions(decisions, world.decisions)
    half = at(240 * 60)
    files = [
        write_events(tmp_path / "1.parquet", [each for each in world.events if each["event_time"] <= half]),
        write_events(tmp_path / "2.parquet", [each for each in world.events if each["event_time"] > half]),
    ]
    join_decisions(decisions, files[:1], out, window=WINDOW, until=half)
    requests = {each.request_id for each in world.decisions if each.user_id == USER}
    held = {str(path): _requests(path) & requests for path in out.rglob("*.parquet")}
    assert {Path(path).name for path, found in held.items() if found} == {
        "impressions.parquet",
        "_events.parquet",
        "_pending.parquet",
        "_apart.parquet",
    }
    assert forget_impressions(out, decisions, USER) > 0
    assert forget_decisions(decisions, USER) == len(requests)
    assert not any(_requests(path) & requests for path in out.rglob("*.parquet"))
    assert forget_impressions(out, decisions, USER) == 0
    report = join_decisions(decisions, files, out, window=WINDOW, until=at(10**6))
    assert labels_of(emitted(out)) == {key: label for key, label in world.labels.items() if key[0] not in requests}
    assert report.counts["unknown_request"] == sum(each["request_id"] in requests for each in world.events if each["event_time"] > half)
    assert len(increments(out)) == 2
    with exclusive(out, "x"), pytest.raises(DataError, match="a run is joining feedback at this moment"):
        forget_impressions(out, decisions, USER)


def _requests(path: Path) -> set[str]:
    return set(pq.ParquetFile(path).read(["request_id"]).column("request_id").to_pylist())
