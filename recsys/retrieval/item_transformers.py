# SPDX-License-Identifier: Apache-2.0
"""The small pre-norm transformer over items that are several tokens each: groups that see themselves, and sets that are read by queries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jagged_attention import jagged_attention
from kernels.jagged_attention.reference import Mask
from recsys.efficiency.view import TokenView, from_padded, held, offsets_of, row_of, to_padded
from recsys.retrieval.padding import after_all
from recsys.retrieval.transformer import Attend, Block, Transformer, last_queries


class HybridTransformer(Transformer):
    """Groups of K tokens: a token sees all tokens of the groups before its own, and those of its own (RecGPT, arXiv 2506.06270).

    Groups take the place of the items in a history for their position ids.
    """

    def forward(self, groups_blkd: Tensor, lengths_b: Tensor, bidirectional: bool = True) -> Tensor:
        """``[B, L, K, d]`` to ``[B, L, K, d]``, of right-padded rows of ``lengths_b`` groups.

        Args:
            groups_blkd: at most ``max_length + 1`` groups.
            lengths_b: int64 ``[B]``.
            bidirectional: whether a token sees the later ones of its own group.
        """
        length, tokens = groups_blkd.shape[1:3]
        x_btd = self.dropout(groups_blkd + self.position.weight[:length, None]).flatten(1, 2)
        mask: Mask = "grouped" if bidirectional else "causal"
        states = self._over_rows(x_btd, lengths_b * tokens, mask, tokens if bidirectional else 1)
        groups: Tensor = states.unflatten(1, (length, tokens))
        return groups

    def last(self, groups_blkd: Tensor, lengths_b: Tensor, bidirectional: bool = True) -> Tensor:
        """``[B, K, d]``: the states of the last group of each row, which has ``lengths_b`` of them, at least 1."""
        length, tokens = groups_blkd.shape[1:3]
        if self.schedule is None:
            states: Tensor = self(groups_blkd, lengths_b, bidirectional)
            return after_all(states, lengths_b - 1)

        def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
            mask = _group_mask(query.shape[2], tokens if bidirectional else 1, query.device)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

        placed = self.dropout(groups_blkd + self.position.weight[:length, None])
        layers = [block.probed(attend, last_queries(tokens)) for block in self._layers()]
        values, kept = self.schedule(layers, _grouped(placed, lengths_b))
        whole = kept.offsets[1:, None] + torch.arange(-tokens, 0, device=lengths_b.device)
        normed: Tensor = self.norm(values[whole])
        return normed


class SetTransformer(Transformer):
    """Histories whose items are sets of n tokens, and groups of n queries that read them (SETRec).

    A token of item i sees all tokens of the items before i, and itself. Query k of a state that has seen p items sees all tokens of
    those p items, and itself; nothing sees a query. So queries and items attend in the same way, to a number of *seen* items and to
    themselves, and both take that number as their position id: the queries of state p stand where item p (counted from 0) will.

    A row holds the items that its states read, and after them their queries; no token is seen from further in front than the items reach.
    So any choice of states costs only its own queries, and all prefixes train in one pass. In the last block the items serve as keys
    and values alone.
    """

    def forward(self, items_blnd: Tensor, queries_nd: Tensor, seen_bp: Tensor) -> Tensor:
        """The outputs of the queries.

        Args:
            items_blnd: ``[B, L, n, d]`` the tokens of the items, right-padded.
            queries_nd: ``[n, d]`` the query group.
            seen_bp: int64 ``[B, P]`` how many items each wanted state has seen, at most L.

        Returns:
            ``[B, P, n, d]``, after the final norm.
        """
        if not seen_bp.numel():
            return queries_nd.expand(*seen_bp.shape, *queries_nd.shape)
        length, tokens = items_blnd.shape[1:3]
        place = torch.arange(length, device=seen_bp.device).expand(len(seen_bp), -1)
        read = place < F.pad(seen_bp, (1, 0)).amax(1, keepdim=True)
        held = torch.cat((read, torch.ones_like(seen_bp, dtype=torch.bool)), 1)
        groups = torch.cat((items_blnd, queries_nd.expand(*seen_bp.shape, -1, -1)), 1)[held]
        seen = torch.cat((place, seen_bp), 1)[held]
        asks = torch.cat((torch.zeros_like(read), torch.ones_like(seen_bp, dtype=torch.bool)), 1)[held]
        x_sd = self.dropout(groups + self.position(seen)[:, None]).flatten(0, 1)
        offsets = F.pad(held.sum(1).cumsum(0), (1, 0)) * tokens
        seen, asks = (seen * tokens).repeat_interleave(tokens), asks.repeat_interleave(tokens)
        *inner, last = self._layers()
        for block in inner:
            x_sd = block.reading(x_sd, offsets, seen)
        outputs: Tensor = self.norm(last.reading(x_sd, offsets, seen, asks)).unflatten(0, (*seen_bp.shape, tokens))
        return outputs

    def last(self, items_blnd: Tensor, queries_nd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, n, d]``: the outputs of the queries that have seen all ``lengths_b`` items of each row.

        Under a schedule, what the queries ask decides which items they go on reading.
        """
        length, tokens = items_blnd.shape[1:3]
        if self.schedule is None:
            outputs: Tensor = self(items_blnd, queries_nd, lengths_b[:, None])
            return outputs[:, 0]
        *inner, final = self._layers()
        asking = _Asking(self.dropout(queries_nd + self.position(lengths_b)[:, None]))
        places = torch.arange(length, device=lengths_b.device)
        view = _grouped(self.dropout(items_blnd + self.position(places)[:, None]), lengths_b)
        values, kept = self.schedule([block.probed(_attend_before(tokens), asking.through(block)) for block in inner], view)
        key, value = final.memory(to_padded(values, kept.offsets))
        asking.through(final)(key, key, value, kept.lengths)
        normed: Tensor = self.norm(asking.x_bnd)
        return normed


