# SPDX-License-Identifier: Apache-2.0
"""The promotion log: compare-and-set, append-only, and able to tell where everything stood when. On SQLite and PostgreSQL."""

import hashlib
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from recsys.core.errors import RegistryError
from recsys.registry import Entry, Event, Location, PromotionLog
from recsys.registry.location import masked
from tests.recsys.registry.servers import PASSWORD

ROUNDS = 8


def entry(action: str, version: int, **details) -> Entry:
    return Entry(action, version, f"sha{version}", "r", details=details)


def promote(log: PromotionLog, version: int, expected: int | None) -> Event:
    """Through the gates."""
    return log.append("m", entry("validate", version), entry("promote", version), actor="a", expected=expected)[-1]


@pytest.fixture
def log(address: str) -> PromotionLog:
    return PromotionLog(address)


def test_the_state_of_every_moment_can_be_told(log: PromotionLog) -> None:
    start = datetime.now(UTC)
    first = promote(log, 1, None)
    log.append("m", entry("refuse", 2), actor="a")
    second = promote(log, 3, 1)
    log.append("m", entry("rollback", 1), actor="b", expected=3)
    assert log.champion_at("m", start - timedelta(seconds=1)) is None
    assert log.champion_at("m", first.time).to_version == 1
    assert log.champion_at("m", second.time).to_version == 3
    assert log.champion("m").to_version == 1
    assert [(e.action, e.actor, e.from_version, e.to_version, e.sha256) for e in log.events("m")] == [
        ("validate", "a", None, 1, "sha1"),
        ("promote", "a", None, 1, "sha1"),
        ("refuse", "a", 1, 2, "sha2"),
        ("validate", "a", 1, 3, "sha3"),
        ("promote", "a", 1, 3, "sha3"),
        ("rollback", "b", 3, 1, "sha1"),
    ]
    assert log.champion("another") is None


def test_previous_is_the_champion_before_this_one(log: PromotionLog) -> None:
    assert log.previous("m") is None
    promote(log, 1, None)
    assert log.previous("m") is None
    promote(log, 2, 1)
    log.append("m", entry("refuse", 9), actor="a")
    assert (log.previous("m").to_version, log.previous("m").sha256) == (1, "sha1")


def test_the_latest_id_grows_with_every_event_of_the_model_alone(log: PromotionLog) -> None:
    assert log.latest_id("m") == 0
    seen = [log.append("m", entry("register", version), actor="a")[0].id for version in (1, 2)]
    (other,) = log.append("other", entry("register", 1), actor="a")
    assert seen[0] < seen[1] == log.latest_id("m") < other.id == log.latest_id("other")


def test_details_and_gates_come_back_as_they_were(log: PromotionLog) -> None:
    gates = [{"gate": "auc", "passed": True, "value": 0.75}]
    details = {"percent": 5.0, "comparison": {"ndcg": {"low": -0.01}}}
    log.append("m", Entry("validate", 1, "sha1", 'it\'s "good"', gates, details), actor="a")
    (event,) = log.events("m")
    assert (event.gates, event.details, event.reason) == (gates, details, 'it\'s "good"')


def test_a_promotion_on_outdated_evidence_is_refused(log: PromotionLog) -> None:
    promote(log, 1, None)
    with pytest.raises(RegistryError, match="expected champion none, but it is 1: somebody promoted meanwhile"):
        promote(log, 2, None)
    latest = log.latest_id("m")
    with pytest.raises(RegistryError, match=f"expected event {latest - 1} to be the last, but there is {latest}"):
        log.append("m", entry("register", 5), actor="a", after=latest - 1)
    assert log.champion("m").to_version == 1
    assert len(log.events("m")) == 2


def test_entries_are_appended_all_or_none(log: PromotionLog) -> None:
    promote(log, 1, None)
    with pytest.raises(RegistryError, match="champion → champion is not legal"):
        log.append("m", entry("register", 2), entry("promote", 1), actor="a")
    assert [event.to_version for event in log.events("m")] == [1, 1]


CONTENDER = """
import sys
from recsys.core.errors import RegistryError
from recsys.registry import Entry, PromotionLog

log, offset = PromotionLog(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    champion = int(line)
    entries = [Entry(action, champion + offset, "sha", "r") for action in ("validate", "promote")]
    try:
        log.append("m", *entries, actor="a", expected=champion)
        print("won", flush=True)
    except RegistryError as error:
        print("lost" if "somebody promoted meanwhile" in str(error) else error, flush=True)
"""


def test_of_two_concurrent_promotions_exactly_one_wins(address: str) -> None:
    log = PromotionLog(address)
    promote(log, 1, None)
    commands = [[sys.executable, "-c", CONTENDER, address, str(offset)] for offset in (1, 2)]
    contenders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        assert [contender.stdout.readline() for contender in contenders] == ["ready\n"] * 2
        for _ in range(ROUNDS):
            champion = log.champion("m").to_version
            for contender in contenders:
                contender.stdin.write(f"{champion}\n")
                contender.stdin.flush()
            results = [contender.stdout.readline().strip() for contender in contenders]
            assert sorted(results) == ["lost", "won"]
            assert log.champion("m").to_version == champion + 1 + results.index("won")
    finally:
        for contender in contenders:
            contender.stdin.close()
            contender.wait(30)
            contender.stdout.close()
    assert len(log.events("m")) == 2 * (ROUNDS + 1)


