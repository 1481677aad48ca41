# SPDX-License-Identifier: Apache-2.0
"""Ingest: what is cast, what is counted, what is refused, and what is written."""

import json
import math
import os
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import cli
from pipelines.cli import ingest as ingest_command
from recsys.core.errors import DataError, SchemaError
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import RawTable, canonicalise, ingest, read_dataset, write_dataset

NOW = datetime(2024, 1, 1, tzinfo=UTC)
SCHEMA: dict[str, Any] = {
    "interactions": {
        "user_id": "uid",
        "item_id": "iid",
        "event_time": {"column": "ts", "unit": "s"},
        "values": [{"name": "rating", "kind": "label", "source": "stars"}],
    },
    "items": {
        "item_id": "iid",
        "attributes": [
            {"name": "title", "kind": "text"},
            {"name": "genres", "kind": "bag", "separator": "|"},
            {"name": "year", "kind": "dense", "nulls": ["-1"]},
        ],
    },
    "users": {"user_id": "uid", "attributes": [{"name": "age", "kind": "dense", "dtype": "int"}]},
}
EVENTS = {"uid": [7, 8, 7], "iid": ["a", "a", "b"], "ts": [30, 10, 20], "stars": [1, 5, 3]}
ITEMS = {"iid": ["a", "b", "c"], "title": ['One, "two"\nthree', "Ä", None], "genres": ["x|y", None, "x"], "year": [1999, -1, None]}
USERS = {"uid": [7, 8], "age": [30, None]}


def schema(**changes: Any) -> DatasetSchema:
    return DatasetSchema.model_validate({**SCHEMA, **changes})


def without_users(**changes: Any) -> DatasetSchema:
    return schema(users=None, **changes)


def raw(file: str, columns: dict[str, Any]) -> RawTable:
    return RawTable(file, pl.DataFrame(columns, strict=False))


def clean(events: dict[str, Any], items: dict[str, Any] = ITEMS, **changes: Any) -> Any:
    return canonicalise("shop", without_users(**changes), raw("e.parquet", events), raw("i.parquet", items), now=NOW)


# Rules


def test_a_clean_table_is_kept_whole_in_the_order_of_time() -> None:
    dataset = clean(EVENTS)
    assert dataset.interactions.schema == dataset.schema.interactions.features.to_arrow()
    rows = dataset.interactions.to_pylist()
    assert [(r["user_id"], r["item_id"], r["event_time"].timestamp(), r["ingest_seq"], r["rating"]) for r in rows] == [
        ("8", "a", 10.0, 1, 5.0),
        ("7", "b", 20.0, 2, 3.0),
        ("7", "a", 30.0, 0, 1.0),
    ]
    assert dataset.interactions["available_time"] == dataset.interactions["event_time"]
    assert dataset.items.to_pylist() == [
        {"item_id": "a", "title": 'One, "two"\nthree', "genres": ["x", "y"], "year": 1999.0},
        {"item_id": "b", "title": "Ä", "genres": None, "year": None},
        {"item_id": "c", "title": None, "genres": ["x"], "year": None},
    ]
    assert not any(treatment.count for treatment in dataset.report.treatments)


