# SPDX-License-Identifier: Apache-2.0
"""Int8 embedding tables for serving: a quarter of the memory, one scale and one offset per row."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recsys.core.errors import DataError, RecsysError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, TableSpec
from recsys.embedding.ids import ManagedIds
from recsys.embedding.served import ServedTables
from recsys.embedding.tables import Embedded, EmbeddingTables, key_widths, keyed

_HEADER = 4  # a row opens with its scale and its offset, fp16 each
_FP16 = torch.finfo(torch.float16).max


class QuantizedTables(nn.Module):
    """`EmbeddingTables` for inference, in int8: the same batch in, the same `Embedded` out, in float32, without gradients.

    Row r is stored as ``q = round((w − b) / s)`` with ``b = min w`` and ``s = (max w − min w) / 255``, and read as ``s q + b``; s and b are
    rounded to fp16 first. So each component is off by at most ``s / 2``, plus what the rounding of s and b adds: see `error_bound`.

    Made by `quantize`, or empty from a spec and a config, to load a state into. The state dict holds one uint8 tensor
    ``[rows, 4 + width]`` for each table, ``pooled.<table>`` or ``unpooled.<table>``, and the maps of managed ids, which no longer change.

    Args:
        spec: the tables and their keys.
        config: of the `EmbeddingTables` that this stands for.
    """

    ids: ManagedIds

    def __init__(self, spec: InputSpec, config: EmbeddingTables.Config) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        if config.managed:
            self.ids = ManagedIds(spec, config.managed, torch.device("cpu"))
        self._lookups: list[_Lookup] = []
        widths = {t.name: config.dim_of(t.name) for t in spec.tables}
        pooling = PoolingMode.SUM if config.pooling == "sum" else PoolingMode.MEAN
        self.pooled, self.unpooled = _Rows(), _Rows()
        if pooled := [t for t in spec.tables if t.bags]:
            self._lookups.append(_Lookup(pooled, widths, pooling))
        unpooled = [t for t in spec.tables if t.sequences]
        for width in dict.fromkeys(widths[t.name] for t in unpooled):
            self._lookups.append(_Lookup([t for t in unpooled if widths[t.name] == width], widths, PoolingMode.NONE))
        for lookup in self._lookups:
            for name, rows in lookup.rows().items():
                (self.unpooled if lookup.mode is PoolingMode.NONE else self.pooled).register_buffer(name, rows)
        self._addresses = [rows.data_ptr() for rows in self._rows().values()]
        self.register_load_state_dict_post_hook(lambda module, keys: module._check_addresses())

    def _rows(self) -> dict[str, Tensor]:
        return dict(self.pooled.named_buffers()) | dict(self.unpooled.named_buffers())

    @property
    def widths(self) -> dict[str, int]:
        """See `EmbeddingTables.widths`."""
        return key_widths(self.spec, self.config)

    @property
    def bytes(self) -> int:
        """Memory of all tables."""
        return sum(rows.numel() for rows in self._rows().values())

    @property
    def float_bytes(self) -> int:
        """Memory of the tables in float32."""
        return sum(4 * rows.shape[0] * (rows.shape[1] - _HEADER) for rows in self._rows().values())

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: neither vectors nor maps of ids change."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: RankingBatch) -> Embedded:
        """Look up a batch.

        Raises:
            RuntimeError: a row is beyond its table.
        """
        if self.config.managed:
            batch, _ = self.ids(batch)
        pooled: dict[str, Tensor] = {}
        sequences: dict[str, JaggedTensor] = {}
        for lookup in self._lookups:
            if lookup.mode is PoolingMode.NONE:
                sequences |= lookup.unpooled(batch.sequences)
            else:
                pooled |= lookup.pooled(batch.sparse)
        bags = keyed({key: pooled[key] for key in self.spec.bag_keys}, len(batch))
        return Embedded(bags, {key: sequences[key] for key in self.spec.sequence_keys})

    def dequantised(self) -> dict[str, Tensor]:
        """The float32 weights ``[rows, width]`` that the look-ups see, by table."""
        to_float = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat  # it wants scale and offset last, the look-up first
        return {name: to_float(torch.cat([r[:, _HEADER:], r[:, :_HEADER]], dim=1), 8) for name, r in self._rows().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse a move, as `EmbeddingTables` does."""
        super()._apply(fn, recurse)
        self._check_addresses()
        return self

    def _check_addresses(self) -> None:
        if [rows.data_ptr() for rows in self._rows().values()] != self._addresses:
            raise RecsysError("quantized tables cannot be moved or assigned to: FBGEMM holds their memory. Load them with assign=False")

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedTables":
        other = QuantizedTables(self.spec, self.config)
        memo[id(self)] = other
        other.load_state_dict(self.state_dict())
        return other.eval()


