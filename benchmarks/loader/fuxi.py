# SPDX-License-Identifier: Apache-2.0
"""FuxiCTR's loader as a contestant, in its own environment: ``RankDataLoader(data_format="parquet")``, which reads through Ray.

``padded``: rows as integers, shuffled. ``raw``: its `FeatureProcessor`, fitted before, and its ``transform``, which writes Parquet
through Ray, and then the same loader. Ray may use as many cores as the contestant.
"""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # on all sides: Arrow's own keeps what was freed

from benchmarks.loader.contest import Contestant, Seen, use_cores

if __name__ == "__main__":
    use_cores(int(os.environ["OMP_NUM_THREADS"]))
    os.environ["POLARS_MAX_THREADS"] = os.environ["OMP_NUM_THREADS"]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
import torch
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor
from fuxictr.preprocess.build_dataset import transform
from fuxictr.pytorch.dataloaders import RankDataLoader

from benchmarks.loader.data import BATCH, CATEGORICAL, DENSE, FILE_ROWS, LABEL, LIST, TAGS, VALUES
from benchmarks.worker import serve

Batch = dict[str, torch.Tensor]


def padded(folder: Path) -> Iterator[Batch]:
    """From integers."""
    columns = FeatureMap("contest", str(folder))
    columns.labels = [LABEL]
    columns.features.update({name: {"type": "numeric"} for name in DENSE})
    columns.features.update({name: {"type": "categorical", "vocab_size": VALUES + 2} for name in CATEGORICAL})
    columns.features[TAGS] = {"type": "sequence", "max_len": LIST, "vocab_size": VALUES + 2}
    return _batches(columns, folder / "padded")


def _batches(columns: FeatureMap, folder: Path) -> Iterator[Batch]:
    loader, _ = RankDataLoader(columns, stage="train", train_data=str(folder), batch_size=BATCH, shuffle=True, data_format="parquet")
    return iter(loader)


class Raw:
    """Strings to integers, and then the loader."""

    def __init__(self, work: Path) -> None:
        common = {"active": True, "dtype": "str"}
        features = [{**common, "name": name, "type": "categorical"} for name in CATEGORICAL]
        features += [{**common, "name": name, "type": "numeric", "dtype": "float"} for name in DENSE]
        features += [{**common, "name": TAGS, "type": "sequence", "splitter": "^", "max_len": LIST, "padding": "post", "dtype": "list"}]
        label = {"name": LABEL, "dtype": "float"}
        self._processor = FeatureProcessor(features, label, dataset_id="contest", data_root=str(work))
        self._output = work / "contest" / "train"

    def prepare(self, folder: Path) -> None:
        """Fit the processor."""
        self._processor.fit(self._read(folder))

    def __call__(self, folder: Path) -> Iterator[Batch]:
        """Encode, write, read."""
        shutil.rmtree(self._output, ignore_errors=True)
        transform(self._processor, self._read(folder), split="train", block_size=FILE_ROWS)
        return _batches(self._processor.feature_map, self._output)

    def _read(self, folder: Path) -> Any:
        return self._processor.preprocess(self._processor.read_data(str(folder / "raw"), data_format="parquet"))


def see(batch: Batch) -> Seen:
    """Of a batch."""
    dense = np.stack([batch[name].numpy() for name in DENSE], axis=1)
    return Seen({name: batch[name].numpy() for name in (*CATEGORICAL, TAGS)}, dense, batch[LABEL].numpy())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.getLogger().setLevel(logging.ERROR)
    ray.init(num_cpus=int(os.environ["OMP_NUM_THREADS"]), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    raw = Raw(Path(sys.argv[1]))
    serve(Contestant({"padded": padded, "raw": raw}, see, raw.prepare).handle)
