# SPDX-License-Identifier: Apache-2.0
"""A small planted data set with the columns of MovieLens-100K: to try a recipe in seconds, offline, and to test one."""

from datetime import UTC, datetime
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.schema import Kind
from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema, InteractionsSchema, ItemsSchema, SourceColumn, TimeColumn, TimeUnit, UsersSchema
from recsys.data.ingest.canonical import canonicalise
from recsys.data.ingest.source import RawTable

GENRES = ("Comedy", "Drama", "Horror", "Western", "Musical")
_BEGIN = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp())

SCHEMA = DatasetSchema(
    interactions=InteractionsSchema(
        event_time=TimeColumn(column="timestamp", unit=TimeUnit.SECONDS), values=(SourceColumn(name="rating", kind=Kind.LABEL),)
    ),
    items=ItemsSchema(
        attributes=(
            SourceColumn(name="title", kind=Kind.TEXT),
            SourceColumn(name="year", kind=Kind.DENSE),
            SourceColumn(name="genres", kind=Kind.BAG, separator=" "),
        )
    ),
    users=UsersSchema(
        attributes=(
            SourceColumn(name="age", kind=Kind.DENSE),
            SourceColumn(name="gender", kind=Kind.CATEGORICAL),
            SourceColumn(name="occupation", kind=Kind.CATEGORICAL),
        )
    ),
)


@register("dataset", "synthetic")
class Synthetic:
    """Users with one favourite genre each, who mostly choose within it, walk through it in the order of the items, and like it.

    Users arrive one after another, so that a split by time leaves users whom training never saw. Some events share user and second.
    """

    class Config(BaseConfig):
        """Sizes and ``seed``."""

        name: Literal["synthetic"] = "synthetic"
        users: int = Field(150, ge=10)
        items: int = Field(100, ge=10)
        events_per_user: int = Field(30, ge=5)
        seed: int = 0

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> Dataset:
        """The data set; equal for equal configurations."""
        config, random = self.config, np.random.default_rng(self.config.seed)
        taste = random.integers(len(GENRES), size=config.users)
        genre = np.arange(config.items) % len(GENRES)
        user = np.repeat(np.arange(config.users), config.events_per_user)
        item = np.concatenate([self._walk(random, np.flatnonzero(genre == taste[u])) for u in range(config.users)])
        liked = random.random(len(user)) < np.where(genre[item] == taste[user], 0.85, 0.2)
        start = np.sort(random.integers(0, 30 * 86400, config.users))[user]
        pace = random.integers(0, 3600, len(user))
        pace[random.random(len(user)) < 0.3] = 0
        elapsed = np.cumsum(pace.reshape(config.users, -1), axis=1).ravel()
        interactions = pl.DataFrame(
            {
                "user_id": user.astype(str),
                "item_id": item.astype(str),
                "timestamp": _BEGIN + start + elapsed,
                "rating": np.where(liked, 5.0, 2.0),
            }
        )
        items = pl.DataFrame(
            {
                "item_id": np.arange(config.items).astype(str),
                "title": [f"{GENRES[g]} No. {i}" for i, g in enumerate(genre)],
                "year": 1950.0 + np.arange(config.items) % 70,
                "genres": [GENRES[g] for g in genre],
            }
        )
        users = pl.DataFrame(
            {
                "user_id": np.arange(config.users).astype(str),
                "age": random.integers(18, 80, config.users).astype(float),
                "gender": np.where(taste % 2 == 0, "F", "M"),
                "occupation": random.choice(["writer", "farmer", "pilot"], config.users),
            }
        )
        tables = (RawTable(f"synthetic {name}", frame) for name, frame in (("events", interactions), ("items", items), ("users", users)))
        return canonicalise("synthetic", SCHEMA, *tables)

    def _walk(self, random: np.random.Generator, favourites: np.ndarray) -> np.ndarray:
        """Distinct items: steps through the favourites from a random place, with an item from anywhere now and then."""
        count = self.config.events_per_user
        place, chosen = int(random.integers(len(favourites))), dict[int, None]()
        while len(chosen) < min(count, self.config.items):
            place += 1
            stray = random.random() < 0.25 or len(chosen) >= len(favourites)
            chosen[int(random.integers(self.config.items)) if stray else int(favourites[place % len(favourites)])] = None
        return np.resize(np.array(list(chosen), np.int64), count)
