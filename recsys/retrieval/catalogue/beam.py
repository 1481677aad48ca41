# SPDX-License-Identifier: Apache-2.0
"""Beam search over the codes of the live catalogue: every prefix that is kept leads to an item that may be recommended to its user."""

from dataclasses import replace
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.retrieval.catalogue.beam_search import BeamSearch, Open, alive_of, children_log_sum, next_log_probs
from recsys.retrieval.catalogue.code_index import CodeIndex, check_log_probs
from recsys.retrieval.catalogue.index import Array, Exclude, Excluded, IndexMeta, check_k
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.catalogue.topk import best, keys_of
from recsys.retrieval.catalogue.trie import CodeTrie
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import EncoderMemory, SlotLogProbs

State: TypeAlias = EncoderMemory | SlotLogProbs


@register("index", "beam")
class BeamIndex(CodeIndex):
    """A trie over the codes of all rows of a catalogue, searched level by level.

    A node counts the items below it that are live, and those among them that the user must not see: a beam goes only where one is left. So
    as long as a width is at least k, k items come back wherever they exist; smaller ones are widened for the users that lack some, as are
    those of users whose beams the model itself closed (by -inf). At equal scores the smaller codes come first, and at the leaves the
    smaller row.

    Args:
        config: see `Config`.
        table: the codes.
        meta: what they were made from.
        trie: of these codes, where there is one already.

    Raises:
        ConfigError: there is not one width for each level.
    """

    accepts: ClassVar[tuple[type, ...]] = (EncoderMemory, SlotLogProbs)

    class Config(BaseConfig):
        """Widths.

        Attributes:
            width: beams kept at each level.
            widths: beams kept at each level, where they differ; in the place of ``width``. RecGPT's published search is (10, 20, 20, 20)
                with 5 ``children``.
            children: at most so many children of each beam; null for all.
            renormalise: whether a level's probabilities are divided by their sum over the children that the catalogue has, live or not;
                else they are the model's own, over all codes.
        """

        name: Literal["beam"] = "beam"
        width: int = Field(50, ge=1)
        widths: tuple[int, ...] | None = None
        children: int | None = Field(None, ge=1)
        renormalise: bool = False

    config: Config

    def __init__(self, config: Config, table: CodeTable, meta: IndexMeta, trie: CodeTrie | None = None) -> None:
        super().__init__(config, table, meta)
        if config.widths is not None and (len(config.widths) != table.levels or min(config.widths) < 1):
            raise ConfigError(f"index 'beam': widths: expected {table.levels} of at least 1, one for each level, got {config.widths}")
        self.trie = trie or CodeTrie.build(table.codes.numpy(), table.level_sizes)
        self._counted: tuple[np.ndarray, tuple[np.ndarray, ...], tuple[Tensor | None, ...]] | None = None

    @torch.no_grad()
    def search(
        self, state: State, k: int, view: CatalogueView, exclude: Exclude | None = None, scorable: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`: the best of the items that the beams reach; an item of -inf never comes back."""
        check_k(k)
        state = self._checked(state)
        allowed, batch = self._allowed(view, scorable), len(state.values)
        excluded = self._excluded(exclude, batch, allowed)
        rows, scores = best(np.zeros((batch, 0), np.uint64), k)
        wanted = np.minimum(k, np.count_nonzero(allowed) - np.bincount(excluded.query, minlength=batch))
        widths, children = self.config.widths or (self.config.width,) * self.table.levels, self.config.children
        users = np.flatnonzero(wanted)
        while len(users):
            own = excluded.of(users, batch)
            search = BeamSearch(self.trie, Open.of(self.trie, *self._counts(allowed), own), self.config.renormalise)
            leaves, found, cut = search.run(_of(state, users).begin(), users, widths, children)
            rows[users], scores[users] = self._items(leaves.numpy(), found.numpy(), k, allowed, own)
            users = users[(np.count_nonzero(rows[users] >= 0, axis=1) < wanted[users]) & cut.numpy()]
            widths, children = tuple(max(k, 2 * width) for width in widths), None
        return rows, scores

    @torch.no_grad()
    def score(self, state: State, rows: np.ndarray) -> np.ndarray:
        """See `Index.score`: what `search` gives, whatever may be recommended."""
        state = self._checked(state)
        rows = self._check_lists(rows, len(state.values))
        if not rows.size:
            return np.zeros(rows.shape, np.float32)
        codes_bcl, scorer = self._codes_of(rows), state.begin()
        scores, taken = torch.zeros(rows.shape), torch.full((len(rows), 1), -1)
        for level, size in enumerate(self.table.level_sizes):
            parents = torch.arange(rows.shape[1]).expand(rows.shape) if level > 1 else torch.full_like(taken, level - 1)
            log_probs = next_log_probs(scorer, parents, taken, level, size).expand(-1, rows.shape[1], -1)
            taken = codes_bcl[..., level]
            found = log_probs.gather(2, taken[..., None])[..., 0]
            check_log_probs(found, f"level {level}")
            if self.config.renormalise and len(self.table):
                nodes = torch.from_numpy(self.trie.nodes_of(np.maximum(rows, 0), level))
                found = found - children_log_sum(self.trie, level, nodes, log_probs)
            scores += found
        return np.where(rows >= 0, scores.numpy(), np.float32(-np.inf))

    def log_partition(self, state: State, view: CatalogueView, scorable: Array | None = None) -> np.ndarray:
        """See `Index.log_partition`; zeros for an `EncoderMemory`.

        There the sum over the live items would take a pass of the decoder for each of them: a score is the log-probability of an item's
        codes among all codes, whether or not they are of a live item, or of several.
        """
        state, allowed = self._checked(state), self._allowed(view, scorable)
        if isinstance(state, SlotLogProbs) and not self.config.renormalise:
            return self._slot_log_partition(state.values, allowed)
        return np.zeros(len(state.values), np.float32)

    def _checked(self, state: State) -> State:
        """A state that speaks of the codes that the table holds."""
        if isinstance(state, SlotLogProbs):
            return replace(state, values=self._log_probs(state))
        self._check_tokenizer(state)
        return state

    def _extended(self, table: CodeTable, meta: IndexMeta) -> "BeamIndex":
        """One trie again: beams compete for their width whatever row they lead to, so that lists of two tries could not be merged.

        The rows are merged into the present order, and nodes counted anew: .5 s for 10^6 rows with 4 codes, of .7 s for a trie built anew.
        """
        return type(self)(self.config, table, meta, self.trie.extended(table.codes[len(self.table) :].numpy()))

    def _items(
        self, leaves_bw: np.ndarray, scores_bw: np.ndarray, k: int, allowed: np.ndarray, excluded: Excluded
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores ``[B, k]`` of the items at the leaves, of which one may hold several."""
        starts = self.trie.starts[-1]
        user, beam = np.nonzero(scores_bw > -np.inf)
        leaf = leaves_bw[user, beam]
        count = starts[leaf + 1] - starts[leaf]
        place = np.repeat(starts[leaf], count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        row, user = self.trie.order[place], np.repeat(user, count)
        kept = allowed[row]
        shared = np.repeat(count, count) > 1  # a leaf of one item that is excluded is closed
        kept[shared] &= ~np.isin(user[shared] * len(allowed) + row[shared], excluded.query * len(allowed) + excluded.row)
        keys = keys_of(np.repeat(scores_bw[scores_bw > -np.inf], count)[kept], row[kept])
        user = user[kept]
        counts = np.bincount(user, minlength=len(leaves_bw))
        padded = np.zeros((len(leaves_bw), max(1, counts.max(initial=0))), np.uint64)
        padded[user, np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)] = keys
        return best(padded, k)

    def _counts(self, allowed: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[Tensor | None, ...]]:
        """The items below each node that may be recommended, and `alive_of` them; kept from the mask before, as it seldom changes."""
        counted = self._counted
        if counted is None or not np.array_equal(counted[0], allowed):
            counts = self.trie.counts(allowed)
            self._counted = counted = (allowed, counts, alive_of(counts))
        return counted[1:]


def _of(state: State, users: np.ndarray) -> State:
    """The state of these users alone."""
    if len(users) == len(state.values):
        return state
    chosen = torch.from_numpy(users).to(state.values.device)
    if isinstance(state, SlotLogProbs):
        return replace(state, values=state.values[chosen])
    return replace(state, values=state.values[chosen], valid=state.valid[chosen])
