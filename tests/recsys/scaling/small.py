# SPDX-License-Identifier: Apache-2.0
"""A small catalogue with text and histories that walk through it, in two Parquet files; and a plan over them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.components import component_config
from recsys.core.config import Config, parse
from recsys.scaling import HistoriesData

ITEMS, USERS = 30, 40
WORDS = ("red", "blue", "soap", "cream", "oil", "hair", "lip", "nail")
TRAINER = {"epochs": 2, "optimizer": {"name": "adam", "learning_rate": 0.01}}
SECTIONS: dict[str, Any] = {
    "text": {"encoder": {"name": "hashing", "dim": 16}, "columns": ["title"]},
    "codes": {"tokenizer": {"name": "fsq", "slots": 2, "levels": [4, 4], "heads": 2, "epochs": 2}},
    "collaborative": {"model": {"name": "sasrec", "dim": 8, "max_length": 5}, "training": {"batch_size": 32, "trainer": TRAINER}},
}
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"name": "sasrec", "dim": 8, "max_length": 5},
    "setrec": {"name": "setrec", "dim": 8, "max_length": 5, "semantic_tokens": 2, "ae_hidden": [8]},
    "recgpt": {"name": "recgpt", "dim": 8, "heads": 2, "blocks": 1, "max_length": 5, "temperature": 1.0},
}


class Recipe(Config):
    """What a recipe says of its data."""

    data: component_config("scaling_data")  # type: ignore[valid-type]


def write_histories(folder: Path, order: str = "position") -> dict[int, list[int]]:
    """Write the files; returns the items of each user, oldest first. Lines stand in no order; one user has two events only."""
    random = np.random.default_rng(0)
    walks: dict[int, list[int]] = {}
    for user in range(USERS):
        first, length = random.integers(ITEMS), 2 if user == 7 else random.integers(4, 10)
        walks[user] = [int((first + place) % ITEMS) for place in range(length)]
    lines = [(user, item, place) for user, items in walks.items() for place, item in enumerate(items)]
    users, items, places = (np.array(column) for column in zip(*[lines[i] for i in random.permutation(len(lines))], strict=True))
    when: Any = places
    if order == "event_time":
        when = pa.array(1_600_000_000 + 86_400 * places + 60 * users, pa.int64()).cast(pa.timestamp("s")).cast(pa.timestamp("us", tz="UTC"))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, order: when}), folder / "interactions.parquet")
    titles = [" ".join(np.random.default_rng([2, item]).choice(WORDS, 3)) for item in range(ITEMS)]
    pq.write_table(pa.table({"item_id": np.arange(ITEMS), "title": titles}), folder / "items.parquet")
    return walks


def source(folder: Path, **changed: Any) -> HistoriesData:
    """The files as a source, which knows text, codes and collaborative vectors."""
    settings = {"name": "histories", "path": str(folder), **SECTIONS, **changed}
    return HistoriesData(parse(Recipe, {"data": settings}, source="test").data)
