# SPDX-License-Identifier: Apache-2.0
"""From the days of a data set to one data set, its events in order, and a split in time."""

from pipelines.graph.step import Context
from pipelines.steps.ingest import DATASET, DAY, REPORT
from pipelines.steps.prepared import split_events
from recsys.data.datasets.base import Partitioned, dataset_source
from recsys.data.ingest.days import DayEvents
from recsys.data.ingest.store import read_dataset


def run(context: Context) -> None:
    """Join the days that were ingested and found to be in order, and split them."""
    recipe, days = context.recipe, context.parts["ingest"]
    source = dataset_source(recipe.dataset)
    daily = isinstance(source, Partitioned)
    if isinstance(source, Partitioned):
        dataset = source.join({day: DayEvents.load(place / DAY, place / REPORT) for day, place in days.items()})
    else:
        (only,) = days.values()
        dataset = read_dataset(only / DATASET)
    split_events(dataset, recipe.split, recipe.seed, daily=daily).save(context.out)
