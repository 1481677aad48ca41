# SPDX-License-Identifier: Apache-2.0
"""Our loader as a contestant: `ParquetLoader` with an `Encoder` on raw rows, and with `EncodedColumns` on encoded ones.

``raw``, ``encoded``: shuffled. ``raw_ahead``, ``encoded_ahead``: and a thread prepares four batches ahead. ``encoded_in_order``: as the
files have them.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # on all sides: Arrow's own keeps what was freed

from benchmarks.loader.contest import Contestant, Seen, use_cores

if __name__ == "__main__":
    use_cores(int(os.environ["OMP_NUM_THREADS"]))
    os.environ["POLARS_MAX_THREADS"] = os.environ["OMP_NUM_THREADS"]  # read when Polars is imported

import pyarrow.parquet as pq

from benchmarks.loader.data import BATCH, CATEGORICAL, DENSE, FIRST, LABEL, TAGS, VALUES
from benchmarks.worker import serve
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.encoded import EncodedColumns
from recsys.data.encoding.config import EncoderConfig
from recsys.data.loader import ParquetLoader, RowEncoder
from recsys.data.spec import InputSpec, TableSpec

SPEC = InputSpec(
    tables=tuple(TableSpec(name=key, rows=FIRST + VALUES, bags=(key,)) for key in (*CATEGORICAL, TAGS)), dense=DENSE, tasks=(LABEL,)
)


def config() -> EncoderConfig:
    """Vocabularies for strings, numbers as they are."""
    features: list[dict[str, Any]] = [{"kind": "categorical", "feature": name} for name in CATEGORICAL]
    features += [{"kind": "bag", "feature": TAGS}]
    features += [{"kind": "dense", "feature": name, "standardize": False, "indicator": False} for name in DENSE]
    return EncoderConfig.model_validate({"features": features, "tasks": [{"name": LABEL, "feature": LABEL}]})


class Ours:
    """The loaders, with one encoder for all raw rows, and windows of two row groups.

    Args:
        folder: of the encoder, which another process may have fitted: it is then read where it is first asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._encoder: Encoder | None = None

    def prepare(self, folder: Path) -> None:
        """Fit the encoder on all raw rows of a folder, and save it."""
        self._encoder = Encoder.fit(config(), pq.read_table(folder / "raw"))
        self._encoder.save(self._folder)

    def raw(self, folder: Path, **options: Any) -> Iterator[RankingBatch]:
        """From strings."""
        self._encoder = self._encoder or Encoder.load(self._folder)
        return _batches(folder / "raw", self._encoder, **options)

    def encoded(self, folder: Path, **options: Any) -> Iterator[RankingBatch]:
        """From integers."""
        return _batches(folder / "encoded", EncodedColumns(SPEC), **options)


def _batches(folder: Path, encoder: RowEncoder[RankingBatch], **options: Any) -> Iterator[RankingBatch]:
    loader: ParquetLoader[RankingBatch] = ParquetLoader(folder, encoder, batch_size=BATCH, buffer_groups=2, **options)
    return iter(loader)


def see(batch: RankingBatch) -> Seen:
    """Of our batch."""
    assert batch.labels is not None
    jagged = batch.sparse.to_dict()
    return Seen({key: jagged[key].values().numpy() for key in jagged}, batch.dense.numpy(), batch.labels[:, 0].numpy())


def contestant(encoder: Path) -> Contestant:
    """All ways, which read a fitted encoder from a folder or write it there."""
    ours = Ours(encoder)
    ways = {
        "raw": ours.raw,
        "raw_ahead": partial(ours.raw, prefetch=4),
        "encoded": ours.encoded,
        "encoded_ahead": partial(ours.encoded, prefetch=4),
        "encoded_in_order": partial(ours.encoded, shuffle=False),
    }
    return Contestant(ways, see, ours.prepare)


if __name__ == "__main__":
    serve(contestant(Path(sys.argv[1])).handle)
