# SPDX-License-Identifier: Apache-2.0
"""Real impressions as sources for sweeps: a data set by its name, or a folder of rows that are encoded already.

The folder holds ``spec.json`` (an `InputSpec`), ``train.parquet``, ``valid.parquet`` and ``test.parquet``. A column is named by its
key: table rows as int64 lists for the keys of bags and sequences, float32 for dense columns and tasks. `write_encoded` makes one of
batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.config import parse
from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.files import read_json, sha256_file, write_json
from recsys.data.batch import RankingBatch
from recsys.data.datasets.frappe import FRAPPE
from recsys.data.datasets.impressions import ImpressionSource
from recsys.data.datasets.movielens_impressions import MOVIELENS_1M, MOVIELENS_1M_LONG, MOVIELENS_100K
from recsys.data.encode import Encoder
from recsys.data.encoded import EncodedColumns
from recsys.data.loader import TableLoader
from recsys.data.spec import InputSpec
from recsys.data.splits import PARTS

SOURCES: Mapping[str, ImpressionSource] = {
    "frappe": FRAPPE,
    "movielens_1m": MOVIELENS_1M,
    "movielens_1m_long": MOVIELENS_1M_LONG,
    "movielens_100k": MOVIELENS_100K,
}


class TableData(ABC):
    """Rows in Arrow tables, a column of table rows or of numbers for each key; see `recsys.scaling.data.ScalingData`.

    Attributes:
        spec: the inputs.
    """

    spec: InputSpec

    @property
    @abstractmethod
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the content of every batch."""

    @property
    @abstractmethod
    def tables(self) -> Mapping[str, pa.Table]:
        """``train``, ``valid`` and ``test``."""

    def train(self, rows: int, seed: int, batch_size: int) -> TableLoader[RankingBatch]:
        """The first ``rows`` of the seed's permutation of the training rows, in an order of its own in every epoch."""
        table = self.tables["train"]
        if rows > table.num_rows:
            raise DataError(f"rows: there are {table.num_rows} training rows, got {rows}")
        chosen = np.random.default_rng([seed, 0]).permutation(table.num_rows)[:rows]
        return TableLoader(table.take(pa.array(chosen)), self.batch, batch_size=batch_size, seed=seed)

    def valid(self, batch_size: int) -> Iterator[RankingBatch]:
        """See `ScalingData.valid`."""
        return self._held_out("valid", batch_size)

    def test(self, batch_size: int) -> Iterator[RankingBatch]:
        """See `ScalingData.test`."""
        return self._held_out("test", batch_size)

    def references(self) -> dict[str, float]:
        """Nothing is known."""
        return {}

    def batch(self, table: pa.Table) -> RankingBatch:
        """Rows as a ranker takes them."""
        return EncodedColumns(self.spec).transform(table)

    def _held_out(self, part: str, batch_size: int) -> Iterator[RankingBatch]:
        table = self.tables[part]
        return (self.batch(table.slice(start, batch_size)) for start in range(0, table.num_rows, batch_size))


@register("scaling_data", "encoded")
class EncodedData(TableData):
    """A folder of encoded rows as a source.

    Raises:
        DataError: a file is missing.
        SchemaError: a file lacks a column, or has it in another type.
    """

    class Config(BaseConfig):
        """Where the rows are.

        Attributes:
            path: the folder.
        """

        name: Literal["encoded"] = "encoded"
        path: Path

    def __init__(self, config: Config) -> None:
        self.config = config
        for file in ("spec.json", *(f"{part}.parquet" for part in PARTS)):
            if not (config.path / file).is_file():
                raise DataError(f"{config.path}: expected spec.json and train, valid and test.parquet; there is no {file}")
        path = config.path / "spec.json"
        self.spec = parse(InputSpec, read_json(path), source=str(path))

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """The content of the files."""
        return {file: sha256_file(self.config.path / file) for file in ("spec.json", *(f"{part}.parquet" for part in PARTS))}

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The files."""
        expected = dict.fromkeys((*self.spec.bag_keys, *self.spec.sequence_keys), pa.list_(pa.int64()))
        expected |= dict.fromkeys((*self.spec.dense, *self.spec.tasks), pa.float32())
        tables = {}
        for part in PARTS:
            path = self.config.path / f"{part}.parquet"
            table = pq.read_table(path)
            for name, kind in expected.items():
                if name not in table.column_names:
                    raise SchemaError(f"{path}: missing column: {unknown('column', name, table.column_names)}")
                found = table.schema.field(name).type
                same = pa.types.is_list(found) and found.value_type == pa.int64() if pa.types.is_list(kind) else found == kind
                if not same or table[name].null_count:
                    raise SchemaError(f"{path}: column {name!r}: expected {kind} without nulls, got {found}")
            tables[part] = table.select(list(expected)).combine_chunks()
        return tables


@register("scaling_data", "impressions")
class ImpressionsData(TableData):
    """A data set of labelled rows by its name, read from ``$RECSYS_DATA`` and encoded when it is first asked for rows.

    Raises:
        DataError: its files are not there.
    """

    class Config(BaseConfig):
        """Which one.

        Attributes:
            dataset: its name. All have their split, and their encoder, which is fitted on train.
        """

        name: Literal["impressions"] = "impressions"
        dataset: Literal["frappe", "movielens_1m", "movielens_1m_long", "movielens_100k"]

    def __init__(self, config: Config) -> None:
        self.config = config
        impressions = SOURCES[config.dataset].load()
        self._encoder = Encoder.fit(impressions.encoder, impressions.parts["train"])
        self._parts = impressions.parts
        self.spec = self._encoder.spec

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """The content of the files, and the encoder."""
        return {"dataset": self.config.dataset, "files": SOURCES[self.config.dataset].fingerprint(), "encoder": self._encoder.fingerprint()}

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """The encoded parts."""
        return {part: _table(self._encoder.transform(self._parts[part]), self.spec) for part in PARTS}


def write_encoded(folder: Path, spec: InputSpec, parts: Mapping[str, Iterable[RankingBatch]]) -> None:
    """Write batches as a folder that `EncodedData` reads.

    Args:
        folder: where; files that are there are replaced.
        spec: of the batches.
        parts: the batches of ``train``, ``valid`` and ``test``, with labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spec.json", spec.model_dump(mode="json"))
    for part in PARTS:
        tables = [_table(batch, spec) for batch in parts[part]]
        pq.write_table(pa.concat_tables(tables), folder / f"{part}.parquet")


def _table(batch: RankingBatch, spec: InputSpec) -> pa.Table:
    if batch.labels is None:
        raise DataError("labels: an encoded row needs one")
    columns: dict[str, pa.Array] = {}
    for keys, found in ((spec.bag_keys, batch.sparse), (spec.sequence_keys, batch.sequences)):
        jagged = found.to_dict() if keys else {}
        for key in keys:
            offsets = np.concatenate([[0], np.cumsum(jagged[key].lengths().numpy())]).astype(np.int32)
            columns[key] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(jagged[key].values().numpy(), pa.int64()))
    for names, values_bn in ((spec.dense, batch.dense), (spec.tasks, batch.labels)):
        columns |= {name: pa.array(values_bn[:, i].numpy(), pa.float32()) for i, name in enumerate(names)}
    return pa.table(columns)
