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
from recsys.data.leave_one_out import LeaveOneOut, hold_out, leave_one_out
from recsys.data.sequences import SequenceData
from recsys.text import item_text

CACHE = Path(__file__).parents[2] / ".cache" / "retrieval_quality"


@dataclass(frozen=True)
class Source:
    """Where a data set stands below ``RECSYS_DATA``, which columns say what an item is, and the share of items that are new in test."""

    folder: str
    text: tuple[str, ...]
    held_out: float = 0.0


SOURCES: Mapping[str, Source] = {
    "beauty": Source("amazon2014_beauty", ("title", "brand", "categories")),
    "beauty_new_items": Source("amazon2014_beauty", ("title", "brand", "categories"), held_out=0.05),
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
        columns: what they were made of.
        cache: for what is encoded.
        held_out: the share of the items, drawn with seed 0, that are new in test.
        users: the share of the users, drawn with seed 0, whose events train.
    """

    name: str
    fingerprint: str
    data: SequenceData
    texts: tuple[str, ...]
    columns: tuple[str, ...] = ()
    cache: Path = CACHE
    held_out: float = 0.0
    users: float = 1.0

    @property
    def count(self) -> int:
        """N."""
        return len(self.texts)

    @cached_property
    def split(self) -> LeaveOneOut:
        """Training, validation and test."""
        split = leave_one_out(self.data)
        if self.held_out:
            drawn = np.random.default_rng(0).choice(self.count, int(self.held_out * self.count), replace=False)
            split = hold_out(split, drawn)
        if self.users < 1:
            train = split.train
            chosen = np.random.default_rng(0).random(len(train.users)) < self.users
            split = split._replace(train=train.where(chosen[train.owner]))
        return split

    @cached_property
    def warm(self) -> Tensor:
        """bool ``[N]``: items with training events."""
        return torch.from_numpy(self.split.train.occurring(self.count))


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
    texts = tuple(item_text(items.to_arrow(), source.text))
    return Dataset(name, "+".join(sha256_file(file)[:16] for file in files), data, texts, source.text, cache, source.held_out)
