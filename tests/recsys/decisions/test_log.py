# SPDX-License-Identifier: Apache-2.0
"""The decision log: what is written of whom, what is dropped and counted, and what a process that dies leaves."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core import part_log
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.hashing import is_sampled
from recsys.decisions.decision import CANDIDATES, Decision, Evidence, shown_of
from recsys.decisions.log import DecisionLog
from recsys.decisions.parts import read_decisions
from recsys.inference.request import Response, Scored
from tests.recsys.decisions.simulation import decision, log_decisions, simulate


def with_evidence(request: int, user: str = "u") -> Decision:
    random = np.random.default_rng(request)
    numbers = {name: random.standard_normal(3).astype(np.float32) for name in ("log_probability", "probability", "score")}
    # A slice, with nulls, lists, an empty list and numbers that are none: all of it must come back.
    user_row = pa.table({"user_id": ["?", user], "mean": [0.0, float("nan")], "history": [None, ["a", None]], "n": [1, None]}).slice(1)
    items = pa.table({"item_id": ["a", "b", "c"], "item_mean": [1 / 3, None, -0.0], "item_mean__status": pa.array([0, 1, 0], pa.uint8())})
    evidence = Evidence(pa.table({"item_id": ["a", "b", "c"], **numbers}, schema=CANDIDATES), 5, user_row, items, pa.array(["z", "y"]))
    return decision(request, request, user, ["b", "a"], evidence=evidence, flags=("new_user",), version=None)


def same(one: Decision, other: Decision) -> bool:
    assert one.shown.equals(other.shown) and one.flags == other.flags and one.time == other.time
    for name in ("request_id", "user_id", "k", "kind", "explain", "model", "bundle", "version", "feature_versions"):
        assert getattr(one, name) == getattr(other, name), name
    if one.evidence is None or other.evidence is None:
        return one.evidence is other.evidence
    mine, theirs = one.evidence, other.evidence
    for name in ("log_probability", "probability", "score"):
        bits = (np.asarray(each.candidates.column(name)).view(np.uint32) for each in (mine, theirs))
        assert np.array_equal(*bits), name
    assert mine.wanted == theirs.wanted and mine.candidates.equals(theirs.candidates)
    for here, there in ((mine.user, theirs.user), (mine.items, theirs.items)):
        assert (here is None) == (there is None)
        if here is not None and there is not None:
            assert here.schema.equals(there.schema) and repr(here.to_pylist()) == repr(there.to_pylist())
    return (mine.seen is None and theirs.seen is None) or bool(mine.seen.equals(theirs.seen))


def test_decisions_come_back_as_they_were(tmp_path: Path) -> None:
    given = [with_evidence(1), decision(2, 2, "ü", []), with_evidence(3), decision(4, 4, "u", ["x"], 0.25)]
    without = Evidence(given[0].evidence.candidates, 3, None, None, None)
    given.append(decision(5, 5, "u", ["x"], evidence=without))
    log_decisions(tmp_path, given[:2], share=1.0)
    log_decisions(tmp_path, given[2:], share=1.0)
    assert len(list(tmp_path.iterdir())) == 2
    back = list(read_decisions(tmp_path))
    assert len(back) == 5 and all(same(one, other) for one, other in zip(given, back, strict=True))


def test_what_was_shown_is_always_kept_and_evidence_of_a_share(tmp_path: Path) -> None:
    given = [with_evidence(n) for n in range(400)]
    log_decisions(tmp_path, given, share=0.25)
    back = {each.request_id: each for each in read_decisions(tmp_path)}
    kept = {name for name, each in back.items() if each.evidence is not None}
    assert len(back) == 400 and all(back[each.request_id].shown.equals(each.shown) for each in given)
    assert kept == {each.request_id for each in given if is_sampled(each.request_id, 0.25)}
    assert 60 < len(kept) < 140
    log = DecisionLog(tmp_path / "other", share=0.25)
    assert [name for name in sorted(back) if log.keeps_evidence(name)] == sorted(kept)
    log.close()


def test_a_full_log_drops_and_counts_and_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = threading.Event(), threading.Event()
    original = part_log.write_bytes

    def slow(path: Path, content: bytes) -> None:
        writing.set()
        assert go_on.wait(30)
        original(path, content)

    monkeypatch.setattr(part_log, "write_bytes", slow)
    log = DecisionLog(tmp_path, capacity=3, flush_rows=1)
    log.offer(decision(0, 0, "u", ["x"]))
    assert writing.wait(30)
    taken = [log.offer(decision(n, n, "u", ["x"])) for n in range(1, 8)]  # while the disk is busy
    assert taken == [True] * 3 + [False] * 4 and (log.written, log.dropped) == (0, 4)
    go_on.set()
    log.close()
    assert (log.written, log.dropped) == (4, 4)
    assert [each.request_id for each in read_decisions(tmp_path)] == ["r0", "r1", "r2", "r3"]
    assert not log.offer(decision(9, 9, "u", ["x"])) and log.dropped == 5


def test_a_part_is_written_after_its_seconds(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path, flush_seconds=0.05)
    log.offer(decision(0, 0, "u", ["x"]))
    waited = threading.Event()
    for _ in range(200):
        if log.written:
            break
        waited.wait(0.05)
    assert log.written == 1 and len(list(read_decisions(tmp_path))) == 1
    log.close()


def test_a_disk_that_fails_costs_decisions_not_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    log = DecisionLog(tmp_path / "file")
    assert log.offer(decision(0, 0, "who-asked", ["x"]))
    log.close()
    assert (log.written, log.dropped) == (0, 1)
    assert "decision log: 1 rows could not be written" in caplog.text and "who-asked" not in caplog.text


CHILD = """
import sys
from pathlib import Path
from recsys.core import part_log, files
from recsys.decisions.log import DecisionLog
from tests.recsys.decisions.simulation import simulate

