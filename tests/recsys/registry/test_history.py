# SPDX-License-Identifier: Apache-2.0
"""The promotion log: compare-and-set, append-only, and able to tell who was champion when."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from recsys.core.errors import RegistryError
from recsys.registry import PromotionLog


def append(log: PromotionLog, version: int, expected: int | None, action: str = "promote"):
    return log.append(
        model="m", action=action, actor="a", reason="r", to_version=version, sha256=f"sha{version}", expected=expected, gates=[]
    )


@pytest.fixture
def log(tmp_path: Path) -> PromotionLog:
    return PromotionLog(tmp_path / "log.db")


def test_the_state_of_every_moment_can_be_told(log: PromotionLog) -> None:
    start = datetime.now(UTC)
    first = append(log, 1, None)
    append(log, 2, None, "refuse")
    second = append(log, 3, 1)
    append(log, 1, 3, "rollback")
    assert log.champion("m", start - timedelta(seconds=1)) is None
    assert log.champion("m", first.time).to_version == 1
    assert log.champion("m", second.time).to_version == 3
    assert log.champion("m").to_version == 1
    assert [(e.action, e.from_version, e.to_version) for e in log.events("m")] == [
        ("promote", None, 1),
        ("refuse", 1, 2),
        ("promote", 1, 3),
        ("rollback", 3, 1),
    ]
    assert log.champion("another") is None


def test_previous_is_the_champion_before_this_one(log: PromotionLog) -> None:
    assert log.previous("m") is None
    append(log, 1, None)
    assert log.previous("m") is None
    append(log, 2, 1)
    append(log, 9, None, "refuse")
    assert log.previous("m").to_version == 1
    assert log.previous("m").sha256 == "sha1"


def test_a_promotion_on_outdated_evidence_is_refused(log: PromotionLog) -> None:
    append(log, 1, None)
    with pytest.raises(RegistryError, match="expected champion none, but it is 1: somebody promoted meanwhile"):
        append(log, 2, None)
    assert log.champion("m").to_version == 1


def test_of_two_concurrent_promotions_exactly_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    append(PromotionLog(path), 1, None)
    barrier, results = threading.Barrier(8), []

    def promote(version: int) -> None:
        log = PromotionLog(path)
        barrier.wait()
        try:
            results.append(append(log, version, 1).to_version)
        except RegistryError:
            results.append(None)

    threads = [threading.Thread(target=promote, args=(v,)) for v in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [r for r in results if r is not None]
    assert len(results) == 8
    assert len(winners) == 1
    assert PromotionLog(path).champion("m").to_version == winners[0]


@pytest.mark.parametrize("statement", ["UPDATE events SET to_version = 7", "DELETE FROM events"])
def test_the_log_only_grows(log: PromotionLog, tmp_path: Path, statement: str) -> None:
    append(log, 1, None)
    connection = sqlite3.connect(tmp_path / "log.db")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    assert log.champion("m").to_version == 1
