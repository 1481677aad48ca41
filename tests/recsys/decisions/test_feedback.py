# SPDX-License-Identifier: Apache-2.0
"""Every served impression comes out once, with its label, whatever the order and number of events, and whenever the job is killed."""

import os
import random
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.files import exclusive
from recsys.decisions import feedback as job
from recsys.decisions.feedback import FeedbackReport, increments, join_decisions
from recsys.decisions.impressions import read_feedback
from tests.recsys.decisions.simulation import WINDOW, at, decision, emitted, event, labels_of, log_decisions, simulate, write_events

LATER = at(10**6)


def join(folder: Path, *files: Path, until: datetime | None = LATER, window: int = WINDOW, out: str = "out") -> FeedbackReport:
    return join_decisions(folder / "decisions", files, folder / out, window=window, until=until)


def apart(folder: Path) -> list[tuple[str, str, str]]:
    """Request, item and reason of the events that are in no label."""
    rows = [row for increment in increments(folder / "out") for row in pq.read_table(increment / "_apart.parquet").to_pylist()]
    return sorted((row["request_id"], row["item_id"], row["reason"]) for row in rows)


def test_one_run_emits_everything(tmp_path: Path) -> None:
    world = simulate(0)
    log_decisions(tmp_path / "decisions", world.decisions)
    report = join(tmp_path, write_events(tmp_path / "events.parquet", world.events))
    impressions = emitted(tmp_path / "out")
    assert labels_of(impressions) == world.labels
    assert {0.0, 1.0, 2.0} == set(world.labels.values())
    inside = [e for e in world.events if _within(e, world)]
    assert report.counts["impressions"] == len(world.labels) and report.counts["events"] == len(inside)
    assert report.counts["after_window"] == len(world.events) - len(inside) > 0
    assert report.counts["positives"] == sum(label > 0 for label in world.labels.values())
    first = next(row for row in impressions.to_pylist() if row["request_id"] == "r3")
    assert (first["event_time"], first["available_time"]) == (at(180), at(180 + WINDOW))
    assert first["user_id"] == world.decisions[3].user_id and first["propensity"] == pytest.approx(1 / 12)
    assert pq.read_table(increments(tmp_path / "out")[0] / "_events.parquet").num_rows == len(inside)


def _within(one: dict[str, Any], world: Any) -> bool:
    shown = world.decisions[int(one["request_id"][1:])].time
    return one["event_time"] <= shown + timedelta(seconds=WINDOW)


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_order_and_duplication_gives_the_same(tmp_path: Path, seed: int) -> None:
    """Parts and files come when they come, several times, in any order; but all of a window is there when it is said to be complete."""
    world, rng = simulate(seed), random.Random(seed)
    end = 120 * 60 + 3 * WINDOW
    untils = [*sorted(rng.sample(range(60, end, 60), 5)), end]
    files: list[Path] = []
    logged, told = 0, 0
    events = sorted(world.events, key=lambda each: each["event_time"])
    for number, until in enumerate(untils):
        ahead = until + rng.choice([0, 600])
        decided = [each for each in world.decisions if each.time <= at(ahead)]
        fresh = decided[logged:]
        rng.shuffle(fresh)
        if fresh:
            log_decisions(tmp_path / "decisions", fresh, flush_rows=rng.choice([3, 1000]))
        logged = len(decided)
        known = [each for each in events if each["event_time"] <= at(ahead)]
        delivery = known[told:] + rng.choices(known, k=min(len(known), 20))
        told = len(known)
        rng.shuffle(delivery)
        files.append(write_events(tmp_path / f"{rng.random()}.parquet", delivery))
        given = rng.sample(files, len(files))
        join(tmp_path, *given, until=at(until))
        if number == 2:
            join(tmp_path, *given, until=at(until))
    found = labels_of(emitted(tmp_path / "out"))
    assert found == world.labels
    reasons = [reason for *_, reason in apart(tmp_path)]
    outside = [each for each in world.events if not _within(each, world)]
    assert len(reasons) == len(outside) and set(reasons) <= {"after_window"}


def test_a_run_with_nothing_new_adds_nothing(tmp_path: Path) -> None:
    world = simulate(1)
    log_decisions(tmp_path / "decisions", world.decisions)
    file = write_events(tmp_path / "events.parquet", world.events)
    assert join(tmp_path, file).increment == tmp_path / "out" / "increment-000001"
    before = content(tmp_path / "out")
    again = join(tmp_path, file)
    assert again.increment is None and again.counts["impressions"] == 0
    assert content(tmp_path / "out") == before
    # The same events in another file are known, so that they are neither late nor counted again.
    report = join(tmp_path, write_events(tmp_path / "copy.parquet", world.events))
    assert report.counts["repeated"] == len(world.events) and not any(report.counts[name] for name in ("impressions", "after_emission"))
    assert labels_of(emitted(tmp_path / "out")) == world.labels


