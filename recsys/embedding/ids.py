# SPDX-License-Identifier: Apache-2.0
"""Managed ids: raw 64-bit ids go in with the batch, rows come out; ids that are no longer seen give their rows to new ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionModule,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, unknown
from recsys.data.batch import RankingBatch
from recsys.data.encoding.coders import FIRST, NO_VALUE, UNKNOWN
from recsys.data.spec import InputSpec, TableSpec


class ManagedTableConfig(BaseConfig):
    """How the rows of one table are given to ids.

    Attributes:
        policy: whose row is taken when there is none left: ``lfu`` the id counted least often, ``lru`` the one not seen for longest,
            ``distance_lfu`` the lowest count / (batches since last seen + 1)^decay. An id is admitted only if what it shows within one
            round beats an id that has a row: under ``lfu``, more sightings in the round than the other has had in all.
            ``hash_zch`` is TorchRec's hash table, which gives a row at once and never takes one away; it trains on a GPU alone.
        interval: batches between two rounds of admission and eviction. Until its first round an id has the row of the unknown.
        decay: the exponent of ``distance_lfu``.
    """

    policy: Literal["lfu", "lru", "distance_lfu", "hash_zch"] = "distance_lfu"
    interval: int = Field(100, ge=1)
    decay: PositiveFloat = 1.0


class _ManagedTable(nn.Module):
    """One table's map from ids to rows, over TorchRec's `MCHManagedCollisionModule`.

    TorchRec's state dict holds the map and the counts, not the ids seen since the last round; they are the extra state here, so that
    a resumed run goes on as it would have.
    """

    def __init__(self, table: TableSpec, config: ManagedTableConfig, device: torch.device) -> None:
        super().__init__()
        self.name, self.config = table.name, config
        self._shared = table.rows - FIRST  # TorchRec's last slot is that of all ids without one
        self.map = _collision_module(table, config, device)

    def forward(self, values_n: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of raw ids, int64 ``[N]``, and the rows that have changed hands, in training mode alone."""
        present = values_n != NO_VALUE
        ids = values_n[present]
        if self.training and isinstance(self.map, MCHManagedCollisionModule):
            _make_room(self.map, ids.numel())
        lengths = torch.tensor([ids.numel()], device=ids.device)
        slots = self.map({self.name: JaggedTensor(values=ids, lengths=lengths)})[self.name].values()
        rows_n = torch.zeros_like(values_n)
        rows_n[present] = torch.where(slots == self._shared, UNKNOWN, slots + FIRST)
        evicted = self.map.evict() if self.training else None
        return rows_n, None if evicted is None else evicted[evicted != self._shared] + FIRST

    def get_extra_state(self) -> Tensor:
        """Counters, then the ids since the last round with what the policy remembers of each: int64 ``[3 + seen · (1 + memories)]``."""
        if not isinstance(self.map, MCHManagedCollisionModule):
            return torch.empty(0, dtype=torch.int64)
        seen = self.map._current_history_buffer_offset
        counters = torch.tensor([self.map._current_iter, self.map._last_eviction_iter, seen])
        memories = [] if seen == 0 else [self.map._history_accumulator, *self.map._history_metadata.values()]
        return torch.cat([counters, *(memory[:seen].cpu() for memory in memories)])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where `get_extra_state` was called."""
        if not isinstance(self.map, MCHManagedCollisionModule):
            return
        current, last, seen = state[:3].tolist()
        self.map._current_iter, self.map._last_eviction_iter, self.map._current_history_buffer_offset = current, last, 0
        self.map._evicted = False
        if seen:
            _make_room(self.map, seen)
            memories = [self.map._history_accumulator, *self.map._history_metadata.values()]
            for memory, saved in zip(memories, state[3:].view(len(memories), seen), strict=True):
                memory[:seen] = saved.to(memory.device)
        self.map._current_history_buffer_offset = seen


def _make_room(collisions: MCHManagedCollisionModule, ids: int) -> None:
    """Let the module remember ``ids`` more: TorchRec sizes its memory by the first batch, and cuts off what a longer one has beyond it."""
    seen, size = collisions._current_history_buffer_offset, collisions._input_history_buffer_size
    if seen + ids <= size:
        return
    size = max(2 * (seen + ids), 1)
    old = [collisions._history_accumulator, *collisions._history_metadata.values()] if seen else []
    memories = [torch.zeros(size, dtype=torch.int64, device=collisions.device) for _ in range(1 + len(_remembered(collisions)))]
    for memory, before in zip(memories, old, strict=False):
        memory[:seen] = before[:seen]
    collisions._input_history_buffer_size, collisions._history_accumulator = size, memories[0]
    for name, memory in zip(_remembered(collisions), memories[1:], strict=True):
        collisions.register_buffer(f"_history_{name}", memory, persistent=False)
        collisions._history_metadata[name] = memory


def _remembered(collisions: MCHManagedCollisionModule) -> list[str]:
    """What the policy remembers of each sighting since the last round."""
    return [info.metadata_name for info in collisions._eviction_policy.metadata_info if info.is_history_metadata]


def _collision_module(table: TableSpec, config: ManagedTableConfig, device: torch.device) -> ManagedCollisionModule:
    if table.rows < FIRST + 2:
        raise ConfigError(f"embedding.managed.{table.name}: expected a table of at least {FIRST + 2} rows, got {table.rows}")
    if config.policy == "hash_zch":
        if device.type != "cuda":
            raise ConfigError(
                f"embedding.managed.{table.name}.policy: 'hash_zch' trains on a GPU alone, and this table is on {device}; "
                "expected lfu, lru or distance_lfu"
            )
        return HashZchManagedCollisionModule(zch_size=table.rows - FIRST, device=device, total_num_buckets=1)
    policies: dict[str, MCHEvictionPolicy] = {
        "lfu": LFU_EvictionPolicy(),
        "lru": LRU_EvictionPolicy(),
        "distance_lfu": DistanceLFU_EvictionPolicy(decay_exponent=config.decay),
    }
    return MCHManagedCollisionModule(
        zch_size=table.rows - FIRST + 1, device=device, eviction_policy=policies[config.policy], eviction_interval=config.interval
    )


class ManagedIds(nn.Module):
    """Replaces the raw ids of chosen tables in a batch by rows. Part of `EmbeddingTables`; see its ``Config.managed``.

    In the keys of a managed table, 0 is "no value" (row 0) and any other id is between 1 and 2⁶³ − 2, as
    `recsys.data.encoding.hashing.raw_ids` makes them. Row 1 is that of every id without a row of its own. Only training mode counts ids and
    moves rows.

    Args:
        spec: the tables and their keys.
        configs: by table.
        device: where the maps live.

    Raises:
        ConfigError: an unknown table, one too small, one whose keys hold no raw ids, or a policy that the device does not have.
    """

    def __init__(self, spec: InputSpec, configs: Mapping[str, ManagedTableConfig], device: torch.device) -> None:
        super().__init__()
        tables = {table.name: table for table in spec.tables}
        if absent := [name for name in configs if name not in tables]:
            raise ConfigError(f"embedding.managed: {unknown('table', absent[0], tables)}")
        if ready := [name for name in configs if tables[name].ids != "raw"]:
            raise ConfigError(
                f"embedding.managed: table {ready[0]!r} is given rows, by a vocabulary or by hashing; expected raw ids: "
                "say `ids: raw` and `rows` of its feature in the encoder"
            )
        self._keys = {name: (*tables[name].bags, *tables[name].sequences) for name in configs}
        self._pooled = {name: bool(tables[name].bags) for name in configs}
        self.tables = nn.ModuleDict({name: _ManagedTable(tables[name], config, device) for name, config in configs.items()})

    @torch.no_grad()
    def forward(self, batch: RankingBatch) -> tuple[RankingBatch, dict[str, Tensor]]:
        """The batch with rows, and by table the rows that have changed hands, whose vectors are to be drawn anew."""
        values: dict[str, Tensor] = {}
        evicted: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            jagged = batch.sparse if self._pooled[name] else batch.sequences
            parts = [jagged[key].values() for key in self._keys[name]]
            rows, gone = table(torch.cat(parts))
            values |= dict(zip(self._keys[name], rows.split([len(part) for part in parts]), strict=True))
            if gone is not None and gone.numel():
                evicted[name] = gone
        return replace(batch, sparse=_replace(batch.sparse, values), sequences=_replace(batch.sequences, values)), evicted


def _replace(jagged: KeyedJaggedTensor, values: Mapping[str, Tensor]) -> KeyedJaggedTensor:
    """The same bags with other values in some keys."""
    keys: list[str] = jagged.keys()
    if not any(key in values for key in keys):
        return jagged
    parts: Any = [values[key] if key in values else jagged[key].values() for key in keys]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(parts), lengths=jagged.lengths(), stride=jagged.stride())
