# SPDX-License-Identifier: Apache-2.0
"""FASA: a few frequency pairs of a rotary embedding tell which keys matter; attention to those is exact."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.attend import allowed_keys, dense_attend, sparse_attend
from recsys.efficiency.attention.base import SelectedAttention, SparseAttentionConfig
from recsys.efficiency.selection import BlockSelection
from recsys.efficiency.selectors import top_keys

Layout = Literal["interleaved", "half"]

_QUERIES_AT_ONCE = 4  # calibration holds B x H x this x e/2 x N logits


class DominantKeys:
    """The dominant columns of a history's keys, packed ``[B, P, 2 N_tip, t]``: all that decides what a query reads.

    P is the number of query heads, or of key heads where these share their pairs. Appending costs what is appended: the memory doubles when
    it is full.

    Args:
        columns: int64 ``[P, 2 N_tip]``, the columns of each head, see `pair_columns`.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns
        self._length = 0
        self._memory: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def packed(self) -> Tensor:
        """``[B, P, 2 N_tip, t]``, a view.

        Raises:
            DataError: nothing was appended yet.
        """
        if self._memory is None:
            raise DataError("DominantKeys: expected keys to be appended first, got none")
        return self._memory[..., : self._length]

    def append(self, k: Tensor) -> None:
        """Take rotated keys ``[B, H_kv, n, e]`` that come after those seen."""
        heads, key_heads = len(self.columns), k.shape[1]
        if heads % key_heads:
            raise ConfigError(f"DominantKeys: expected key heads that divide the {heads} calibrated heads, got {key_heads}")
        of = torch.arange(heads, device=k.device) // (heads // key_heads)
        new = k.detach().transpose(-1, -2)[:, of[:, None], self.columns]
        end = self._length + k.shape[2]
        if self._memory is None:
            self._memory, self._length = new.contiguous(), end
            return
        if end > self._memory.shape[-1]:
            grown = new.new_empty(*new.shape[:-1], max(end, 2 * self._length))
            grown[..., : self._length] = self.packed
            self._memory = grown
        self._memory[..., self._length : end] = new
        self._length = end

    def score(self, q: Tensor) -> Tensor:
        """``S_t = Σ a^{(i)}`` over dominant pairs, ``[B, P, 1, t]``, of rotated queries ``[B, H, 1, e]``: one product of 2 N_tip columns.

        Where P is the number of key heads, the scores of the query heads of each are summed.
        """
        heads = len(self.columns)
        summed = q.unflatten(1, (heads, -1)).sum(2)
        scores: Tensor = summed.gather(-1, self.columns[None, :, None].expand(len(q), -1, 1, -1)) @ self.packed
        return scores