class _Asking:
    """A group of queries for each row on its way through the blocks, beside the items that it reads.

    Args:
        x_bnd: as they enter the first block.
    """

    def __init__(self, x_bnd: Tensor) -> None:
        self.x_bnd = x_bnd

    def through(self, block: Block) -> Attend:
        """Takes the group through a block, given the keys and values of the rows' items; returns its own queries."""

        def ask(_: Tensor, key: Tensor, value: Tensor, lengths_b: Tensor) -> Tensor:
            tokens = self.x_bnd.shape[1]
            bias = _seen_bias((lengths_b // tokens)[:, None], key.shape[2] // tokens, tokens, self.x_bnd)
            own = block.project(self.x_bnd)
            self.x_bnd = block.update(self.x_bnd, attend_seen(*own, key, value, bias))
            return own[0]

        return ask


def _attend_before(tokens: int) -> Attend:
    """Each token of an item sees all ``tokens`` tokens of each item before it, and itself."""

    def attend(query: Tensor, key: Tensor, value: Tensor, lengths_b: Tensor) -> Tensor:
        offsets = offsets_of(lengths_b)
        place = torch.arange(int(offsets[-1]), device=query.device) - offsets[row_of(offsets)]
        q, k, v = (from_padded(x.transpose(1, 2), offsets, len(place)) for x in (query, key, value))
        return to_padded(
            jagged_attention(q, k, v, offsets, mask="prefix", seen=place // tokens * tokens), offsets, width=query.shape[2]
        ).transpose(1, 2)

    return attend


def _grouped(x_blkd: Tensor, lengths_b: Tensor) -> TokenView:
    """Rows of ``lengths_b`` items of K tokens, which are kept or dropped whole."""
    length, tokens = x_blkd.shape[1:3]
    item = torch.arange(length * tokens, device=x_blkd.device) // tokens
    inside = held(lengths_b * tokens, length * tokens)
    return TokenView.padded(x_blkd.flatten(1, 2), lengths_b * tokens, groups=item.expand(len(lengths_b), -1)[inside])


def _group_mask(length: int, tokens: int, device: torch.device) -> Tensor:
    """bool ``[T, T]``: which keys each of T tokens sees: those of the groups up to its own."""
    group = torch.arange(length, device=device) // tokens
    return group[None, :] <= group[:, None]


def attend_seen(query: Tensor, own_key: Tensor, own_value: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention of each token to the memory, and to itself.

    A token's own key and value are not in the memory that all share. They ride along as one more coordinate: the query is extended by
    its score with its own key, and the memory by a first slot with key and value (0, … 0, 1). The last coordinate of the result is
    then the exact weight of the token itself, and one fused call does it all.

    Args:
        query: ``[B, H, T, e]``; likewise ``own_key`` and ``own_value``, which only the same token sees.
        own_key: see ``query``.
        own_value: see ``query``.
        keys: ``[B, H, S, e]``; likewise ``values``.
        values: see ``keys``.
        bias: ``[1 or B, 1, T, 1 + S]``, minus infinity where a token must not look, 0 where it may; 0 in column 0, the token itself.

    Returns:
        ``[B, H, T, e]``.
    """
    query = query * query.shape[-1] ** -0.5
    query = torch.cat((query, (query * own_key).sum(-1, keepdim=True)), -1)
    own_slot = F.pad(keys.new_ones(1, 1, 1, 1), (query.shape[-1] - 1, 0)).expand(*keys.shape[:2], 1, -1)
    keys, values = (torch.cat((own_slot, F.pad(m, (0, 1))), 2) for m in (keys, values))
    attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)
    return attended[..., :-1] + attended[..., -1:] * own_value


def _seen_bias(seen_bp: Tensor, length: int, tokens: int, like: Tensor) -> Tensor:
    """``[B, 1, P * n, 1 + L * n]``: 0 in column 0 and for the tokens of the first ``seen`` items, minus infinity for those of the rest."""
    unseen = torch.arange(length, device=seen_bp.device) >= seen_bp[..., None]
    bias = like.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
    bias = bias.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    return F.pad(bias, (1, 0))[:, None]