def test_every_treatment_is_counted_with_examples() -> None:
    future = NOW.timestamp() + 1
    rows: list[tuple[Any, Any, Any, Any]] = [
        ("u", "a", 5, 1.0),
        ("u", "a", 5, 1.0),  # duplicate
        ("u", "a", 5, 2.0),  # another value: kept
        (None, "a", 6, 1.0),
        ("", None, 6, 1.0),  # counted once, by the first rule
        ("u", None, 6, 1.0),
        ("u", "a", None, 1.0),
        ("u", "a", math.nan, 1.0),
        ("u", "a", future, 1.0),
        ("u", "zz", 7, 1.0),
        ("u", "b", 8, math.inf),
        ("u", "a", NOW.timestamp(), 1.0),  # now is not the future
    ]
    events = dict(zip(("uid", "iid", "ts", "stars"), map(list, zip(*rows, strict=True)), strict=True))
    items = {name: [*values, values[0]] for name, values in ITEMS.items()}
    items = {name: [*values, None] for name, values in items.items()}
    report = clean(events, items).report
    counts = {(t.table, t.rule): (t.action, t.count) for t in report.treatments}
    assert counts == {
        ("interactions", "non_finite"): ("nulled", 1),
        ("interactions", "null_user"): ("dropped", 2),
        ("interactions", "null_item"): ("dropped", 1),
        ("interactions", "null_time"): ("dropped", 2),
        ("interactions", "future_time"): ("dropped", 1),
        ("interactions", "unknown_item"): ("dropped", 1),
        ("interactions", "exact_duplicate"): ("dropped", 1),
        ("items", "null_item"): ("dropped", 1),
        ("items", "exact_duplicate"): ("dropped", 1),
    }
    assert [(t.table, t.read, t.kept) for t in report.tables] == [("interactions", 12, 4), ("items", 5, 3)]
    examples = {t.rule: t.examples for t in report.treatments if t.table == "interactions"}
    assert examples["null_user"][0] == "row 3: user_id=null, item_id=a, event_time=1970-01-01 00:00:06+00:00"
    assert examples["unknown_item"] == ("row 9: user_id=u, item_id=zz, event_time=1970-01-01 00:00:07+00:00",)
    assert report.count("interactions", "null_time") == 2 and report.count("users", "null_user") == 0


maybe = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "x"]))
dirty_rows = st.lists(
    st.tuples(maybe, maybe, st.one_of(st.none(), st.integers(0, 3), st.just(10**11)), st.sampled_from([0.0, 1.0, None])), max_size=25
)


@settings(max_examples=40, deadline=None)
@given(dirty_rows)
def test_rules_against_brute_force(rows: list[tuple[Any, Any, Any, Any]]) -> None:
    want: Counter[str] = Counter()
    kept: list[tuple[int, int]] = []
    seen: set[tuple[Any, ...]] = set()
    for number, (user, item, second, stars) in enumerate(rows):
        broken = [
            name
            for name, bad in (
                ("null_user", user is None),
                ("null_item", item is None),
                ("null_time", second is None),
                ("future_time", second == 10**11),
                ("unknown_item", item == "x"),
                ("exact_duplicate", (user, item, second, stars) in seen),
            )
            if bad
        ]
        if broken:
            want[broken[0]] += 1
        else:
            seen.add((user, item, second, stars))
            kept.append((second, number))
    columns = list(map(list, zip(*rows, strict=True))) or [[], [], [], []]
    types = (pl.String, pl.String, pl.Int64, pl.Float64)
    events = {name: pl.Series(v, dtype=t) for name, v, t in zip(("uid", "iid", "ts", "stars"), columns, types, strict=True)}
    if not kept:
        with pytest.raises(DataError, match=f"e.parquet: no event is left of {len(rows)}"):
            clean(events)
        return
    dataset = clean(events)
    assert dataset.interactions["ingest_seq"].to_pylist() == [number for _, number in sorted(kept)]
    assert {t.rule: t.count for t in dataset.report.treatments if t.count} == want
    counts = dataset.report.tables[0]
    assert counts.read == len(rows) == counts.kept + sum(t.count for t in dataset.report.treatments if t.action == "dropped")


def test_an_empty_result_says_why() -> None:
    with pytest.raises(DataError, match=r"e.parquet: no event is left of 3 \(unknown_item 3\)"):
        clean({**EVENTS, "iid": [1.0, 2.0, 3.0]})


def test_unknown_items_may_be_added() -> None:
    dataset = clean({**EVENTS, "iid": ["zz", "a", "y"]}, on_unknown_item="add")
    assert dataset.interactions.num_rows == 3
    assert dataset.items["item_id"].to_pylist() == ["a", "b", "c", "y", "zz"]
    assert dataset.items.to_pylist()[3] == {"item_id": "y", "title": None, "genres": None, "year": None}
    (added,) = (t for t in dataset.report.treatments if t.rule == "unknown_item")
    assert (added.table, added.action, added.count, added.examples) == ("items", "added", 2, ("item_id=y", "item_id=zz"))


