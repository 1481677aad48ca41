# SPDX-License-Identifier: Apache-2.0
"""Encoded data sets, kept as Parquet under ``.cache`` by the hash of what they were made from."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.files import read_json, sha256_json, write_json
from recsys.data.batch import RankingBatch
from recsys.data.datasets.impressions import Impressions
from recsys.data.encode import Encoder
from recsys.data.spec import InputSpec, TableSpec
from recsys.data.splits import PARTS
from recsys.scaling.encoded import SOURCES

CACHE = Path(__file__).parents[2] / ".cache" / "ranking_quality"
VERSIONS = {"frappe": 1, "movielens_1m": 2, "movielens_100k": 2}  # of how rows are built; another one leaves the cached tables behind
_LABEL, _USER = "__label", "__user"


@dataclass(frozen=True)
class Part:
    """N encoded rows.

    Attributes:
        jagged: for each key, its table rows int64 ``[V]``, and where each row's begin, int64 ``[N + 1]``.
        labels: float32 ``[N]``.
        users: int64 ``[N]``, the clusters of the bootstrap.
    """

    jagged: Mapping[str, tuple[np.ndarray, np.ndarray]]
    labels: np.ndarray
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Encoded:
    """A data set as models take it.

    Attributes:
        name: of the data set; ``<name>/flat`` after `flat`.
        fingerprint: of the source, the encoder and the code that joins them.
        spec: the inputs.
        parts: ``train``, ``valid`` and ``test``.
    """

    name: str
    fingerprint: str
    spec: InputSpec
    parts: Mapping[str, Part]

    def batch(self, part: str, rows: np.ndarray) -> RankingBatch:
        """Some rows as a batch."""
        data = self.parts[part]
        sparse, sequences = (_keyed(keys, data, rows) for keys in (self.spec.bag_keys, self.spec.sequence_keys))
        return RankingBatch(sparse, sequences, torch.zeros(len(rows), 0), torch.from_numpy(data.labels[rows])[:, None])

    def flat(self) -> "Encoded":
        """The same rows without sequences: a history is a bag of items that shares the candidate's table, its extras are left out.

        That is what peers can take that know fields and mean-pooled lists only.
        """
        sequences = {key for s in self.spec.sequences for key in (s.keys[0], s.target)}
        tables = []
        for table in self.spec.tables:
            if table.bags:
                tables.append(table)
            elif keys := tuple(key for key in table.sequences if key in sequences):
                tables.append(TableSpec(name=table.name, rows=table.rows, bags=keys))
        pooled = {s.name: s.keys[0] for s in self.spec.sequences}
        groups = {name: tuple(pooled.get(field, field) for field in fields) for name, fields in self.spec.groups.items()}
        spec = InputSpec(tables=tuple(tables), tasks=self.spec.tasks, groups=groups)
        return replace(self, name=f"{self.name}/flat", spec=spec)


def load(name: str, cache: Path = CACHE) -> Encoded:
    """A data set by its name, encoded now or before; ``<name>/flat`` is `Encoded.flat`.

    Raises:
        DataError: the source is not there.
    """
    base, _, variant = name.partition("/")
    if base not in SOURCES or variant not in ("", "flat"):
        raise ValueError(f"data: expected one of {', '.join(SOURCES)}, alone or with /flat, got {name!r}")
    source = SOURCES[base].fingerprint()
    folder = cache / f"{base}-{sha256_json([VERSIONS[base], source])[:16]}"
    if not (folder / "meta.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        _write(SOURCES[base].load(), folder)
    meta = read_json(folder / "meta.json")
    spec = InputSpec.model_validate(meta["spec"] | {"groups": meta["groups"]})
    parts = {part: _read(folder / f"{part}.parquet", spec) for part in PARTS}
    encoded = Encoded(base, meta["fingerprint"], spec, parts)
    return encoded.flat() if variant else encoded


def encode(impressions: Impressions) -> tuple[Encoder, dict[str, pa.Table]]:
    """The encoder fitted on train, and for each part a table with a column of table rows for each key."""
    encoder = Encoder.fit(impressions.encoder, impressions.parts["train"])
    if encoder.spec.dense:
        raise ValueError(f"{impressions.name}: dense columns are not stored; expected buckets instead of {encoder.spec.dense}")
    users = pa.concat_tables([impressions.parts[part].select(["user_id"]) for part in PARTS])["user_id"]
    codes = users.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    tables, start = {}, 0
    for part in PARTS:
        batch = encoder.transform(impressions.parts[part])
        assert batch.labels is not None
        columns = {key: _column(jagged[key]) for jagged in (batch.sparse.to_dict(), batch.sequences.to_dict()) for key in jagged}
        columns[_LABEL] = pa.array(batch.labels[:, 0].numpy())
        columns[_USER] = pa.array(codes[start : start + len(batch)])
        tables[part] = pa.table(columns)
        start += len(batch)
    return encoder, tables


def padded(part: Part, key: str) -> np.ndarray:
    """int64 ``[N, L]``: a key's rows, each list at the left and 0 beyond it; L is the longest list."""
    values, offsets = part.jagged[key]
    lengths = np.diff(offsets)
    result = np.zeros((len(lengths), max(1, int(lengths.max(initial=0)))), dtype=np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    result[row, np.arange(len(values)) - offsets[:-1][row]] = values
    return result


def _write(impressions: Impressions, folder: Path) -> None:
    """The tables, the encoder, and last ``meta.json``, whose presence says that the folder is complete."""
    encoder, tables = encode(impressions)
    folder.mkdir(parents=True)
    for part, table in tables.items():
        pq.write_table(table, folder / f"{part}.parquet")
    encoder.save(folder / "encoder")
    meta = {"spec": encoder.spec.model_dump(mode="json", exclude={"groups"}), "groups": encoder.spec.groups}
    fingerprint = sha256_json([folder.name, encoder.fingerprint()])
    write_json(folder / "meta.json", meta | {"fingerprint": fingerprint, "rows": {part: t.num_rows for part, t in tables.items()}})


def _column(jagged: object) -> pa.Array:
    """Lists as a list column; one value for each row as a plain one."""
    values, lengths = (getattr(jagged, what)().numpy() for what in ("values", "lengths"))
    if (lengths == 1).all():
        return pa.array(values.astype(np.int32))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values.astype(np.int32))


def _read(file: Path, spec: InputSpec) -> Part:
    table = pq.read_table(file).combine_chunks()
    jagged = {}
    for key in (*spec.bag_keys, *spec.sequence_keys):
        column = pa.concat_arrays(table[key].chunks)
        if pa.types.is_list(column.type):
            jagged[key] = (column.values.to_numpy().astype(np.int64), column.offsets.to_numpy().astype(np.int64))
        else:
            jagged[key] = (column.to_numpy().astype(np.int64), np.arange(len(column) + 1))
    return Part(jagged, table[_LABEL].to_numpy(), table[_USER].to_numpy())


def _keyed(keys: tuple[str, ...], part: Part, rows: np.ndarray) -> KeyedJaggedTensor:
    values, lengths = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for key in keys:
        source, offsets = part.jagged[key]
        first, count = offsets[rows], offsets[rows + 1] - offsets[rows]
        before = np.cumsum(count) - count
        values.append(source[np.repeat(first - before, count) + np.arange(count.sum())])
        lengths.append(count)
    flat = torch.from_numpy(np.concatenate(lengths).astype(np.int32))
    return KeyedJaggedTensor(keys=list(keys), values=torch.from_numpy(np.concatenate(values)), lengths=flat, stride=len(rows))
