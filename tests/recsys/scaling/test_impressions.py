# SPDX-License-Identifier: Apache-2.0
"""A data set by its name as a source of a sweep."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from pipelines.scale import execute, load_scale_recipe
from recsys.core import components
from recsys.core.errors import DataError
from recsys.data.datasets.frappe import FIELDS
from recsys.scaling import ImpressionsData


@pytest.fixture
def frappe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pl.DataFrame:
    """A planted folder: 900 rows whose label follows the item."""
    random = np.random.default_rng(0)
    columns = {name: random.integers(0, 6, 900) for name in FIELDS}
    label = (random.random(900) < 0.15 + 0.13 * columns["item_id"]).astype(np.int8)
    split = np.repeat(["train", "valid", "test"], [600, 150, 150])
    rows = pl.DataFrame({**columns, "label": label, "split": split})
    (tmp_path / "frappe").mkdir()
    rows.write_parquet(tmp_path / "frappe" / "ctr.parquet")
    monkeypatch.setenv("RECSYS_DATA", str(tmp_path))
    return rows


def test_its_parts_are_the_data_sets_own(frappe: pl.DataFrame) -> None:
    data = ImpressionsData(ImpressionsData.Config(dataset="frappe"))
    assert set(data.spec.bag_keys) == set(FIELDS) == {field for fields in data.spec.groups.values() for field in fields}
    for part, batches in (("valid", data.valid(64)), ("test", data.test(64))):
        labels = np.concatenate([batch.labels[:, 0].numpy() for batch in batches if batch.labels is not None])
        np.testing.assert_array_equal(labels, frappe.filter(split=part)["label"])
    batch = next(iter(data.train(600, 0, 600)))
    items = batch.sparse["item_id"].values().numpy()
    assert len(items) == 600 and len(np.unique(items)) == 6 and items.min() >= 2


def test_another_row_is_another_fingerprint(frappe: pl.DataFrame, tmp_path: Path) -> None:
    first = ImpressionsData(ImpressionsData.Config(dataset="frappe")).fingerprint
    assert ImpressionsData(ImpressionsData.Config(dataset="frappe")).fingerprint == first
    frappe[1:].write_parquet(tmp_path / "frappe" / "ctr.parquet")
    assert ImpressionsData(ImpressionsData.Config(dataset="frappe")).fingerprint != first


def test_a_study_of_it_runs(frappe: pl.DataFrame, tmp_path: Path) -> None:
    small = ["rows=600", "params.targets=[4000, 12000]", "training.batch_size=100", "fit.resamples=0"]
    recipe = load_scale_recipe("scaling_frappe", small, quick=True)
    study = execute(recipe, "params", tmp_path / "study", Console(quiet=True), only=["tokenmixer_large", "dcnv2"])
    assert {point.architecture for point in study.found} == {"tokenmixer_large", "dcnv2"}
    assert (tmp_path / "study" / "scaling.csv").is_file()


def test_absent_files_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_DATA", raising=False)
    with pytest.raises(DataError, match="frappe: set the environment variable RECSYS_DATA"):
        components.build("scaling_data", ImpressionsData.Config(dataset="frappe"))
