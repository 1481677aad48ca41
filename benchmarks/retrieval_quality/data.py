# SPDX-License-Identifier: Apache-2.0
"""The data sets: histories of which only the order is known, split by leaving out each user's last events, and the texts of their items."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys.core.errors import DataError
from recsys.core.files import sha256_file
from recsys.data.datasets.impressions import data_folder
from recsys.data.jagged import Jagged
from recsys.data.leave_one_out import LeaveOneOut, leave_one_out
from recsys.data.sequences import SequenceData
from recsys.text import encode_cached, item_text
from recsys.text.minilm import MiniLM

CACHE = Path(__file__).parents[2] / ".cache" / "retrieval_quality"


@dataclass(frozen=True)
class Source:
    """Where a data set stands below ``RECSYS_DATA``, and which columns say what an item is."""

    folder: str
    text: tuple[str, ...]


SOURCES: Mapping[str, Source] = {
    "beauty": Source("amazon2014_beauty", ("title", "brand", "categories")),
    "video_games": Source("amazon2018_video_games", ("title",)),
    "ml_1m": Source("ml_1m", ("title", "genres", "year")),
}


@dataclass(frozen=True)
class Dataset:
    """Histories over a catalogue.

    Attributes:
        name: of the data set.
        fingerprint: of its files.
        data: all events.
        texts: one for each catalogue row.
        cache: for what is encoded.
    """

    name: str
    fingerprint: str
    data: SequenceData
    texts: tuple[str, ...]
    cache: Path = CACHE

    @property
    def count(self) -> int:
        """N."""
        return len(self.texts)

    @cached_property
    def split(self) -> LeaveOneOut:
        """Training, validation and test."""
        return leave_one_out(self.data)

    @cached_property
    def warm(self) -> Tensor:
        """bool ``[N]``: items with training events."""
        return torch.from_numpy(np.bincount(self.split.train.items, minlength=self.count) > 0)

    @cached_property
    def text(self) -> Tensor:
        """float32 ``[N, 384]``: the packaged encoder's embeddings."""
        return torch.from_numpy(encode_cached(MiniLM(MiniLM.Config()), self.texts, self.cache / "text"))


def load(name: str, cache: Path = CACHE) -> Dataset:
    """A data set by its name.

    Raises:
        ValueError: there is none of this name.
        DataError: its files are not there, or an event's item is not among the items.
    """
    if name not in SOURCES:
        raise ValueError(f"data: expected one of {', '.join(SOURCES)}, got {name!r}")
    source = SOURCES[name]
    folder = data_folder(source.folder)
    files = [folder / file for file in ("interactions.parquet", "items.parquet")]
    events = pl.read_parquet(files[0]).sort("user_id", "position")
    items = pl.read_parquet(files[1]).sort("item_id")
    ids, wanted = items["item_id"].to_numpy(), events["item_id"].to_numpy()
    rows = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    if (ids[rows] != wanted).any():
        raise DataError(f"{files[0]}: item {wanted[ids[rows] != wanted][0]} is not in {files[1].name}")
    users, lengths = np.unique(events["user_id"].to_numpy(), return_counts=True)
    data = SequenceData.from_order([str(user) for user in users], Jagged(rows, np.concatenate([[0], np.cumsum(lengths)])))
    return Dataset(name, "+".join(sha256_file(file)[:16] for file in files), data, tuple(item_text(items.to_arrow(), source.text)), cache)