folder, written = Path(sys.argv[1]), 0
def half(path, content):
    global written
    written += 1
    if written < 3:
        return files.write_bytes(path, content)
    with files.new_file(path) as temporary:
        temporary.write_bytes(content[: len(content) // 2])
        print("stopped", flush=True)
        sys.stdin.read()
part_log.write_bytes = half
log = DecisionLog(folder, flush_rows=10)
for each in simulate(0).decisions:
    while not log.offer(each):
        pass
    if log.written + 10 <= int(each.request_id[1:]):
        import time; time.sleep(0.01)
log.close()
"""


def test_what_a_process_that_dies_leaves_is_whole(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "stopped\n"
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3 and sum(name.startswith(".part-") and name.endswith(".tmp") for name in names) == 1
    back = [each.request_id for each in read_decisions(tmp_path)]
    assert len(back) >= 20 and back == [each.request_id for each in simulate(0).decisions[: len(back)]]


def test_damaged_foreign_and_later_parts_are_named(tmp_path: Path) -> None:
    log_decisions(tmp_path, [with_evidence(1)], share=1.0)
    (part,) = tmp_path.iterdir()
    whole, table = part.read_bytes(), pq.read_table(part)
    for content in (whole[:-10], b"", b"PAR1" + bytes(40) + b"PAR1"):
        part.write_bytes(content)
        with pytest.raises(DataError, match=f"decision part {part}: not a whole Parquet file"):
            list(read_decisions(tmp_path))
    pq.write_table(table.replace_schema_metadata({b"recsys.decisions": b"2"}), part)
    with pytest.raises(DataError, match=r"expected the metadata recsys\.decisions = 1, got b'2'"):
        list(read_decisions(tmp_path))
    pq.write_table(table.drop_columns(["flags"]), part)
    with pytest.raises(SchemaError, match="missing column: expected 'flags' among"):
        list(read_decisions(tmp_path))
    pq.write_table(table.set_column(3, "k", pa.array(["5"])), part)
    with pytest.raises(SchemaError, match="column 'k': expected int32, got string"):
        list(read_decisions(tmp_path))


def test_what_a_log_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"share: expected a number between 0 and 1, got 1\.5"):
        DecisionLog(tmp_path, share=1.5)
    with pytest.raises(ConfigError, match="capacity and flush_rows of at least 1, got 0 and 1000"):
        DecisionLog(tmp_path, capacity=0)


def test_propensities_are_those_of_the_places() -> None:
    response = Response("u", tuple(Scored(item, 0.5, -1.0, 0.25) for item in "ab"), "sha")
    assert shown_of(response).column("propensity").to_pylist() == [1.0, 1.0]
    assert shown_of(response, [0.5, 0.125]).to_pylist()[1] == {
        "item_id": "b",
        "position": 2,
        "log_probability": -1.0,
        "probability": 0.25,
        "score": 0.5,
        "propensity": 0.125,
    }
    for wrong in ([0.5], [0.5, 0.0], [0.5, 1.5]):
        with pytest.raises(DataError, match="propensities: expected one above 0 and up to 1 for each of the 2 shown items"):
            shown_of(response, wrong)
