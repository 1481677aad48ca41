# SPDX-License-Identifier: Apache-2.0
"""A calibration by the value of a feature, in the path that serves it."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.bundle.bundle import Bundle
from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import BundleError
from recsys.core.schema import TIME
from recsys.data.datasets.synthetic import Synthetic
from recsys.inference.recommender import Recommender
from recsys.ranking.calibration import NoCalibration, Platt
from recsys.ranking.group_calibration import PerGroup

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def by_column(column: str, lines: dict[str, tuple[float, float]]) -> PerGroup:
    """A calibration that maps each value's probabilities by a line on the logit, and leaves others as they are."""
    calibrator: PerGroup = components.build(
        "calibration", parse(PerGroup.Config, {"column": column, "base": {"name": "platt"}}, source="t")
    )
    for name, (slope, intercept) in lines.items():
        platt = Platt(Platt.Config())
        platt.load_numbers({"slope": slope, "intercept": intercept})
        calibrator.groups[name] = platt
    return calibrator


@pytest.mark.parametrize("column", ["user_gender", "user_occupation"])
def test_each_user_is_calibrated_by_the_value_of_the_feature(tiny_run, tmp_path: Path, column: str) -> None:
    bundle = Bundle.load(tiny_run.directory / "bundle")
    dataset = Synthetic(Synthetic.Config()).load()
    tables = {"interactions": dataset.interactions, "items": dataset.items, "users": dataset.users}
    reader = OfflineReader(parse(FeatureRepo, bundle.features, source="features.json"), tables)
    users = [str(user) for user in range(40)]
    bundle.calibration = NoCalibration(NoCalibration.Config())
    plain = Recommender(bundle, reader)
    asked = plain.users(users, pa.array([NOW] * len(users), TIME))
    candidates = plain.retrieve(asked, 5)
    raw = plain.rank(asked, candidates).probability
    values = asked.table.column(column).to_pylist()
    chosen = sorted({value for value in values if value is not None})[:1]
    bundle.calibration = by_column(column, dict.fromkeys(chosen, (2.0, -1.0)))
    bundle.save(tmp_path / "grouped")
    loaded = Recommender(Bundle.load(tmp_path / "grouped"), reader)
    found = loaded.rank(asked, candidates).probability
    platt = Platt(Platt.Config())
    platt.load_numbers({"slope": 2.0, "intercept": -1.0})
    assert {value in chosen for value in values} == {True, False}
    for row, value in enumerate(values):
        expected = platt.apply(raw[row]) if value in chosen else raw[row]
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_a_calibration_by_a_feature_that_is_not_there_is_refused(tiny_run, tmp_path: Path) -> None:
    bundle = Bundle.load(tiny_run.directory / "bundle")
    bundle.calibration = by_column("domain", {})
    with pytest.raises(BundleError, match="the calibration is by 'domain', which no feature view has"):
        bundle.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