def test_unknown_items_may_be_an_error() -> None:
    message = r"e.parquet: row 0 \(counted from 0\): item_id 'zz' is not among the items of i.parquet \(2 such events"
    with pytest.raises(DataError, match=message):
        clean({**EVENTS, "iid": ["zz", "a", "y"]}, on_unknown_item="error")
    assert clean(EVENTS, on_unknown_item="error").report.count("interactions", "unknown_item") == 0


def test_conflicting_items_are_an_error() -> None:
    items = {"iid": ["a", "b", "a", "b"], "title": ["A", "B", "other", "other"], "genres": [None] * 4, "year": [1, 2, 1, 2]}
    with pytest.raises(DataError, match=r"i.parquet: items: item_id 'a' has different attributes in rows \[0, 2\].*\(1 more ids"):
        clean(EVENTS, items)


def test_conflicting_users_are_an_error() -> None:
    users = raw("u.parquet", {"uid": [7, 8, 8], "age": [1, 2, None]})
    with pytest.raises(DataError, match=r"u.parquet: users: user_id '8' has different attributes in rows \[1, 2\] \(counted from 0\)$"):
        canonicalise("shop", schema(), raw("e", EVENTS), raw("i", ITEMS), users, now=NOW)


def test_users_and_their_schema_go_together() -> None:
    with pytest.raises(DataError, match="shop: users: the schema has them, but no source is given"):
        canonicalise("shop", schema(), raw("e", EVENTS), raw("i", ITEMS), now=NOW)
    with pytest.raises(DataError, match=r"shop: users: u.csv has them, but the schema does not"):
        canonicalise("shop", without_users(), raw("e", EVENTS), raw("i", ITEMS), raw("u.csv", USERS), now=NOW)


def test_users_without_attributes_keep_their_events() -> None:
    dataset = canonicalise("shop", schema(), raw("e", EVENTS), raw("i", ITEMS), raw("u", {"uid": [8], "age": [4]}), now=NOW)
    assert dataset.interactions.num_rows == 3
    assert dataset.users is not None and dataset.users.to_pylist() == [{"user_id": "8", "age": 4}]


def test_available_time_of_its_own() -> None:
    interactions = {**SCHEMA["interactions"], "available_time": {"column": "seen", "unit": "ms"}}
    dataset = clean({**EVENTS, "seen": [40_000, None, 20_500]}, interactions=interactions)
    assert [t.timestamp() for t in dataset.interactions["available_time"].to_pylist()] == [10.0, 20.5, 40.0]
    assert dataset.report.count("interactions", "null_available_time") == 1


def test_values_that_are_lists_take_part_in_duplicates() -> None:
    interactions = {**SCHEMA["interactions"], "values": [{"name": "tags", "kind": "sequence"}]}
    events = {"uid": [1] * 3, "iid": ["a"] * 3, "ts": [1] * 3, "tags": [["x", "y"], ["x", "y"], ["y", "x"]]}
    assert clean(events, interactions=interactions).report.count("interactions", "exact_duplicate") == 1


def test_now_needs_an_offset() -> None:
    with pytest.raises(DataError, match="now: expected a time with an offset"):
        canonicalise("shop", without_users(), raw("e", EVENTS), raw("i", ITEMS), now=datetime(2024, 1, 1))


# Files


def write_sources(folder: Path, kind: str, events: dict[str, Any] = EVENTS) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, columns in (("events", events), ("items", ITEMS), ("users", USERS)):
        table, path = pa.table(columns), folder / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ","))
        paths.append(path)
    return paths


def test_csv_tsv_and_parquet_give_the_same_data_set(tmp_path: Path) -> None:
    sets = [
        ingest(*write_sources(tmp_path / kind, kind), schema(), tmp_path / kind / "shop", now=NOW) for kind in ("csv", "tsv", "parquet")
    ]
    assert len({dataset.fingerprint() for dataset in sets}) == 1
    assert sets[0].interactions == sets[1].interactions == sets[2].interactions


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    events, items, users = write_sources(tmp_path, "parquet")
    whole = ingest(events, items, users, schema(), tmp_path / "whole", now=NOW)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "_SUCCESS").touch()
    for n in range(3):
        pq.write_table(pa.table(EVENTS).slice(n, 1), tmp_path / "parts" / f"part-{n}.parquet")
    assert ingest(tmp_path / "parts", items, users, schema(), tmp_path / "again", now=NOW).fingerprint() == whole.fingerprint()


