# SPDX-License-Identifier: Apache-2.0
"""torch-rechub's loaders as contestants, in its own environment.

``flat``: its `ParquetIterableDataset` in PyTorch's `DataLoader`, as its documentation has it. It does not shuffle, and all numbers come as
float32. Its 0.9.0 takes a column of lists for the whole row group's wherever a batch is a part of one, so that the places of lists are
columns, put together here; that is faster, too. ``in_memory``: its `DataGenerator`, which shuffles rows that are in memory. ``raw``:
strings become integers by a `LabelEncoder` for each column, as in its examples, are written as Parquet and read by the first, which is
faster than the second.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # on all sides: Arrow's own keeps what was freed

from benchmarks.loader.contest import Contestant, Seen, use_cores

if __name__ == "__main__":
    use_cores(int(os.environ["OMP_NUM_THREADS"]))

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.preprocessing import LabelEncoder
from torch.utils.data import DataLoader
from torch_rechub.data.dataset import ParquetIterableDataset
from torch_rechub.utils.data import DataGenerator

from benchmarks.loader.data import BATCH, CATEGORICAL, DENSE, ENCODED, GROUP_ROWS, LABEL, LIST, PLACES, TAGS, files
from benchmarks.worker import serve

Batch = dict[str, torch.Tensor]


def flat(folder: Path) -> Iterator[Batch]:
    """Streamed, in the order of the files."""
    for batch in DataLoader(ParquetIterableDataset(files(folder / "flat"), batch_size=BATCH), batch_size=None):
        batch[TAGS] = torch.stack([batch.pop(name) for name in PLACES], dim=1)
        yield batch


def in_memory(folder: Path) -> Iterator[list[Any]]:
    """Shuffled in memory."""
    table = pq.read_table(folder / "flat")
    inputs = {name: table[name].to_numpy() for name in (*CATEGORICAL, *DENSE)}
    inputs[TAGS] = np.stack([table[name].to_numpy() for name in PLACES], axis=1)
    none = {"x_val": {LABEL: []}, "y_val": [], "x_test": {LABEL: []}, "y_test": []}
    loader, _, _ = DataGenerator(inputs, table[LABEL].to_numpy()).generate_dataloader(**none, batch_size=BATCH)
    return iter(loader)


class Raw:
    """Strings to integers, one file at a time, and then `flat`."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._encoders: dict[str, LabelEncoder] = {}

    def prepare(self, folder: Path) -> None:
        """Fit the encoders."""
        for name in (*CATEGORICAL, TAGS):
            column = pq.read_table(folder / "raw", columns=[name])[name]
            values = pa.chunked_array([chunk.flatten() for chunk in column.chunks]) if name == TAGS else column.fill_null("")
            self._encoders[name] = LabelEncoder().fit(values.unique().to_numpy(zero_copy_only=False))

    def __call__(self, folder: Path) -> Iterator[Batch]:
        """Encode, write, read."""
        to = self._work / "flat"
        to.mkdir(parents=True, exist_ok=True)
        for old in files(to):
            Path(old).unlink()
        for file in files(folder / "raw"):
            pq.write_table(self._encoded(pd.read_parquet(file)), to / Path(file).name, row_group_size=GROUP_ROWS, **ENCODED)
        return flat(self._work)

    def _encoded(self, frame: pd.DataFrame) -> pa.Table:
        columns: dict[str, Any] = {name: frame[name].fillna(0).to_numpy() for name in DENSE}
        for name in CATEGORICAL:
            columns[name] = self._encoders[name].transform(frame[name].fillna("").to_numpy())
        lists = frame[TAGS]
        lengths = lists.str.len().to_numpy()
        matrix = np.zeros((len(frame), LIST), dtype=np.int64)
        matrix[np.arange(LIST) < lengths[:, None]] = self._encoders[TAGS].transform(np.concatenate(lists.to_numpy())) + 1
        columns |= {name: matrix[:, i] for i, name in enumerate(PLACES)}
        return pa.table(columns | {LABEL: frame[LABEL].to_numpy()})


def see(batch: Any) -> Seen:
    """Of a batch of either loader."""
    inputs, labels = (batch, batch[LABEL]) if isinstance(batch, dict) else batch
    dense = np.stack([inputs[name].numpy() for name in DENSE], axis=1)
    return Seen({name: inputs[name].numpy() for name in (*CATEGORICAL, TAGS)}, dense, labels.numpy())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    raw = Raw(Path(sys.argv[1]))
    ways = {"flat": flat, "in_memory": in_memory, "raw": raw}
    serve(Contestant(ways, see, raw.prepare).handle)
