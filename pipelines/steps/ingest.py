# SPDX-License-Identifier: Apache-2.0
"""From raw files to canonical rows: of one day, or of a whole data set that has no days."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.graph.parts import hashes
from pipelines.graph.step import Context
from recsys.data.datasets.base import FromFiles, Partitioned, Versioned, dataset_source
from recsys.data.ingest.store import write_dataset

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

ALL = "all"
"""The one partition of a data set that has no days."""
DATASET, DAY, REPORT = "dataset", "events.parquet", "report.json"


def partitions(recipe: "Recipe") -> tuple[str, ...]:
    """The days of the recipe's data set, or `ALL` alone."""
    source = dataset_source(recipe.dataset)
    return source.partitions() if isinstance(source, Partitioned) else (ALL,)


def sources(recipe: "Recipe", partition: str | None) -> dict[str, Any]:
    """The hashes of the files of a day, or of all files where there are no days; of a table its version."""
    source = dataset_source(recipe.dataset)
    files: tuple[Path, ...] = ()
    if isinstance(source, Partitioned):
        files = source.day_files(str(partition))
    elif isinstance(source, FromFiles):
        files = source.files()
    versions = {"snapshot": source.snapshot()} if isinstance(source, Versioned) else {}
    return versions | {name: digest for file in files for name, digest in hashes(file).items()}


def entity_sources(recipe: "Recipe", _: str | None) -> dict[str, Any]:
    """The hashes of the files of items and users, where they come beside days of events."""
    source = dataset_source(recipe.dataset)
    return (
        {name: digest for file in source.entity_files() for name, digest in hashes(file).items()} if isinstance(source, Partitioned) else {}
    )


def run(context: Context) -> None:
    """Write ``events.parquet`` and ``report.json`` of a day, or the whole data set below ``dataset``."""
    source = dataset_source(context.recipe.dataset)
    if isinstance(source, Partitioned):
        source.load_day(str(context.partition)).save(context.out / DAY, context.out / REPORT)
    else:
        write_dataset(source.load(), context.out / DATASET)
