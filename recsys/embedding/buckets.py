# SPDX-License-Identifier: Apache-2.0
"""One bucket of a table with managed ids: a range of its rows, and the map that gives them to ids."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.mc_modules import ManagedCollisionModule, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.data.encoding.coders import UNKNOWN

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""SplitMix64's step between two states, as a signed number."""
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_COUNTERS = 3
EXTRA = "_extra_state"
"""What torch calls `Bucket.get_extra_state` in a state dict."""


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014) of int64 of any shape: a bijection, the same on every machine.

    `recsys.core.hashing` has it for arrays.
    """
    x = (x ^ _shifted(x, 30)) * _MUL1
    x = (x ^ _shifted(x, 27)) * _MUL2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Gone:
    """Rows of one table that have gone from one id to another.

    Attributes:
        rows: int64 ``[E]``.
        keys: int64 ``[E]``, of which their new vectors are drawn (`recsys.embedding.renewal`).
    """

    rows: Tensor
    keys: Tensor


class Bucket(nn.Module):
    """A range of rows and the map from ids to them, over TorchRec's `MCHManagedCollisionModule`.

    TorchRec's state dict holds the map and the counts, not the ids seen since the last round; they are the extra state here, so that
    a resumed run goes on as it would have.

    Args:
        name: of the table.
        collisions: gives slots from 0 on; a slot of ``slots`` or more is that of all ids without one.
        first: the row of slot 0.
        slots: how many rows.
        seed: of the vectors of rows that change hands.
    """

    def __init__(self, name: str, collisions: ManagedCollisionModule, first: int, slots: int, seed: int) -> None:
        super().__init__()
        self.name, self._first, self._slots, self._seed = name, first, slots, seed
        self.map = collisions

    def forward(self, ids_n: Tensor, counts_n: Tensor | None = None) -> tuple[Tensor, Gone | None]:
        """Rows of raw ids, int64 ``[N]``, and the rows that have changed hands, in training mode alone.

        Args:
            ids_n: int64 ``[N]``, without "no value".
            counts_n: bool ``[N]``, whether the sighting counts; all of them where it is None.
        """
        if isinstance(self.map, MCHManagedCollisionModule):
            if self.training:
                counted = ids_n if counts_n is None else ids_n[counts_n]
                _make_room(self.map, counted.numel())
                self.map.profile(self._features(counted))
            slots_n = self.map.remap(self._features(ids_n))[self.name].values()
        else:
            slots_n = self.map(self._features(ids_n))[self.name].values()
        return torch.where(slots_n == self._slots, UNKNOWN, slots_n + self._first), self._gone()

    def _features(self, ids_n: Tensor) -> dict[str, JaggedTensor]:
        return {self.name: JaggedTensor(values=ids_n, lengths=torch.tensor([ids_n.numel()], device=ids_n.device))}

    def _gone(self) -> Gone | None:
        slots = self.map.evict() if self.training else None
        if slots is None:
            return None
        rows = slots[slots != self._slots] + self._first
        step = getattr(self.map, "_current_iter", 0)
        return Gone(rows, mix(mix(torch.full_like(rows, step) * GOLDEN + self._seed) + rows))

    def get_extra_state(self) -> Tensor:
        """Counters, the ids since the last round with what the policy remembers of each, and the seed.

        int64 ``[3 + seen · (1 + memories) + 1]``.
        """
        if not isinstance(self.map, MCHManagedCollisionModule):
            return torch.empty(0, dtype=torch.int64)
        seen = self.map._current_history_buffer_offset
        counters = torch.tensor([self.map._current_iter, self.map._last_eviction_iter, seen])
        memories = [] if seen == 0 else _memories(self.map)
        return torch.cat([counters, *(memory[:seen].cpu() for memory in memories), torch.tensor([self._seed])])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where `get_extra_state` was called. A state without a seed is of a time when there was none."""
        if not isinstance(self.map, MCHManagedCollisionModule):
            return
        current, last, seen = state[:_COUNTERS].tolist()
        self.map._current_iter, self.map._last_eviction_iter, self.map._current_history_buffer_offset = current, last, 0
        self.map._evicted = False
        kinds = 1 + len(_remembered(self.map))
        if seen:
            _make_room(self.map, seen)
            for memory, saved in zip(_memories(self.map), state[_COUNTERS:][: seen * kinds].view(kinds, seen), strict=True):
                memory[:seen] = saved.to(memory.device)
        self.map._current_history_buffer_offset = seen
        self._seed = int(state[-1]) if len(state) > _COUNTERS + seen * kinds else self._seed


def _make_room(collisions: MCHManagedCollisionModule, ids: int) -> None:
    """Let the module remember ``ids`` more: TorchRec sizes its memory by the first batch, and cuts off what a longer one has beyond it."""
    seen, size = collisions._current_history_buffer_offset, collisions._input_history_buffer_size
    if seen + ids <= size:
        return
    size = max(2 * (seen + ids), 1)
    old = _memories(collisions) if seen else []
    memories = [torch.zeros(size, dtype=torch.int64, device=collisions.device) for _ in range(1 + len(_remembered(collisions)))]
    for memory, before in zip(memories, old, strict=False):
        memory[:seen] = before[:seen]
    collisions._input_history_buffer_size, collisions._history_accumulator = size, memories[0]
    for name, memory in zip(_remembered(collisions), memories[1:], strict=True):
        collisions.register_buffer(f"_history_{name}", memory, persistent=False)
        collisions._history_metadata[name] = memory


def _memories(collisions: MCHManagedCollisionModule) -> list[Tensor]:
    """The ids seen since the last round, and what the policy remembers of each."""
    return [collisions._history_accumulator, *collisions._history_metadata.values()]


def _remembered(collisions: MCHManagedCollisionModule) -> list[str]:
    """What the policy remembers of each sighting since the last round."""
    return [info.metadata_name for info in collisions._eviction_policy.metadata_info if info.is_history_metadata]