def test_why_an_event_is_in_no_label(tmp_path: Path) -> None:
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x", "y"]), decision(2, 9000, "b", ["x"])])
    given = [
        event(1, "x", 999),  # before its request
        event(1, "x", 1000),  # at it
        event(1, "y", 1001 + WINDOW),  # after the window
        event(1, "z", 1500),  # not shown
        event("r77", "x", 1500),  # nobody's
    ]
    report = join(tmp_path, write_events(tmp_path / "1.parquet", given), until=at(2000))
    # Nothing is closed: what may still find its decision waits.
    assert report.counts["impressions"] == 0 and report.counts["pending"] == 2
    report = join(tmp_path, until=at(1000 + WINDOW))
    assert (report.counts["impressions"], report.counts["positives"], report.counts["pending"]) == (2, 1, 1)
    late = [event(1, "y", 1200), event(1, "x", 1000)]  # after its impression was emitted; and one that was in it
    report = join(tmp_path, write_events(tmp_path / "2.parquet", late), until=at(1500 + WINDOW))
    assert (report.counts["after_emission"], report.counts["repeated"]) == (1, 1)
    assert apart(tmp_path) == [
        ("r1", "x", "before_request"),
        ("r1", "y", "after_emission"),
        ("r1", "y", "after_window"),
        ("r1", "z", "unknown_item"),
        ("r77", "x", "unknown_request"),
    ]
    join(tmp_path, write_events(tmp_path / "3.parquet", [*given, *late]))
    assert len(apart(tmp_path)) == 5
    assert labels_of(emitted(tmp_path / "out")) == {("r1", "x", 1): 1.0, ("r1", "y", 2): 0.0, ("r2", "x", 1): 0.0}