class _Rows(nn.Module):
    """Holds the stored rows of tables as buffers."""


class _Lookup:
    """FBGEMM's inference look-up over tables that are read in one way, whose memory the buffers of `QuantizedTables` are views of."""

    def __init__(self, tables: list[TableSpec], widths: dict[str, int], mode: PoolingMode) -> None:
        self.mode, self._tables = mode, tables
        self._table_of_key = [i for i, table in enumerate(tables) for _ in (*table.bags, *table.sequences)]
        self._keys = [key for table in tables for key in (*table.bags, *table.sequences)]
        self._widths = [widths[tables[i].name] for i in self._table_of_key]
        self._rows = [tables[i].rows for i in self._table_of_key]
        self._lookup = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(table.name, table.rows, widths[table.name], SparseType.INT8, EmbeddingLocation.HOST) for table in tables],
            feature_table_map=self._table_of_key,
            pooling_mode=mode,
            device="cpu",
            output_dtype=SparseType.FP32,
            bounds_check_mode=BoundsCheckMode.FATAL,
            row_alignment=1,
        )
        self._lookup.fill_random_weights()

    def rows(self) -> dict[str, Tensor]:
        """The stored rows ``[rows, 4 + width]`` by table."""
        stored = self._lookup.split_embedding_weights(split_scale_shifts=False)
        return {table.name: rows for table, (rows, _) in zip(self._tables, stored, strict=True)}

    def _look_up(self, features: KeyedJaggedTensor) -> tuple[Tensor, dict[str, JaggedTensor]]:
        jagged = {key: features[key] for key in self._keys}
        for key, rows in zip(self._keys, self._rows, strict=True):
            # FBGEMM's inference look-up takes a negative row for a pruned one.
            if jagged[key].values().numel() and not 0 <= int(jagged[key].values().min()) <= int(jagged[key].values().max()) < rows:
                raise RuntimeError(f"{key}: expected rows from 0 to {rows - 1}")
        values = torch.cat([j.values() for j in jagged.values()])
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.cat([j.lengths() for j in jagged.values()]).long())
        return self._lookup(values.int(), offsets.int()), jagged

    def pooled(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """``[B, width]`` for each key."""
        vectors, _ = self._look_up(features)
        return dict(zip(self._keys, vectors.split(self._widths, dim=1), strict=True))

    def unpooled(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """``[N_key, width]`` for each key."""
        vectors, jagged = self._look_up(features)
        parts = vectors.split([j.values().numel() for j in jagged.values()])
        return {key: JaggedTensor(values=part, lengths=j.lengths()) for (key, j), part in zip(jagged.items(), parts, strict=True)}


def quantize(tables: EmbeddingTables | ServedTables) -> QuantizedTables:
    """A copy of ``tables`` in int8, on the CPU.

    Raises:
        RecsysError: the tables are sharded; or a weight is not finite, or beyond fp16's range.
    """
    if tables.sharded:
        raise RecsysError("sharded tables cannot be quantized: load `recsys.embedding.sharding.full_state` into unsharded ones first")
    quantized = QuantizedTables(tables.spec, tables.config)
    weights = {name.split(".")[-2]: weight.detach().cpu() for name, weight in tables.named_parameters() if name.endswith(".weight")}
    for name, rows in quantized._rows().items():
        low, high = (float(end) for end in weights[name].aminmax())
        if not -_FP16 <= low <= high <= _FP16:
            raise RecsysError(f"table {name!r}: expected finite weights within ±65504 to quantize, got others")
        stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weights[name].contiguous(), 8)
        rows.copy_(torch.cat([stored[:, -_HEADER:], stored[:, :-_HEADER]], dim=1))
    if isinstance(tables, EmbeddingTables) and tables.config.managed:
        quantized.ids.load_state_dict(tables.ids.state_dict())
    return quantized.eval()


def error_bound(weight: Tensor) -> Tensor:
    """The largest possible error ``[rows]`` of a component of each row: half a step, and the rounding of scale and offset to fp16.

    Rounding moves the offset by up to 2⁻¹¹ of it, and the end of the range by up to 2⁻¹¹ of the range; where the values are tiny, fp16's
    smallest step, 2⁻²⁴, takes the place of both.
    """
    low, high = weight.double().aminmax(dim=1)
    return (high - low) / 255 / 2 + (low.abs() + (high - low)) * 2**-11 + 256 * 2**-25


class _Predicts(Protocol):
    """What `quality` needs of a ranker."""

    tables: Any

    def predict(self, batch: RankingBatch) -> Tensor: ...


@dataclass(frozen=True)
class Quality:
    """One task with float32 and with int8 tables, on the same impressions.

    Attributes:
        auc: with float32 and with int8; NaN where the labels are all alike.
        log_loss: with float32 and with int8.
        largest_change: of one impression's probability.
    """

    auc: tuple[float, float]
    log_loss: tuple[float, float]
    largest_change: float


def quality(ranker: _Predicts, quantized: QuantizedTables, batches: Iterable[RankingBatch]) -> dict[str, Quality]:
    """What int8 tables cost a ranker, by task; impressions whose label is NaN do not count.

    Args:
        ranker: in evaluation mode. It has its own tables again afterwards.
        quantized: made from its tables.
        batches: with labels.

    Raises:
        DataError: no batch, or one without labels.
    """
    labels, plain, small = [], [], []
    for batch in batches:
        if batch.labels is None:
            raise DataError("labels: the comparison needs batches with labels")
        labels.append(batch.labels.cpu().numpy())
        plain.append(ranker.predict(batch).float().cpu().numpy())
        with _tables(ranker, quantized):
            small.append(ranker.predict(batch).float().cpu().numpy())
    if not labels:
        raise DataError("batches: expected at least one, got none")
    y, p, q = np.concatenate(labels), np.concatenate(plain), np.concatenate(small)
    return {task: _quality(y[:, i], p[:, i], q[:, i]) for i, task in enumerate(quantized.spec.tasks)}


def _quality(labels: np.ndarray, plain: np.ndarray, small: np.ndarray) -> Quality:
    known = np.isfinite(labels)
    y = labels[known] > 0.5
    pair = plain[known].astype(np.float64), small[known].astype(np.float64)
    change = float(np.abs(pair[0] - pair[1]).max()) if len(y) else 0.0
    aucs = [float(roc_auc_score(y, p)) if len(np.unique(y)) == 2 else float("nan") for p in pair]
    losses = [float(log_loss(y, p, labels=[False, True])) if len(y) else float("nan") for p in pair]
    return Quality((aucs[0], aucs[1]), (losses[0], losses[1]), change)


@contextmanager
def _tables(ranker: _Predicts, tables: nn.Module) -> Iterator[None]:
    own = ranker.tables
    ranker.tables = tables
    try:
        yield
    finally:
        ranker.tables = own
