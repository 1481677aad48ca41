# SPDX-License-Identifier: Apache-2.0
"""A data set without a user is a data set: whole, with a fingerprint of its own, and accounts that add up."""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow.compute as pc
import pytest

from recsys.core.errors import DataError
from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import ingest, ingest_partitioned, read_dataset
from recsys.data.ingest.forget import RULE, forget_user

NOW = datetime(2025, 1, 1, tzinfo=UTC)
USER = "anna"
SCHEMA = {
    "interactions": {"event_time": {"column": "ts", "unit": "s"}, "values": [{"name": "rating", "kind": "label"}]},
    "items": {"attributes": [{"name": "title", "kind": "text"}]},
    "users": {"attributes": [{"name": "age", "kind": "dense"}]},
}


def made(folder: Path, parts: int | None, *, users: bool = True) -> Path:
    """A data set with repeated rows, unknown items and events in the future, some of each of the user's."""
    people = [USER, "annabel", "bob", "carl", "dora"]
    events = pl.DataFrame(
        {
            "user_id": [people[n % 5] for n in range(200)] + [USER, USER, "bob"],
            "item_id": [str(n % 7) for n in range(200)] + ["none such", "1", "2"],
            "ts": [10 * n for n in range(200)] + [5, 2**33, 2**33],
            "rating": [float(n % 3) for n in range(200)] + [1.0] * 3,
        }
    )
    events = pl.concat([events, events[:3]])
    folder.mkdir()
    events.write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": [str(n) for n in range(7)], "title": ["t"] * 7}).write_parquet(folder / "items.parquet")
    pl.DataFrame({"user_id": people, "age": [1.0, 2.0, 3.0, 4.0, None]}).write_parquet(folder / "users.parquet")
    schema = DatasetSchema.model_validate(SCHEMA if users else {**SCHEMA, "users": None})
    sources = (folder / "events.parquet", folder / "items.parquet", folder / "users.parquet" if users else None)
    if parts is None:
        ingest(*sources, schema, folder / "data", now=NOW)
    else:
        ingest_partitioned(*sources, schema, folder / "data", partitions=parts, now=NOW)
    return folder / "data"


def others(dataset: Dataset, name: str) -> object:
    table = getattr(dataset, name)
    return table.filter(pc.not_equal(table.column("user_id"), USER))


@pytest.mark.parametrize("parts", [None, 1, 4])
def test_what_is_left_is_the_data_set_of_the_others(tmp_path: Path, parts: int | None) -> None:
    path = made(tmp_path / "source", parts)
    before = read_dataset(path)
    assert forget_user(path, USER) == {"interactions": 40, "users": 1}
    after = read_dataset(path)  # which verifies the fingerprint
    assert after.interactions.equals(others(before, "interactions")) and after.users.equals(others(before, "users"))
    assert after.items.equals(before.items) and after.fingerprint() != before.fingerprint()
    counts = {table.table: table for table in after.report.tables}
    assert counts["interactions"].kept == after.interactions.num_rows and counts["users"].kept == 4
    assert after.report.count("interactions", RULE) == 40 and after.report.count("users", RULE) == 1
    dropped = sum(t.count for t in after.report.treatments if t.table == "interactions" and t.action == "dropped")
    assert counts["interactions"].read == counts["interactions"].kept + dropped
    assert any("user_id=bob" in example for treatment in after.report.treatments for example in treatment.examples)
    for file in path.rglob("*"):
        if file.suffix == ".json":
            assert f"{USER}," not in file.read_text()
    content = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert forget_user(path, USER) == {"interactions": 0, "users": 0}
    assert content == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert forget_user(path, "bob")["interactions"] == 40 and read_dataset(path).report.count("interactions", RULE) == 80
    assert sorted(each.name for each in path.parent.iterdir()) == ["data", "events.parquet", "items.parquet", "users.parquet"]


def test_files_of_the_others_are_not_written_again(tmp_path: Path) -> None:
    path = made(tmp_path / "source", 4, users=False)
    before = {file.relative_to(path): file.stat().st_ino for file in path.rglob("*.parquet")}
    assert forget_user(path, USER) == {"interactions": 40}
    changed = [file for file, inode in before.items() if (path / file).stat().st_ino != inode]
    assert len(changed) == 1 and changed[0].name == "events.parquet"


def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    path = made(tmp_path / "source", 2)
    for name in (".data.7.new", "..data.7.new.7.tmp", ".data.7.old", ".data.work"):
        (path.parent / name).mkdir()
        (path.parent / name / "file").write_text(USER)
    forget_user(path, USER)
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a data set"):
        forget_user(tmp_path, USER)
    path = made(tmp_path / "source", 2)
    for user in ("annabel", "bob", "carl", "dora"):
        forget_user(path, user)
    with pytest.raises(DataError, match="no event would be left without this user"):
        forget_user(path, USER)
    assert read_dataset(path).interactions.num_rows == 40
