# SPDX-License-Identifier: Apache-2.0
"""A log in a Delta table as a data set: the rows that ingest makes, at the version that is named, each append once."""

from datetime import UTC, datetime
from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli import main
from pipelines.steps import ingest as ingest_step
from recsys.core.config import parse
from recsys.core.delta import DeltaVersion
from recsys.core.errors import ConfigError, DataError
from recsys.data.dataset import Dataset
from recsys.data.datasets import Delta, FromFiles, Versioned, load_dataset
from recsys.data.ingest import ingest, read_table
from recsys.data.ingest.delta import ingest_delta
from tests.recsys.data.test_streaming_ingest import NOW, dirty_events, schema, write


def config(folder: Path, table: Path, version: int) -> Delta.Config:
    (folder / "roles.yaml").write_text(schema().dump())
    where = {"items": folder / "items.parquet", "users": folder / "users.parquet", "roles": folder / "roles.yaml"}
    return Delta.Config.model_validate({"path": table, "version": version, **where})


def load(folder: Path, table: Path, version: int) -> Dataset:
    return load_dataset(config(folder, table, version))


@pytest.mark.parametrize("by_day", [False, True])
def test_the_log_is_the_data_set_that_ingest_makes(tmp_path: Path, by_day: bool) -> None:
    sources = write(tmp_path / "raw", dirty_events(1, 600))
    whole = ingest(*sources, schema(), tmp_path / "whole", now=NOW)
    report = ingest_delta(sources[0], schema(), tmp_path / "log", by_day=by_day, now=NOW)
    mine = load(tmp_path / "raw", tmp_path / "log", report.log.version)
    assert mine.name == f"log@v{report.log.version}"
    assert mine.interactions.num_rows == whole.interactions.num_rows > 0
    # What ingest drops before it looks for repeated rows, the log drops when it is read.
    columns = [name for name in whole.interactions.column_names if name != "ingest_seq"]
    assert mine.interactions.select(columns).equals(whole.interactions.select(columns))
    assert mine.interactions.equals(whole.interactions) and mine.fingerprint() == whole.fingerprint()
    assert mine.report.count("interactions", "unknown_item") > 0
    assert report.counts.read == 600 and report.added == report.counts.kept
    assert {t.rule for t in report.treatments if t.count} >= {"null_user", "null_item", "null_time", "future_time", "exact_duplicate"}


def test_appends_are_seen_from_their_version_on_and_once(tmp_path: Path) -> None:
    events = dirty_events(0, 600)
    one, two = write(tmp_path / "one", events.slice(0, 400)), write(tmp_path / "two", events.slice(400))
    table = tmp_path / "log"
    first = ingest_delta(one[0], schema(), table, now=NOW)
    before = load(tmp_path / "one", table, first.log.version)
    second = ingest_delta(two[0], schema(), table, now=NOW)
    for again in (ingest_delta(one[0], schema(), table, now=NOW), ingest_delta(two[0], schema(), table, now=NOW)):
        assert again.added == 0 and again.log == second.log
    deltalake.DeltaTable(str(table)).optimize.compact()
    pinned, later, compacted = (load(tmp_path / "one", table, v) for v in (first.log.version, second.log.version, second.log.version + 1))
    assert pinned.fingerprint() == before.fingerprint() and pinned.name == before.name
    assert later.fingerprint() == compacted.fingerprint() != pinned.fingerprint()
    assert later.interactions.num_rows > pinned.interactions.num_rows
    seq = later.interactions.column("ingest_seq").to_pylist()
    assert len(set(seq)) == len(seq)


def test_a_transaction_may_be_named(tmp_path: Path) -> None:
    sources, table = write(tmp_path / "raw", dirty_events(0, 60)), tmp_path / "log"
    assert ingest_delta(sources[0], schema(), table, transaction=("clicks", 20240301), now=NOW).added > 0
    assert ingest_delta(sources[0], schema(), table, transaction=("clicks", 20240301), now=NOW).added == 0
    assert ingest_delta(sources[0], schema(), table, transaction=("clicks", 20240302), now=NOW).added > 0


def test_the_key_of_a_run_names_the_version_and_not_what_came_later(tmp_path: Path) -> None:
    events = dirty_events(0, 600)
    one, two = write(tmp_path / "one", events.slice(0, 400)), write(tmp_path / "two", events.slice(400))
    first = ingest_delta(one[0], schema(), tmp_path / "log", now=NOW).log

    class Recipe:
        dataset = config(tmp_path / "one", tmp_path / "log", first.version)

    source = Delta(Recipe.dataset)
    assert isinstance(source, FromFiles) and isinstance(source, Versioned)
    key = ingest_step.sources(Recipe, None)  # type: ignore[arg-type]
    assert key["snapshot"]["version"] == first.version and set(key) == {"snapshot", "items.parquet", "users.parquet", "roles.yaml"}
    ingest_delta(two[0], schema(), tmp_path / "log", now=NOW)
    assert ingest_step.sources(Recipe, None) == key  # type: ignore[arg-type]


def test_the_command_appends_once_and_says_what_to_write_into_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events, _, _ = write(tmp_path / "raw", dirty_events(0, 60))
    (tmp_path / "schema.yaml").write_text(schema().dump())
    command = ["ingest", "--interactions", str(events), "--schema", str(tmp_path / "schema.yaml"), "--out", str(tmp_path / "log")]
    assert main([*command, "--delta", "--by-day"]) == 0
    said = capsys.readouterr().out
    version = DeltaVersion.open(tmp_path / "log").version
    assert f"log@v{version}: " in said and "events added" in said and f"version: {version}" in said
    assert main([*command, "--delta"]) == 0
    assert f"log@v{version}: nothing added, for this transaction is there already" in capsys.readouterr().out
    for wrong, message in {
        ("--delta", "--transaction", "clicks"): "--transaction: expected NAME:NUMBER, such as clicks:20240301, got 'clicks'",
        ("--delta", "--items", "x"): "--items and --users are read beside the log",
        ("--delta", "--partitions", "3"): "expected none of --partitions",
        ("--by-day", "--items", "x"): "expected --delta beside them",
        (): "--items is needed, except with --delta",
    }.items():
        assert main([*command, *wrong]) != 0
        assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_refused(tmp_path: Path) -> None:
    sources = write(tmp_path / "raw", dirty_events(0, 60))
    table = tmp_path / "log"
    version = ingest_delta(sources[0], schema(), table, now=NOW).log.version
    with pytest.raises(DataError, match="log is a Delta table, whose rows have no order of arrival"):
        read_table(table, {})
    with pytest.raises(DataError, match="version 99 cannot be read"):
        load(tmp_path / "raw", table, 99)
    with pytest.raises(ConfigError, match="version"):
        parse(Delta.Config, {"path": table, "items": "i", "roles": "r"}, source="dataset")
    pq.write_table(pa.table({"iid": ["nothing"], "title": ["N"]}), tmp_path / "raw" / "items.parquet")
    with pytest.raises(DataError, match=rf"log@v{version}: no event is left of \d+"):
        load(tmp_path / "raw", table, version)
    future = datetime(1970, 1, 1, tzinfo=UTC)
    assert ingest_delta(sources[0], schema(), tmp_path / "none", now=future).added == 0