def test_what_is_written(tmp_path: Path) -> None:
    n = 250_000
    rng = np.random.default_rng(0)
    events = {"uid": rng.integers(0, 999, n), "iid": rng.choice(["a", "b"], n), "ts": rng.integers(0, 10**9, n), "stars": np.ones(n)}
    out = tmp_path / "shop"
    dataset = ingest(*write_sources(tmp_path, "parquet", events), schema(), out, now=NOW)
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json",
        "interactions.parquet",
        "items.parquet",
        "schema.yaml",
        "users.parquet",
    ]
    file = pq.ParquetFile(out / "interactions.parquet")
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [100_000, 100_000, 50_000]
    table = pq.read_table(out / "interactions.parquet")
    order = np.lexsort((table["ingest_seq"].to_numpy(), table["event_time"].cast(pa.int64()).to_numpy()))
    assert (order == np.arange(n)).all()
    manifest = json.loads((out / "dataset.json").read_text())
    assert (manifest["dataset"], manifest["fingerprint"]) == ("shop", dataset.fingerprint())
    assert read_dataset(out) == dataset
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_existing_directory_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    sources, out = write_sources(tmp_path, "csv"), tmp_path / "shop"
    first = ingest(*sources, schema(), out, now=NOW)
    with pytest.raises(DataError, match=r"shop exists already: overwrite it on purpose \(--overwrite\)"):
        ingest(*sources, schema(), out, now=NOW)
    sources = write_sources(tmp_path, "csv", {**EVENTS, "stars": [1, 1, 1]})
    with pytest.raises(SchemaError):
        ingest(*sources, schema(interactions={"event_time": "nothing"}), out, now=NOW, overwrite=True)
    assert read_dataset(out) == first
    second = ingest(*sources, schema(), out, now=NOW, overwrite=True)
    assert read_dataset(out) == second != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"mine is not a data set \(it has no dataset.json\), and is not overwritten"):
        ingest(*sources, schema(), tmp_path / "mine", now=NOW, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("recsys.data.ingest.store.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(clean(EVENTS), tmp_path / "shop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_missing_column_is_named_with_its_file_and_the_nearest(tmp_path: Path, kind: str) -> None:
    paths = write_sources(tmp_path, kind, {**{k: v for k, v in EVENTS.items() if k != "stars"}, "star": [1, 2, 3]})
    with pytest.raises(SchemaError, match=rf"events.{kind}: interactions.rating: unknown column 'stars'; did you mean 'star'\?"):
        ingest(*paths, schema(), tmp_path / "shop", now=NOW)
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", b"uid,iid,ts,stars,uid\n1,a,1,1,1\n", "interactions.user_id: column 'uid' occurs twice in the header"),
        ("e.csv", b"uid,iid,ts,stars\n1,a,1\n", "cannot be read: .*Expected 4 columns, got 3"),
        ("e.csv", b"uid,iid,ts,stars\n1,\xff,1,1\n", "cannot be read: .*invalid UTF8"),
        ("e.csv", b"", "cannot be read: Empty CSV file"),
        ("e.csv", b"uid,iid,ts,stars\n", r"no event is left of 0 \(\)"),
        ("e.csv", b"uid,iid,ts,stars\n1,a,1,1\n1,a,two,1\n", r"column 'ts', row 1 \(counted from 0\): expected a time .* got 'two'"),
        ("e.parquet", b"not parquet at all", "cannot be read"),
        ("e.xlsx", b"", r"unknown format: expected a name with .parquet, .pq, .csv, .tsv"),
        ("none.csv", None, "no such file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    _, items, users = write_sources(tmp_path, "csv")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((SchemaError, DataError), match=message) as raised:
        ingest(tmp_path / name, items, users, schema(), tmp_path / "shop", now=NOW)
    assert str(raised.value).startswith(str(tmp_path / name))


def test_a_spreadsheets_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    events, items, users = write_sources(tmp_path, "csv")
    events.write_bytes(b"\xef\xbb\xbf" + events.read_bytes())
    assert ingest(events, items, users, schema(), tmp_path / "shop", now=NOW).interactions.num_rows == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset.json", None, "is not a data set: it has no dataset.json"),
        ("items.parquet", None, "cannot be read"),
        ("items.parquet", b"broken", "cannot be read"),
    ],
)
def test_incomplete_data_sets_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    write_dataset(clean(EVENTS), tmp_path / "shop")
    if content is None:
        (tmp_path / "shop" / name).unlink()
    else:
        (tmp_path / "shop" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "shop")


# The command


def arguments(tmp_path: Path, kind: str = "parquet") -> list[str]:
    events, items, users = write_sources(tmp_path, kind, {**EVENTS, "iid": ["a", "b", "[red]x"]})
    (tmp_path / "schema.yaml").write_text(schema().dump())
    paths = {"interactions": events, "items": items, "users": users, "schema": tmp_path / "schema.yaml", "out": tmp_path / "shop"}
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingest_command.main(arguments(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"interactions\s+3\s+2\s", printed)
    assert re.search(r"interactions\s+unknown_item\s+1\s+dropped\s+row 2", printed)
    assert "item_id=[red]x" in printed
    assert read_dataset(tmp_path / "shop").fingerprint() in printed
    assert ingest_command.main([*arguments(tmp_path), "--overwrite"]) == 0


def test_command_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ingest_command.main([*arguments(tmp_path), "--partitions", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"interactions\s+unknown_item\s+1\s+dropped\s+row 2", printed)
    parts = read_dataset(tmp_path / "shop")
    assert ingest_command.main([*arguments(tmp_path), "--overwrite"]) == 0
    assert read_dataset(tmp_path / "shop").fingerprint() == parts.fingerprint()
    assert cli.main(["ingest", *arguments(tmp_path), "--overwrite", "--engine", "ray"]) == 2
    assert "expected --partitions beside them" in capsys.readouterr().err


def test_command_fails_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(tmp_path)
    assert cli.main(["ingest", *argv]) == 0
    capsys.readouterr()
    assert cli.main(["ingest", *argv]) != 0
    error = capsys.readouterr().err
    assert "shop exists already" in error and error.count("\n") == 1


if "RECSYS_DATA" in os.environ:

    def test_a_real_table(tmp_path: Path) -> None:
        """A tenth of MovieLens-1M, against counts taken straight from its Parquet files."""
        folder = Path(os.environ["RECSYS_DATA"]) / "ml_1m"
        genres = {"name": "genres", "kind": "bag"}
        real = DatasetSchema.model_validate(
            {
                "interactions": {"event_time": {"column": "timestamp", "unit": "s"}, "values": [{"name": "rating", "kind": "label"}]},
                "items": {"attributes": [{"name": "title", "kind": "text"}, {"name": "year", "kind": "dense"}, genres]},
                "users": {"attributes": [{"name": name, "kind": "categorical"} for name in ("gender", "age", "occupation", "zip")]},
            }
        )
        paths = [folder / f"{name}.parquet" for name in ("ratings_sample", "items", "users")]
        dataset = ingest(*paths, real, tmp_path / "ml_1m")
        raw_events, raw_items, raw_users = (pl.read_parquet(path) for path in paths)
        assert dataset.interactions.num_rows == raw_events.select("user_id", "item_id", "timestamp", "rating").unique().height
        assert dataset.items.num_rows == raw_items.height and dataset.users is not None and dataset.users.num_rows == raw_users.height
        assert sum(dataset.interactions["rating"].to_pylist()) == raw_events["rating"].sum()
        assert dataset.report.first_event.timestamp() == raw_events["timestamp"].min()
        assert dataset.items["genres"].to_pylist() == raw_items["genres"].to_list()
