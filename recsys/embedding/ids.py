# SPDX-License-Identifier: Apache-2.0
"""Managed ids: raw 64-bit ids go in with the batch, rows come out; ids that are no longer seen give their rows to new ones."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveFloat, SerializerFunctionWrapHandler, model_serializer
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
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import CheckpointError, ConfigError, unknown
from recsys.data.batch import RankingBatch
from recsys.data.encoding.coders import FIRST, NO_VALUE
from recsys.data.spec import InputSpec, TableSpec
from recsys.data.world import World
from recsys.embedding.buckets import EXTRA, Bucket, Gone, mix
from recsys.embedding.exchange import Asked, exchange


class ManagedTableConfig(BaseConfig):
    """How the rows of one table are given to ids.

    Attributes:
        policy: whose row is taken when there is none left: ``lfu`` the id counted least often, ``lru`` the one not seen for longest,
            ``distance_lfu`` the lowest count / (batches since last seen + 1)^decay. An id is admitted only if what it shows within one
            round beats an id that has a row: under ``lfu``, more sightings in the round than the other has had in all.
            ``hash_zch`` is TorchRec's hash table, which gives a row at once and never takes one away; it trains on a GPU alone.
        interval: batches between two rounds of admission and eviction. Until its first round an id has the row of the unknown.
        decay: the exponent of ``distance_lfu``.
        buckets: the table's rows are split into so many equal ranges, and the ids between them. Where several processes train, their
            number divides it: 12 buckets serve 1, 2, 3, 4, 6 or 12 processes.
    """

    policy: Literal["lfu", "lru", "distance_lfu", "hash_zch"] = "distance_lfu"
    interval: int = Field(100, ge=1)
    decay: PositiveFloat = 1.0
    buckets: int = Field(1, ge=1)

    @model_serializer(mode="wrap")
    def _without_one_bucket(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As it was when there was only one bucket, so that a run of that time goes on."""
        dumped: dict[str, Any] = dump(self)
        if dumped.get("buckets") == 1:
            del dumped["buckets"]
        return dumped


def _bucket(table: TableSpec, config: ManagedTableConfig, number: int, seed: int, device: torch.device) -> Bucket:
    """One of the equal ranges of a table's rows."""
    slots = (table.rows - FIRST) // config.buckets
    return Bucket(table.name, _collision_module(config, slots, device), FIRST + number * slots, slots, seed)


def _collision_module(config: ManagedTableConfig, slots: int, device: torch.device) -> ManagedCollisionModule:
    if config.policy == "hash_zch":
        return HashZchManagedCollisionModule(zch_size=slots, device=device, total_num_buckets=1)
    policies: dict[str, MCHEvictionPolicy] = {
        "lfu": LFU_EvictionPolicy(),
        "lru": LRU_EvictionPolicy(),
        "distance_lfu": DistanceLFU_EvictionPolicy(decay_exponent=config.decay),
    }
    return MCHManagedCollisionModule(
        zch_size=slots + 1,  # TorchRec's last slot is that of all ids without one
        device=device,
        eviction_policy=policies[config.policy],
        eviction_interval=config.interval,
    )


def _check(table: TableSpec, config: ManagedTableConfig, device: torch.device) -> None:
    name, own, buckets = f"embedding.managed.{table.name}", table.rows - FIRST, config.buckets
    if table.rows < FIRST + 2 * buckets:
        raise ConfigError(f"{name}: expected a table of at least {FIRST + 2 * buckets} rows, got {table.rows}")
    if own % buckets:
        more = FIRST + -(-own // buckets) * buckets
        raise ConfigError(
            f"{name}.buckets: {table.rows} rows, but for the first {FIRST}, do not divide into {buckets} buckets; {more} rows would"
        )
    if config.policy != "hash_zch":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"{name}.policy: 'hash_zch' trains on a GPU alone, and this table is on {device}; expected lfu, lru or distance_lfu"
        )
    if buckets > 1:
        raise ConfigError(f"{name}.buckets: expected 1 with the policy 'hash_zch', got {buckets}")


def _seed(table: str) -> int:
    """Of the vectors of rows that change hands: another for every table and every seed of torch."""
    text = f"{torch.initial_seed()} {table}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


