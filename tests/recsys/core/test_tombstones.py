# SPDX-License-Identifier: Apache-2.0
"""Tombstones know who was forgotten and do not say it."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from recsys.core.errors import DataError
from recsys.core.files import exclusive
from recsys.core.tombstones import FILE, Tombstones


def test_they_are_kept_without_the_ids(tmp_path: Path) -> None:
    stones = Tombstones.under(tmp_path)
    assert not stones and "anna" not in stones
    assert stones.add("anna") and not stones.add("anna") and stones.add("ünal")
    again = Tombstones.under(tmp_path)
    assert len(again) == 2 and "anna" in again and "ünal" in again and "ann" not in again
    assert "anna" not in (tmp_path / FILE).read_text()
    # The same id has another hash elsewhere.
    other = Tombstones(tmp_path / "elsewhere" / FILE)
    other.add("anna")
    hashes = [set(json.loads(path.read_text())["hashes"]) for path in (tmp_path / FILE, tmp_path / "elsewhere" / FILE)]
    assert hashes[0].isdisjoint(hashes[1])


def test_rows_of_the_forgotten(tmp_path: Path) -> None:
    stones, table = Tombstones.under(tmp_path), pa.table({"user_id": ["a", None, "b", "a"], "n": [1, 2, 3, 4]})
    assert stones.without(table, "user_id").equals(table)
    stones.add("a")
    assert stones.of(table.column("user_id")).tolist() == [True, False, False, True]
    assert stones.without(table, "user_id").column("n").to_pylist() == [2, 3]
    assert stones.without(table.select(["n"]), "user_id").num_rows == 4


def test_two_who_add_at_once_lose_nothing(tmp_path: Path) -> None:
    one, two = Tombstones.under(tmp_path), Tombstones.under(tmp_path)
    one.add("a")
    two.add("b")
    assert {"a", "b"} <= {name for name in "abc" if name in Tombstones.under(tmp_path)}
    with exclusive(tmp_path, "x"), pytest.raises(DataError, match="another process writes it at this moment"):
        one.add("c")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a list of tombstones"), ('{"format": 9, "key": "", "hashes": []}', "expected 1, got 9")]
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=message):
        Tombstones.under(tmp_path)
