# SPDX-License-Identifier: Apache-2.0
"""Features as of just before every event, one row for each, as Parquet."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from pipelines.graph.step import Context
from pipelines.steps.prepared import Prepared, load_prepared
from recsys.core.errors import DataError
from recsys.core.files import new_file
from recsys.data.dataset import Dataset
from recsys.data.splits import PARTS
from recsys.inference.frame import ranking_frame

_ROW_GROUP = 4096


@dataclass(frozen=True)
class Offline:
    """The feature store over the tables of a data set.

    Attributes:
        features: the definitions.
        tables: what the feature store reads, by the names that its sources use.
        reader: features as of a point in time.
    """

    features: FeatureRepo
    tables: dict[str, pa.Table]
    reader: OfflineReader


@dataclass(frozen=True)
class Frames:
    """The feature rows of each part, as Parquet files for the loader and as tables for the rest."""

    paths: dict[str, Path]
    tables: dict[str, pa.Table]


def feature_tables(features: FeatureRepo, dataset: Dataset) -> dict[str, pa.Table]:
    """What the feature store reads of a data set, by the names that sources use; `DataError` where a source names another table."""
    tables = {"interactions": dataset.interactions, "items": dataset.items}
    if dataset.users is not None:
        tables["users"] = dataset.users
    for source in features.sources:
        if source.table is not None and source.table not in tables:
            raise DataError(f"features: source {source.name!r} reads table {source.table!r}, but {dataset.name} has {', '.join(tables)}")
    return tables


def offline(features: FeatureRepo, dataset: Dataset) -> Offline:
    """Open the feature store over a data set."""
    tables = feature_tables(features, dataset)
    return Offline(features, tables, OfflineReader(features, tables))


def build_frames(prepared: Prepared, reader: OfflineReader, folder: Path) -> Frames:
    """Join features to the events of every part, as of just before each, and write them as Parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        write_frame(ranking_frame(reader, prepared.impressions(part)), folder / f"{part}.parquet")
    return load_frames(folder)


def load_frames(folder: Path) -> Frames:
    """What `build_frames` wrote."""
    paths = {part: folder / f"{part}.parquet" for part in PARTS}
    return Frames(paths, {part: pq.read_table(path) for part, path in paths.items()})


def write_frame(table: pa.Table, path: Path) -> None:
    """Write Parquet with the row groups that the loader shuffles, whole or not at all."""
    with new_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=_ROW_GROUP)


def run(context: Context) -> None:
    """Write one Parquet file for each part."""
    prepared = load_prepared(context.inputs["splits"])
    build_frames(prepared, offline(context.recipe.features, prepared.dataset).reader, context.out)