def test_feedback_may_come_before_its_decision(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    assert join(tmp_path, write_events(tmp_path / "1.parquet", [event(1, "x", 1010)]), until=at(1100)).counts["pending"] == 1
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x"])])
    assert join(tmp_path).counts["positives"] == 1
    assert labels_of(emitted(tmp_path / "out")) == {("r1", "x", 1): 1.0}


def test_a_request_id_that_is_used_again(tmp_path: Path) -> None:
    """Both lists were shown; an event is of the later one that was before it."""
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x"]), decision(1, 2000, "a", ["y", "x"])])
    join(tmp_path, write_events(tmp_path / "1.parquet", [event(1, "x", 1500), event(1, "y", 2500)]))
    rows = {(row["event_time"], row["item_id"]): row["label"] for row in emitted(tmp_path / "out").to_pylist()}
    assert rows == {(at(1000), "x"): 1.0, (at(2000), "y"): 1.0, (at(2000), "x"): 0.0}


def test_an_item_that_a_list_shows_twice_is_clicked_once(tmp_path: Path) -> None:
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x", "y", "x"])])
    join(tmp_path, write_events(tmp_path / "1.parquet", [event(1, "x", 1001)]))
    assert labels_of(emitted(tmp_path / "out")) == {("r1", "x", 1): 1.0, ("r1", "y", 2): 0.0, ("r1", "x", 3): 0.0}


def test_parts_that_were_removed_too_early_are_counted(tmp_path: Path) -> None:
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x"])])
    file = write_events(tmp_path / "1.parquet", [])
    join(tmp_path, file, until=at(1500))
    for part in (tmp_path / "decisions").iterdir():
        part.unlink()
    assert join(tmp_path, file).counts["lost_parts"] == 1
    assert join(tmp_path, file).increment is None


# --- killed


CHILD = """
import sys
from datetime import datetime
from pathlib import Path
from recsys.decisions import feedback as job

folder, out, until, point = Path(sys.argv[1]), sys.argv[2], datetime.fromisoformat(sys.argv[3]), sys.argv[4]

def stop(at):
    if at == point:
        print("stopped", flush=True)
        sys.stdin.read()

write_table, write_json = job.write_table, job.write_json
def table(path, content):
    write_table(path, content)
    stop(path.name)
def manifest(path, content):
    if path.name == job.MANIFEST:
        stop("before the manifest")
    write_json(path, content)
    if path.name == job.MANIFEST:
        stop("before the commit")
job.write_table, job.write_json = table, manifest
job.join_decisions(folder / "decisions", sorted(folder.glob("*.parquet")), folder / out, window=int(sys.argv[5]), until=until)
stop("after the commit")
"""


def killed(folder: Path, out: str, until: datetime, point: str) -> None:
    """A process that joins and stands at ``point``, until it is killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", CHILD, str(folder), out, until.isoformat(), point, str(WINDOW)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any(line == "stopped\n" for line in iter(process.stdout.readline, "")), "the process ended before the point"
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_anywhere_and_run_again_gives_the_same_files(tmp_path: Path) -> None:
    world = simulate(2)
    log_decisions(tmp_path / "decisions", world.decisions)
    files = [write_events(tmp_path / f"{n}.parquet", world.events[n::3]) for n in range(3)]
    untils = [at(80 * 60), at(2 * WINDOW + 77), LATER]
    for until in untils:
        join(tmp_path, *files, until=until, out="whole")
    points = iter(["impressions.parquet", "_pending.parquet", "before the manifest", "before the commit", "after the commit"])
    for until in untils:
        for _ in range(2):
            point = next(points, None)
            if point is not None:
                killed(tmp_path, "out", until, point)
        join(tmp_path, *files, until=until)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(increments(tmp_path / "out")) == 3
    assert labels_of(emitted(tmp_path / "out")) == world.labels


def test_what_a_killed_run_left_is_never_read(tmp_path: Path) -> None:
    world = simulate(3)
    log_decisions(tmp_path / "decisions", world.decisions)
    file = write_events(tmp_path / "events.parquet", world.events)
    killed(tmp_path, "out", LATER, "before the commit")
    assert emitted(tmp_path / "out").num_rows == 0 and increments(tmp_path / "out") == []
    join(tmp_path, file)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["_schema.yaml", "increment-000001"]


def test_a_run_without_a_time_takes_that_of_the_one_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x"])])

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "new_directory", die)
        with pytest.raises(KeyboardInterrupt):
            join(tmp_path, until=None)
    begun = (tmp_path / "out" / ".begun.json").read_text()
    report = join(tmp_path, until=None)
    assert report.until.isoformat() in begun and report.counts["impressions"] == 1
    assert not (tmp_path / "out" / ".begun.json").exists()
    assert join(tmp_path, until=None).until > report.until


# --- what is refused


def test_what_the_job_refuses(tmp_path: Path) -> None:
    log_decisions(tmp_path / "decisions", [decision(1, 1000, "a", ["x"])])
    join(tmp_path)
    with pytest.raises(ConfigError, match="window: expected 3600 as in the earlier runs, got 60"):
        join(tmp_path, window=60)
    with pytest.raises(ConfigError, match="window: expected at least 1 second, got 0"):
        join(tmp_path, window=0)
    with pytest.raises(ConfigError, match="until: expected a time with an offset from UTC"):
        join(tmp_path, until=datetime(2024, 1, 1))
    with exclusive(tmp_path / "out", "x"), pytest.raises(DataError, match="another run is joining feedback at this moment"):
        join(tmp_path)
    (manifest,) = (tmp_path / "out").glob("*/_manifest.json")
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="format: expected 1, got 9"):
        join(tmp_path)


def test_feedback_files(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text('request_id,item_id,event_time\nr1,007,"2024-01-01T00:20:00Z"\n,x,2024-01-01\nr1,x,\n')
    with pytest.raises(DataError, match="expected a column 'kind' or 'label', got request_id, item_id, event_time"):
        read_feedback(path)
    path.write_text("request_id,item_id,event_time,kind\nr1,007,2024-01-01T00:20:00Z,buy\n,x,2024-01-01,buy\nr1,x,,buy\n")
    frame, incomplete = read_feedback(path)
    assert frame.rows() == [("r1", "007", at(1200), "buy", 1.0)] and incomplete == 2
    path.write_text("request_id,item_id,event_time,label\nr1,x,2024-01-01T00:20:00+01:00,0.5\nr1,y,2024-01-01,nan\n")
    frame, incomplete = read_feedback(path)
    assert frame.rows() == [("r1", "x", at(1200 - 3600), "click", 0.5)] and incomplete == 1
    path.write_text("request,item_id,event_time,label\nr1,x,2024-01-01T00:20:00Z,1\n")
    with pytest.raises(SchemaError, match="request_id"):
        read_feedback(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_feedback(tmp_path / "absent.parquet")
