# SPDX-License-Identifier: Apache-2.0
"""The data sets that ship with the framework, by their names. Importing this package registers all of them."""

from recsys.data.dataset import Dataset, IngestReport, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.datasets.base import DatasetSource, FromFiles, Partitioned, Versioned, dataset_source, load_dataset
from recsys.data.datasets.daily import Daily
from recsys.data.datasets.delta import Delta
from recsys.data.datasets.ingested import Ingested
from recsys.data.datasets.movielens_100k import MovieLens100K
from recsys.data.datasets.synthetic import Synthetic

__all__ = [
    "Daily",
    "Dataset",
    "DatasetSchema",
    "DatasetSource",
    "Delta",
    "FromFiles",
    "IngestReport",
    "Ingested",
    "MovieLens100K",
    "Partitioned",
    "Synthetic",
    "TableCounts",
    "Treatment",
    "Versioned",
    "dataset_source",
    "load_dataset",
]
