# SPDX-License-Identifier: Apache-2.0
"""What stands behind every server: the champion of one registry, over the same online store, in two ways.

``same``: what our own server computes for ``/v1/rank``: features read, users encoded once, the retriever's log-probabilities, the compiled
ranker, both combined. A batch of requests is one call.

``rows``: as a ranker is served by whoever has a model and a server: features are read, joined to one row for each candidate and encoded,
and the ranker itself, in eager PyTorch, predicts the rows of all requests of a batch. No retriever is asked.
"""

import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from recsys.core.schema import TIME
from recsys.inference import frame
from recsys.inference.recommender import Recommender
from recsys.registry import Location
from serving.engine import Hosting, RegistrySource
from serving.engine.candidates import padded

HOME, WAY, PORT = "SERVED_HOME", "SERVED_WAY", "SERVED_PORT"
"""Variables by which a peer's process is told the arguments of `load`, and where to listen."""
MODEL = "recsys"
CHAMPION = f"models:/{MODEL}@champion"


class Asked(NamedTuple):
    """A request: who, and which items are to be scored."""

    user_id: str
    item_ids: Sequence[str]

    @classmethod
    def of(cls, body: dict[str, Any]) -> "Asked":
        """From JSON."""
        return cls(body["user_id"], body["item_ids"])


Scores = Callable[[Sequence[Asked]], list[list[float]]]


# As many rows as our server has in a batch, and as long a wait for them.
BATCH_REQUESTS, BATCH_SECONDS = 4, 0.002


def of_environment() -> Scores:
    """What `load` gives for this process."""
    return load(Path(os.environ[HOME]), os.environ[WAY])


def load(home: Path, way: str) -> Scores:
    """Scores of a batch of requests, in the order of their items; warmed.

    Args:
        home: the folder of the registry.
        way: ``same`` or ``rows``.
    """
    torch.set_num_threads(1)
    source = RegistrySource(CHAMPION, Location.under(home), Hosting(mmap=True, compile=way == "same"))
    loaded = source.load(source.target())
    compute, turn = {"same": same, "rows": rows}[way], threading.Lock()

    def scores(asked: Sequence[Asked]) -> list[list[float]]:
        # One at a time: there is one core, and two threads in one compiled ranker would wait for each other without end.
        with turn:
            return [found.tolist() for found in compute(loaded.recommender, asked)]

    items = loaded.recommender.view.take(np.arange(min(500, loaded.recommender.view.count))).to_pylist()
    for size in (1, 2, 4, 1, 2, 4):
        scores([Asked(user, items) for user in (loaded.sample * size)[:size]])
    return scores


def same(recommender: Recommender, asked: Sequence[Asked]) -> list[np.ndarray]:
    """See the module: what a list is sorted by."""
    users = recommender.users([one.user_id for one in asked], now(len(asked)))
    wanted = [recommender.view.rows(list(one.item_ids)) for one in asked]
    candidates = recommender.score(users, padded(wanted, -1, np.int64))
    ranked = recommender.rank(users, candidates, recommender.items(users, candidates))
    return [ranked.score[b, : len(own)] for b, own in enumerate(wanted)]


@torch.inference_mode()
def rows(recommender: Recommender, asked: Sequence[Asked]) -> list[np.ndarray]:
    """See the module: the ranker's calibrated probabilities."""
    bundle, reader, at = recommender.bundle, recommender.features, now(len(asked))
    lengths = [len(one.item_ids) for one in asked]
    user_of_row = np.repeat(np.arange(len(asked)), lengths)
    users = frame.read_users(reader, pa.array([one.user_id for one in asked]), at)
    items = frame.read_items(reader, pa.array([item for one in asked for item in one.item_ids]), at.take(pa.array(user_of_row)))
    table = frame.join(users, user_of_row, items)
    task, column = bundle.encoder.spec.tasks.index(bundle.settings.task), bundle.calibration.column
    predicted = bundle.ranker.predict(bundle.encoder.transform(table))[:, task].numpy()
    probability = bundle.calibration.apply(predicted, None if column is None else table.column(column))
    return np.split(np.asarray(probability, np.float32), np.cumsum(lengths)[:-1])


def now(count: int) -> pa.Array:
    """The time, for each of some requests."""
    return pa.array([datetime.now(UTC)] * count, TIME)
