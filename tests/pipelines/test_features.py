# SPDX-License-Identifier: Apache-2.0
"""`recsys features`: from the parts of a served log to a table, a JSON file and a status; from a data set on disk to rows with features."""

import json
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.offline import OfflineReader
from feature_store.served import ServedLog
from pipelines import cli
from pipelines.recipe import Recipe
from pipelines.steps.features import feature_tables
from pipelines.steps.prepared import as_impressions
from recsys.core.config import load_recipe
from recsys.data.datasets import load_dataset
from recsys.data.ingest import write_dataset
from recsys.inference.frame import ranking_frame

OVERRIDES = ["dataset={name: synthetic}"]
ROWS = 200


def _serve(folder: Path, skew: float) -> None:
    """Log the users of a shipped recipe; the first rows' means are off by ``skew``."""
    recipe = load_recipe(Recipe, "quickstart", OVERRIDES)
    tables = feature_tables(recipe.features, load_dataset(recipe.dataset))
    events = tables["interactions"].slice(0, ROWS)
    time = pc.add(events.column("event_time"), pa.scalar(timedelta(seconds=1)))
    read = OfflineReader(recipe.features, tables).read("user", pa.table({"user_id": events.column("user_id"), "request_time": time}))
    off = pa.array([skew if row < 5 else 0.0 for row in range(ROWS)])
    place = read.schema.get_field_index("user_mean")
    log = ServedLog(folder, recipe.features, share=1.0)
    log.offer("user", read.set_column(place, "user_mean", pc.add(read.column("user_mean"), off)))
    log.close()


def _audit(served: Path, *further: str) -> int:
    return cli.main(["features", "audit", "quickstart", "--served", str(served), "--set", *OVERRIDES, *further])


def test_no_skew_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _serve(tmp_path / "served", 0.0)
    assert _audit(tmp_path / "served", "--json", str(tmp_path / "report.json")) == 0
    assert f"{ROWS} rows of 1 files" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows"], report["alarms"]) == (ROWS, []) and {f["wrong"] for f in report["features"]} == {0}


def test_skew_is_status_1_and_names_the_feature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _serve(tmp_path / "served", 0.25)
    assert _audit(tmp_path / "served", "--json", str(tmp_path / "report.json")) == 1
    out = capsys.readouterr().out
    assert "user.user_mean: 2.500% of rows are wrong" in out and "user_events: " not in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["alarms"] == ["user.user_mean"]
    mean = next(f for f in report["features"] if f["feature"] == "user_mean")
    assert (mean["wrong"], mean["mismatch"], mean["share"]) == (5, 5, 0.025) and mean["largest"] == pytest.approx(0.25)
    assert sum(day > 0 for day in mean["days"].values()) >= 1
    assert _audit(tmp_path / "served", "--alert", "0.03") == 0


def test_what_cannot_be_read_is_status_2_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "part.parquet").write_bytes(b"damaged")
    assert _audit(tmp_path) == 2
    assert f"recsys: served part {tmp_path / 'part.parquet'}: not a whole Parquet file" in capsys.readouterr().err


def test_an_audit_of_nothing_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _serve(tmp_path, 0.0)
    assert _audit(tmp_path, "--set", "features.services=[{name: user, views: [user_activity]}]") == 2
    captured = capsys.readouterr()
    assert f"{ROWS} rows of other versions were not compared" in captured.out
    assert "no row is of the features as quickstart defines them" in captured.err


def _join(data: Path, out: Path, *further: str) -> int:
    dataset = f"dataset={{name: ingested, path: {data}}}"
    return cli.main(["features", "join", "quickstart", "--out", str(out), "--partitions", "3", "--set", dataset, *further])


@pytest.mark.parametrize("order", ["partition", "spine"])
def test_every_event_has_the_features_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str], order: str) -> None:
    recipe = load_recipe(Recipe, "quickstart", OVERRIDES)
    dataset = load_dataset(recipe.dataset)
    write_dataset(dataset, tmp_path / "data")
    assert _join(tmp_path / "data", tmp_path / "rows", "--order", order) == 0
    assert f"{dataset.interactions.num_rows:,} rows in 3 parts" in capsys.readouterr().out
    expected = ranking_frame(OfflineReader(recipe.features, feature_tables(recipe.features, dataset)), as_impressions(dataset.interactions))
    files = sorted((tmp_path / "rows").glob("part=*/rows.parquet"))
    found = pa.concat_tables([pq.ParquetFile(file).read() for file in files]).select(expected.column_names)
    if order == "partition":
        keys = [(name, "ascending") for name in ("user_id", "request_time", "item_id", "rating")]
        found, expected = found.sort_by(keys), expected.sort_by(keys)
    assert len(files) == 3 and found.equals(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "rows"]


def test_a_spine_of_ones_own_and_other_services(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(Recipe, "quickstart", OVERRIDES)
    dataset = load_dataset(recipe.dataset)
    write_dataset(dataset, tmp_path / "data")
    spine = as_impressions(dataset.interactions.slice(500, 100))
    pq.write_table(spine, tmp_path / "spine.parquet")
    asked = ("--spine", str(tmp_path / "spine.parquet"), "--services", "seen", "--order", "spine")
    assert _join(tmp_path / "data", tmp_path / "rows", *asked) == 0
    expected = OfflineReader(recipe.features, feature_tables(recipe.features, dataset)).read("seen", spine)
    files = sorted((tmp_path / "rows").glob("part=*/rows.parquet"))
    assert pa.concat_tables([pq.ParquetFile(file).read() for file in files]).equals(expected)
    assert _join(tmp_path / "data", tmp_path / "rows", *asked) == 2
    assert "rows exists already" in capsys.readouterr().err
    assert _join(tmp_path / "data", tmp_path / "more", "--set", "dataset={name: synthetic}") == 2
    assert "dataset: expected {name: ingested, path: ...}" in capsys.readouterr().err
    assert _join(tmp_path / "data", tmp_path / "more", "--partitions", "0") == 2
    assert "--partitions: expected 1 to 4096, got 0" in capsys.readouterr().err
