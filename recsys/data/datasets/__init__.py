# SPDX-License-Identifier: Apache-2.0
"""The data sets that ship with the framework, by their names. Importing this package registers all of them."""

from recsys.data.dataset import Dataset, IngestReport, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.datasets.base import DatasetSource, load_dataset
from recsys.data.datasets.ingested import Ingested
from recsys.data.datasets.movielens_100k import MovieLens100K
from recsys.data.datasets.synthetic import Synthetic

__all__ = [
    "Dataset",
    "DatasetSchema",
    "DatasetSource",
    "IngestReport",
    "Ingested",
    "MovieLens100K",
    "Synthetic",
    "TableCounts",
    "Treatment",
    "load_dataset",
]
