# SPDX-License-Identifier: Apache-2.0
"""MovieLens ratings as impressions: is a rating at least 4, given the user, the film, and what the user rated in earlier seconds?"""

import hashlib

import numpy as np
import polars as pl
import pyarrow as pa

from recsys.core.schema import EVENT_TIME, TIME
from recsys.data.datasets.impressions import (
    LABEL,
    Impressions,
    ImpressionSource,
    data_folder,
    earlier_events,
    files_fingerprint,
    last_events,
)
from recsys.data.datasets.movielens_100k import MovieLens100K, default_cache, installed_files, wheel_files
from recsys.data.encode import Encoder
from recsys.data.encoding.config import EncoderConfig
from recsys.data.splits import global_time_split, order_events

HISTORY, LONG = 50, 400  # events of a history
_LIKED = 4
_FILES = ("interactions.parquet", "items.parquet", "users.parquet", "ratings_sample.parquet")
_AGES = (1, 18, 25, 35, 45, 50, 56)  # MovieLens-1M's brackets, by their least age
_VALID = _TEST = 0.1


def encoder(longest: int) -> EncoderConfig:
    """The features, with histories of at most so many events."""
    # No user ids: after a split by time four in five users of the validation period are not in train, and a model learns the others by
    # heart within an epoch. A user is who they are and what they saw. An item that train holds once is left out of the vocabulary, so
    # that the row of unknown ones is trained, too.
    return Encoder.Config.model_validate(
        {
            "features": [
                *({"kind": "categorical", "feature": name} for name in ("gender", "age", "occupation", "zip")),
                {"kind": "bag", "feature": "genres"},
                {"kind": "bucket", "feature": "year", "buckets": 20},
                {
                    "kind": "sequence",
                    "name": "history",
                    "items": "history_item",
                    "target": "item_id",
                    "max_length": longest,
                    "extra": [{"feature": "history_rating", "values": [1, 2, 3, 4, 5]}],
                    "min_count": 2,
                },
            ],
            "tasks": [{"name": "like", "feature": LABEL}],
            "groups": {
                "gender": ("gender",),
                "age": ("age",),
                "work": ("occupation", "zip"),
                "item": ("item_id",),
                "genres": ("genres",),
                "year": ("year",),
                "history": ("history",),
            },
        }
    )


def _impressions(
    name: str, events: pl.DataFrame, rows: pl.DataFrame, items: pl.DataFrame, users: pl.DataFrame, longest: int = HISTORY
) -> Impressions:
    """Join, give each row its history, and split by time.

    Args:
        name: of the data set.
        events: user_id, item_id, position (from 0 for each user, without gaps), rating (null where unknown): all that was ever rated.
        rows: user_id, item_id, rating, second, position (null where unknown): what becomes an impression.
        items: item_id, year, genres.
        users: user_id, gender, age (a bracket), occupation, zip.
        longest: the most events of a history.
    """
    events = events.sort("user_id", "position")
    counts = events.group_by("user_id", maintain_order=True).len()
    first_of = dict(zip(counts["user_id"], np.cumsum(counts["len"].to_numpy()) - counts["len"].to_numpy(), strict=True))
    user = rows["user_id"].to_numpy()
    count = earlier_events(user, rows["second"].to_numpy(), rows["position"].fill_null(-1).to_numpy())
    first = np.array([first_of.get(u, 0) for u in user.tolist()], dtype=np.int64)
    picks, offsets = last_events(first, count, longest)
    history = {column: events[column].gather(pl.Series(picks, dtype=pl.UInt32)) for column in ("item_id", "rating")}
    joined = rows.join(items, on="item_id", how="left", maintain_order="left").join(users, on="user_id", how="left", maintain_order="left")
    table = pa.table(
        {
            **{name: joined[name].cast(pl.String).to_arrow() for name in ("user_id", "gender", "age", "occupation", "item_id")},
            "zip": joined["zip"].cast(pl.String).str.head(2).to_arrow(),
            "year": joined["year"].cast(pl.Float64).to_arrow(),
            "genres": joined["genres"].to_arrow(),
            "history_item": pa.LargeListArray.from_arrays(offsets, history["item_id"].cast(pl.String).to_arrow()),
            "history_rating": pa.LargeListArray.from_arrays(offsets, history["rating"].cast(pl.Float64).to_arrow()),
            LABEL: (joined["rating"] >= _LIKED).cast(pl.Float32).to_arrow(),
            EVENT_TIME: pa.array(joined["second"].cast(pl.Int64).to_numpy() * 1_000_000).cast(TIME),
        }
    )
    return Impressions(name, global_time_split(table.column(EVENT_TIME), _VALID, _TEST).parts(table), encoder(longest))


def _movielens_1m(name: str = "movielens_1m", longest: int = HISTORY) -> Impressions:
    folder = data_folder("ml_1m")
    events, items, users, rated = (pl.read_parquet(folder / name) for name in _FILES)
    rows = rated.rename({"timestamp": "second"})
    known = rows.filter(pl.col("position").is_not_null()).select("user_id", "position", "rating")
    events = events.join(known, on=["user_id", "position"], how="left", maintain_order="left")
    return _impressions(name, events, rows, items.select("item_id", "year", "genres"), users, longest)


def _movielens_100k() -> Impressions:
    data = MovieLens100K(MovieLens100K.Config()).load()
    ordered = pl.DataFrame(order_events(data.interactions, seed=0).select(["user_id", "item_id", "rating", EVENT_TIME, "position"]))
    rows = ordered.with_columns(pl.col("user_id").cast(pl.Int64), second=pl.col(EVENT_TIME).dt.epoch("s"))
    assert data.users is not None
    bracket = pl.lit(_AGES[0])
    for least in _AGES[1:]:
        bracket = pl.when(pl.col("age") >= least).then(pl.lit(least)).otherwise(bracket)
    users = pl.DataFrame(data.users).select(pl.col("user_id").cast(pl.Int64), "gender", bracket.alias("age"), "occupation", "zip")
    items = pl.DataFrame(data.items).select("item_id", "year", "genres")
    return _impressions("movielens_100k", rows.select("user_id", "item_id", "position", "rating"), rows, items, users)


def _movielens_100k_fingerprint() -> str:
    files = installed_files() or wheel_files(default_cache())
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files.values())).hexdigest()


MOVIELENS_1M = ImpressionSource(lambda: files_fingerprint("ml_1m", _FILES), _movielens_1m)
"""100,000 ratings of MovieLens-1M with their history, from ``$RECSYS_DATA/ml_1m``.

The source knows rating and time of a random tenth of the ratings, and the order of all. So the rows are that tenth, and histories are drawn
from all 999,611 events: those that `earlier_events` can prove to be of an earlier second. On average that leaves out the last few. A
history's rating is null, row 0 of its table, where the source does not know it.
"""

MOVIELENS_1M_LONG = ImpressionSource(MOVIELENS_1M.fingerprint, lambda: _movielens_1m("movielens_1m_long", LONG))
"""The same rows with the last 400 events of each history, for what long ones are worth."""

MOVIELENS_100K = ImpressionSource(_movielens_100k_fingerprint, _movielens_100k)
"""All ratings of MovieLens-100K with their history; the wheel that holds them is fetched once."""