@register("sparse_attention", "fasa")
class FasaAttention(SelectedAttention):
    """Frequency-aware sparse attention (FASA) for decoding over a long cached history.

    Under a rotary embedding a logit is a sum over e/2 pairs of columns. `calibrate` finds, once and offline, the few pairs of each head
    that rank keys almost as the whole head does; while decoding their share of the logit chooses ``keep`` keys, and attention to these is
    exact, with their own positions. Queries and keys must be rotated already, in `calibrate` as in use.

    It chooses for one query at a time: more than one (prefill, training) are attended to densely, as in the paper. The paper also leaves
    the first layer dense, which is up to the model. Its code pairs adjacent columns whatever the model rotates; here ``layout`` says which
    ones belong together. The paper calibrates and chooses for each query head. Choosing for each key head (``per``) costs a top-k less for
    each further query head and is ours: agreement is averaged and scores are summed over the query heads of a key head. So are the
    ``recent`` keys that are always read, since the paper forces none.
    """

    class Config(SparseAttentionConfig):
        """The budgets.

        Attributes:
            keep: N_fac, keys that are read; calibration is for this number.
            dominant: N_tip, pairs of columns that choose.
            recent: the last keys, which are always read; they count among ``keep``.
            layout: which columns are rotated together: ``interleaved`` (2i, 2i + 1) or ``half`` (i, i + e/2).
            per: whether each query head or each key head has its own pairs and keys.
        """

        name: Literal["fasa"] = "fasa"
        keep: int = Field(256, ge=1)
        dominant: int = Field(16, ge=1)
        recent: int = Field(16, ge=0)
        layout: Layout = "half"
        per: Literal["head", "key_head"] = "head"

    needs_rotary = True
    dominant_pairs: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.recent > config.keep:
            raise ConfigError(f"sparse_attention 'fasa': recent: expected at most keep = {config.keep}, got {config.recent}")
        self.config: FasaAttention.Config = config
        self.register_buffer("dominant_pairs", torch.zeros(0, 0, dtype=torch.long))

    @torch.no_grad()
    def calibrate(self, samples: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Find the dominant pairs: those with the highest contextual agreement over the samples' decoding steps.

        Args:
            samples: rotated queries ``[B, H, T, e]`` and keys ``[B, H_kv, N, e]`` of whole histories; the queries stand at the last T
                places. Steps that may read at most ``keep`` keys say nothing and are left out.

        Returns:
            The agreement of each pair, ``[P, e/2]`` in [0, 1]; P as ``per`` says.

        Raises:
            ConfigError: there are not as many pairs as ``dominant``.
            DataError: no step may read more than ``keep`` keys, or the samples have different heads.
        """
        total: Tensor | None = None
        steps = 0
        for q, k in samples:
            if q.shape[-1] // 2 < self.config.dominant:
                raise ConfigError(
                    f"sparse_attention 'fasa': dominant: expected at most {q.shape[-1] // 2} pairs of {q.shape[-1]} columns, "
                    f"got {self.config.dominant}"
                )
            mean, count = contextual_agreement(q, k, self.config.keep, self.config.layout)
            if self.config.per == "key_head":
                mean = mean.unflatten(0, (k.shape[1], -1)).mean(1)
            if total is not None and total.shape != mean.shape:
                raise DataError(f"calibrate: expected samples of {tuple(total.shape)} heads and pairs, got {tuple(mean.shape)}")
            total = mean * count if total is None else total + mean * count
            steps += count
        if total is None or steps == 0:
            raise DataError(f"calibrate: expected a step that may read more than keep = {self.config.keep} keys, got none")
        best = total.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.dominant]
        self.dominant_pairs = best.sort(dim=-1).values.to(self.dominant_pairs.device)
        return total / steps

    def pack(self, k: Tensor) -> DominantKeys:
        """The dominant columns of rotated keys ``[B, H_kv, N, e]``: once for a history, then appended to and handed to `attend`.

        Raises:
            ConfigError: nothing was calibrated.
        """
        if not self.dominant_pairs.numel():
            raise ConfigError(
                "sparse_attention 'fasa': expected dominant pairs, got none: it needs queries and keys with rotary positions, and "
                "calibrate(samples) on such, or a state that holds dominant_pairs"
            )
        if int(self.dominant_pairs.max()) >= k.shape[-1] // 2:
            raise ConfigError(f"sparse_attention 'fasa': calibrated for wider heads than keys of {k.shape[-1]} columns")
        keys = DominantKeys(pair_columns(self.dominant_pairs, k.shape[-1], self.config.layout))
        keys.append(k)
        return keys

    def choose(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> BlockSelection:
        """See `SelectedAttention.choose`: ``[B, P, 1, keep]``.

        Raises:
            ConfigError: more than one query, or nothing was calibrated.
        """
        return self._choose(q, k, query_positions, lengths, None)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        scale: float | None,
        packed: DominantKeys | None = None,
    ) -> Tensor:
        """See `SparseAttention.attend`.

        Args:
            q: as there, rotated.
            k: as there, rotated.
            v: as there.
            query_positions: as there.
            lengths: as there.
            scale: as there.
            packed: the dominant columns of ``k``, kept while decoding; None packs them anew, which reads all of ``k``.

        Raises:
            ConfigError: one query, more keys than are kept, and nothing was calibrated; or ``packed`` is of other keys.
        """
        if q.shape[2] != 1 or k.shape[2] <= self.config.keep:
            return dense_attend(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale)
        with torch.no_grad():
            selection = self._choose(q, k, query_positions, lengths, packed)
        return sparse_attend(q, k, v, selection, scale=scale)

    def _choose(
        self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None, packed: DominantKeys | None
    ) -> BlockSelection:
        if q.shape[2] != 1:
            raise ConfigError(f"sparse_attention 'fasa': expected one query (it is for decoding), got {q.shape[2]}")
        packed = self.pack(k) if packed is None else packed
        wanted = q.shape[1] if self.config.per == "head" else k.shape[1]
        if len(packed) != k.shape[2] or len(packed.columns) != wanted:
            raise ConfigError(
                f"sparse_attention 'fasa': expected the dominant columns of {k.shape[2]} keys and {wanted} heads, "
                f"got {len(packed)} and {len(packed.columns)}"
            )
        allowed = allowed_keys(k.shape[2], query_positions, lengths, k.device)
        recent = torch.arange(k.shape[2], device=k.device) >= allowed.sum(-1, keepdim=True) - self.config.recent
        return top_keys(packed.score(q), self.config.keep, allowed, recent)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take as many heads as were calibrated."""
        stored = state_dict.get(prefix + "dominant_pairs")
        if stored is not None and stored.shape != self.dominant_pairs.shape:
            self.dominant_pairs = self.dominant_pairs.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[no-untyped-call]


def paired(x: Tensor, layout: Layout) -> Tensor:
    """``[…, e]`` to ``[…, e/2, 2]``: the columns that a rotary embedding rotates together.

    Raises:
        ConfigError: an odd number of columns.
    """
    if x.shape[-1] % 2:
        raise ConfigError(f"layout: rotary positions need an even number of columns, got {x.shape[-1]}")
    pairs: Tensor = x.unflatten(-1, (-1, 2)) if layout == "interleaved" else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    return pairs


def pair_columns(pairs: Tensor, width: int, layout: Layout) -> Tensor:
    """int64 ``[…, 2 n]``: the columns of pairs int64 ``[…, n]`` of vectors of a width."""
    columns = paired(torch.arange(width, device=pairs.device), layout)
    found: Tensor = columns[pairs].flatten(-2)
    return found


def frequency_logits(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """``a^{(i)}_{t,s}``, ``[B, H, T, e/2, N]``: what each pair adds to the inner product of queries and keys, both rotated.

    Args:
        q: ``[B, H, T, e]``.
        k: ``[B, H_kv, N, e]``; H_kv divides H.
        layout: see `FasaAttention.Config`.
    """
    queries = paired(q.unflatten(1, (k.shape[1], -1)), layout)
    logits: Tensor = torch.einsum("bgjtic,bgsic->bgjtis", queries, paired(k, layout)).flatten(1, 2)
    return logits


def agreement(part: Tensor, whole: Tensor, keep: int) -> Tensor:
    """``|TopK(part) ∩ TopK(whole)| / K`` along the last dimension of logits ``[…, N]`` that broadcast against each other."""
    marks = []
    for logits in (part, whole):
        best = logits.topk(keep, sorted=False).indices
        marks.append(torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True))
    return (marks[0] & marks[1]).sum(-1).double() / keep


def contextual_agreement(q: Tensor, k: Tensor, keep: int, layout: Layout) -> tuple[Tensor, int]:
    """CA of each pair with the whole head, ``[H, e/2]``, the mean over rows and decoding steps; and over how many of these.

    Args:
        q: rotated ``[B, H, T, e]``, at the last T places.
        k: rotated ``[B, H_kv, N, e]``.
        keep: K; steps that may read at most so many keys are left out.
        layout: see `FasaAttention.Config`.
    """
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    positions = torch.arange(keys - queries, keys, device=q.device)
    q, positions = q[:, :, positions >= keep], positions[positions >= keep]
    total = torch.zeros(heads, width // 2, dtype=torch.float64, device=q.device)
    for some, places in zip(q.split(_QUERIES_AT_ONCE, 2), positions.split(_QUERIES_AT_ONCE), strict=True):
        logits = frequency_logits(some, k, layout)
        behind = torch.arange(keys, device=q.device) > places[:, None, None]
        whole = logits.sum(3, keepdim=True).masked_fill(behind, -torch.inf)
        total += agreement(logits.masked_fill(behind, -torch.inf), whole, keep).sum((0, 2))
    steps = batch * len(positions)
    return total / max(steps, 1), steps