UPDATES = ["UPDATE promotion_events SET to_version = 7", "DELETE FROM promotion_events"]
REPLACES = {
    "sqlite": "INSERT OR REPLACE INTO promotion_events SELECT id, time, model, action, 'forger', reason, from_version, to_version, sha256,"
    " gates, details FROM promotion_events",
    "postgresql": "TRUNCATE promotion_events",
}


@pytest.mark.parametrize("change", [*UPDATES, "replace"])
def test_the_log_only_grows(log: PromotionLog, address: str, change: str) -> None:
    promote(log, 1, None)
    before = log.events("m")
    engine = create_engine(address)
    statement = REPLACES[engine.dialect.name] if change == "replace" else change
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()
    assert log.events("m") == before


def test_an_action_that_nobody_knows_is_not_taken(log: PromotionLog, address: str) -> None:
    promote(log, 1, None)
    engine = create_engine(address)
    columns = "actor, reason, to_version, sha256, gates, details"
    forged = f"INSERT INTO promotion_events (time, model, action, {columns}) SELECT time, model, 'bless', {columns} FROM promotion_events"
    with pytest.raises(DBAPIError, match="promotion_events_action"), engine.begin() as connection:
        connection.execute(text(forged))
    engine.dispose()


def test_many_open_one_new_database_at_once(address: str) -> None:
    barrier, failures = threading.Barrier(4), []

    def open_and_append(version: int) -> None:
        barrier.wait()
        try:
            PromotionLog(address).append("m", entry("register", version), actor="a")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=open_and_append, args=(version,)) for version in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(event.to_version for event in PromotionLog(address).events("m")) == [0, 1, 2, 3]


# --- the file of earlier versions

OLD = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, model TEXT NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('promote', 'refuse', 'rollback')), actor TEXT NOT NULL, reason TEXT NOT NULL,
    from_version INTEGER, to_version INTEGER NOT NULL, sha256 TEXT NOT NULL, gates TEXT NOT NULL
) STRICT;
INSERT INTO events VALUES (3, '2026-01-01T00:00:00+00:00', 'm', 'promote', 'a', 'r', NULL, 1, 'sha1', '[{"gate": "x"}]');
INSERT INTO events VALUES (4, '2026-01-02T00:00:00.500000+00:00', 'm', 'refuse', 'a', 'r', 1, 2, 'sha2', '[]');
INSERT INTO events VALUES (7, '2026-01-03T00:00:00.250000+00:00', 'm', 'promote', 'b', 'r', 1, 3, 'sha3', '[]');
INSERT INTO events VALUES (8, '2026-01-04T00:00:00+00:00', 'm', 'rollback', 'b', 'r', 3, 1, 'sha1', '[]');
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "promotions.db"
    connection = sqlite3.connect(path)
    connection.executescript(OLD)
    connection.close()
    return path


def test_an_old_log_is_taken_over_once_and_stays_as_it_is(old: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(old.read_bytes()).hexdigest()
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):
        log = PromotionLog(address)
        assert [(e.id, e.action, e.from_version, e.to_version) for e in log.events("m")] == [
            (3, "promote", None, 1),
            (4, "refuse", 1, 2),
            (7, "promote", 1, 3),
            (8, "rollback", 3, 1),
        ]
    assert log.events("m")[0].gates == [{"gate": "x"}] and log.events("m")[1].time == datetime(2026, 1, 2, 0, 0, 0, 500000, UTC)
    assert (log.champion("m").to_version, log.previous("m").to_version) == (1, 3)
    assert log.champion_at("m", datetime(2026, 1, 3, 12, tzinfo=UTC)).to_version == 3
    assert promote(log, 4, 1).id > 8
    assert hashlib.sha256(old.read_bytes()).hexdigest() == before


def test_a_file_that_is_no_log_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "promotions.db").write_text("hello" * 1000)
    for _ in range(2):
        with pytest.raises(RegistryError, match=r"promotions\.db: expected the promotion log of an earlier version"):
            PromotionLog(f"sqlite:///{tmp_path / 'mlflow.db'}")


# --- addresses


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mysql://u:pw@h/d", r"'mysql://u:\*\*\*@h/d': the promotion log is kept in sqlite or postgresql, got mysql"),
        ("http://u:pw@h:5000", "the promotion log is kept in sqlite or postgresql"),
        ("somewhere", "expected sqlite:///<file> or postgresql://"),
    ],
)
def test_addresses_of_another_kind(address: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        PromotionLog(address)
    assert "pw" not in str(caught.value)


def test_no_password_is_printed(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_TRACKING_URI", postgres_url)
    monkeypatch.setenv("RECSYS_ARTIFACTS", "s3://key:hidden@bucket/prefix")
    location = Location.under(tmp_path)
    assert (location.tracking_uri, location.log, location.artifacts) == (postgres_url, postgres_url, "s3://key:hidden@bucket/prefix")
    for shown in (repr(location), str(location), f"{location}"):
        assert PASSWORD not in shown and "hidden" not in shown and "***" in shown
    with pytest.raises(RegistryError, match="password authentication failed") as caught:
        PromotionLog(postgres_url.replace(PASSWORD, "wrong-word"))
    assert "wrong-word" not in str(caught.value)
    address = "postgresql://h/d?user=u&password={}&x=1 and http://h:80/a@b"
    assert masked(address.format("pw")) == address.format("***")


def test_under_a_home_everything_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECSYS_TRACKING_URI", "RECSYS_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    location = Location.under(tmp_path)
    assert location.log == location.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert Path(location.artifacts).is_relative_to(tmp_path) and location.online.is_relative_to(tmp_path)