class ManagedIds(nn.Module):
    """Replaces the raw ids of chosen tables in a batch by rows. Part of `EmbeddingTables`; see its ``Config.managed``.

    In the keys of a managed table, 0 is "no value" (row 0) and any other id is between 1 and 2⁶³ − 2, as
    `recsys.data.encoding.hashing.raw_ids` makes them. Row 1 is that of every id without a row of its own. Only training mode counts ids and
    moves rows; what a row of weight 0 holds does not count.

    The rows behind the first two are split into ``buckets`` equal ranges, each with a map of its own, and an id belongs to bucket
    ``mix(id) mod buckets``. After `share` each process owns a range of the buckets and asks the others for the rows of theirs
    (`recsys.embedding.exchange`); so it makes no difference how many processes there are.

    Args:
        spec: the tables and their keys.
        configs: by table.
        device: where the maps live.

    Raises:
        ConfigError: an unknown table, one too small or that does not divide into its buckets, one whose keys hold no raw ids, or a policy
            that the device does not have.
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
        for name, config in configs.items():
            _check(tables[name], config, device)
        self._specs, self._configs, self._device = {name: tables[name] for name in configs}, dict(configs), device
        self._world, self._shared = World(), False
        self._owned = {name: {number: self._build(name, number) for number in range(config.buckets)} for name, config in configs.items()}
        # One bucket has the names that it had when there was only one.
        self.tables = nn.ModuleDict(
            {name: owned[0] if len(owned) == 1 else nn.ModuleList(owned.values()) for name, owned in self._owned.items()}
        )

    def _build(self, name: str, number: int) -> Bucket:
        return _bucket(self._specs[name], self._configs[name], number, _seed(name), self._device)

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`; buckets of `share` are no submodules."""
        for owned in self._owned.values():
            for bucket in owned.values():
                bucket.train(mode)
        return super().train(mode)

    @torch.no_grad()
    def forward(self, batch: RankingBatch) -> tuple[RankingBatch, dict[str, Gone]]:
        """The batch with rows, and by table the rows that have changed hands, whose vectors are to be drawn anew.

        After `share` a collective call.
        """
        raw = {name: self._raw(batch, name) for name in self._configs}
        asked = [Asked(ids[ids != NO_VALUE], None if counts is None else counts[ids != NO_VALUE]) for ids, counts in raw.values()]
        if self._world.size == 1:
            found, gone = self._answer(asked)
        else:
            owners = [self._owners(name, one.ids) for name, one in zip(self._configs, asked, strict=True)]
            found, gone = exchange(self._world, asked, owners, self._answer)
        values: dict[str, Tensor] = {}
        for (name, (ids, _)), own in zip(raw.items(), found, strict=True):
            rows = torch.full_like(ids, NO_VALUE)
            rows[ids != NO_VALUE] = own
            jagged, keys = self._jagged(batch, name)
            values |= dict(zip(keys, rows.split([len(jagged[key].values()) for key in keys]), strict=True))
        renewed = {name: one for name, one in zip(self._configs, gone, strict=True) if one is not None and len(one.rows)}
        return replace(batch, sparse=_replace(batch.sparse, values), sequences=_replace(batch.sequences, values)), renewed

    def _jagged(self, batch: RankingBatch, name: str) -> tuple[KeyedJaggedTensor, list[str]]:
        """Where a table's ids are, and in which keys."""
        table = self._specs[name]
        return (batch.sparse if table.bags else batch.sequences), [*table.bags, *table.sequences]

    def _raw(self, batch: RankingBatch, name: str) -> tuple[Tensor, Tensor | None]:
        """All ids of a table, one key after another, and which of them count."""
        jagged, keys = self._jagged(batch, name)
        ids = torch.cat([jagged[key].values() for key in keys])
        if not self.training or batch.weights is None:
            return ids, None
        return ids, torch.cat([(batch.weights > 0).repeat_interleave(jagged[key].lengths().long()) for key in keys])

    def _number(self, name: str, ids: Tensor) -> Tensor:
        """The bucket of each id."""
        return mix(ids) % self._configs[name].buckets

    def _owners(self, name: str, ids: Tensor) -> Tensor:
        return self._number(name, ids) // (self._configs[name].buckets // self._world.size)

    def _answer(self, asked: Sequence[Asked]) -> tuple[list[Tensor], list[Gone | None]]:
        """See `recsys.embedding.exchange.Answer`."""
        answers = [self._rows(name, one) for name, one in zip(self._configs, asked, strict=True)]
        return [rows for rows, _ in answers], [gone for _, gone in answers]

    def _rows(self, name: str, asked: Asked) -> tuple[Tensor, Gone | None]:
        """Rows of ids of the buckets that are here. Every bucket is asked, since an empty batch is a batch too."""
        buckets = self._configs[name].buckets
        if buckets == 1:
            rows, left = self._owned[name][0](asked.ids, asked.counts)
            return rows, left
        numbers = self._number(name, asked.ids)
        places = numbers.argsort(stable=True).split(torch.bincount(numbers, minlength=buckets).tolist())
        rows, gone = torch.empty_like(asked.ids), []
        for number, bucket in self._owned[name].items():
            place = places[number]
            rows[place], left = bucket(asked.ids[place], None if asked.counts is None else asked.counts[place])
            gone += [] if left is None else [left]
        return rows, Gone(torch.cat([g.rows for g in gone]), torch.cat([g.keys for g in gone])) if gone else None

    def check_world(self, world: World) -> None:
        """Whether so many processes can share the buckets.

        Raises:
            ConfigError: their number does not divide that of a table's buckets.
        """
        for name, config in self._configs.items():
            if config.buckets % world.size:
                raise ConfigError(
                    f"embedding.managed.{name}.buckets: {config.buckets} buckets cannot be shared by {world.size} processes; "
                    f"expected a multiple of {world.size}"
                )

    def share(self, world: World, device: torch.device) -> None:
        """Keep this process's buckets alone, the r-th of ``world.size`` equal ranges, on ``device``. Part of `sharding.shard`.

        They leave the state dict, in which all processes would have to have the same names: see `shard_state`.

        Raises:
            ConfigError: see `check_world`.
        """
        self.check_world(world)
        before, self._device, self._world, self._shared = self._owned, device, world, True
        self._owned, self.tables = {}, nn.ModuleDict()
        for name, config in self._configs.items():
            each = config.buckets // world.size
            numbers = range(world.rank * each, (world.rank + 1) * each)
            self._owned[name] = {number: self._moved(before[name][number], name, number) for number in numbers}
        self.train(self.training)

    def _moved(self, bucket: Bucket, name: str, number: int) -> Bucket:
        """A bucket on this device; a new one for one of the meta device."""
        if bucket.map.device == self._device:
            return bucket
        moved = self._build(name, number)
        if bucket.map.device.type != "meta":
            moved.load_state_dict(bucket.state_dict())
        return moved

    def _shares(self) -> Iterator[tuple[str, Bucket]]:
        """The buckets that are here, and what the names of their state begin with where they are not shared."""
        for name, owned in self._owned.items():
            for number, bucket in owned.items():
                yield f"tables.{name}." if self._configs[name].buckets == 1 else f"tables.{name}.{number}.", bucket

    def shard_state(self) -> dict[str, Tensor]:
        """See `recsys.embedding.sharding.HoldsShards`. One of a bucket's tensors is longer the more ids came since the last round."""
        if not self._shared:
            return {}
        return {prefix + key: tensor for prefix, bucket in self._shares() for key, tensor in bucket.state_dict().items()}

    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        """See `recsys.embedding.sharding.HoldsShards`.

        Raises:
            CheckpointError: a bucket is absent or has another size.
        """
        for prefix, bucket in self._shares():
            for key, tensor in bucket.state_dict().items():
                found = state.get(prefix + key)
                if found is None or (found.shape != tensor.shape and key != EXTRA):
                    shapes = tuple(tensor.shape), None if found is None else tuple(found.shape)
                    raise CheckpointError(f"managed ids: {prefix}{key}: expected {shapes[0]}, got {shapes[1]}")
        for prefix, bucket in self._shares():
            bucket.load_state_dict({key: state[prefix + key] for key in bucket.state_dict()})


def _replace(jagged: KeyedJaggedTensor, values: Mapping[str, Tensor]) -> KeyedJaggedTensor:
    """The same bags with other values in some keys."""
    keys: list[str] = jagged.keys()
    if not any(key in values for key in keys):
        return jagged
    parts: Any = [values[key] if key in values else jagged[key].values() for key in keys]
    return KeyedJaggedTensor(keys=keys, values=torch.cat(parts), lengths=jagged.lengths(), stride=jagged.stride())
