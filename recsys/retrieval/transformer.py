# SPDX-License-Identifier: Apache-2.0
"""A small pre-norm transformer in the two forms that the retrievers need: causal over items, and over sets of tokens with queries."""

from collections.abc import Callable
from typing import Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.efficiency.attention.base import SparseAttention
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.schedule import ProbedLayer, PruneSchedule
from recsys.efficiency.view import TokenView, held, to_padded
from recsys.retrieval.efficiency import RetrieverEfficiency, placed
from recsys.retrieval.routed import RoutedNetworks

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[B, H, T, e]`` of right-padded rows and their lengths ``[B]``, to ``[B, H, T, e]``."""


class TransformerConfig(Config):
    """Size and regularisation of a `Transformer`.

    Attributes:
        dim: width d of the residual stream.
        blocks: attention and feed-forward pairs.
        heads: attention heads; must divide ``dim``.
        ffn_multiplier: hidden width of the feed-forward part, in units of ``dim``; 1 as in SASRec.
        dropout: on the input and on what each sub-layer adds; attention weights are not dropped.
        max_length: the longest history L.
        init_std: of the normal distribution from which weights and embeddings are drawn.
        efficiency: how the retriever spends less; null to spend everything.
    """

    dim: int = Field(default=64, ge=1)
    blocks: int = Field(default=2, ge=1)
    heads: int = Field(default=2, ge=1)
    ffn_multiplier: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0)
    max_length: int = Field(default=50, ge=1)
    init_std: float = Field(default=0.02, gt=0.0)
    efficiency: RetrieverEfficiency | None = None

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of heads={self.heads}, got {self.dim}")
        return self


class Block(nn.Module):
    """Pre-norm attention and feed-forward sub-layers; who attends to whom is left to the caller."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.ffn_multiplier * config.dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens, each ``[B, H, T, d / H]``."""
        normed = self.attention_norm(x_btd)
        key, value = self.key_value(normed).chunk(2, -1)
        return self._split(self.query(normed)), self._split(key), self._split(value)

    def memory(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values only, each ``[B, H, T, d / H]``."""
        key, value = self.key_value(self.attention_norm(x_btd)).chunk(2, -1)
        return self._split(key), self._split(value)

    def update(self, x_btd: Tensor, attended_bhtd: Tensor, feed: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The tokens after both sub-layers, given what each attended to; ``feed`` may stand in the place of the feed-forward network."""
        x_btd = x_btd + self.dropout(self.out(attended_bhtd.transpose(1, 2).flatten(2)))
        updated: Tensor = x_btd + self.dropout((feed or self.ffn)(self.ffn_norm(x_btd)))
        return updated

    def probed(self, attend: Attend, asking: Attend) -> ProbedLayer:
        """The block over jagged tokens, with what a scorer may want to know.

        Args:
            attend: what the tokens attend to.
            asking: ``[B, H, M, e]``, the queries of the tokens for whose sake the others are judged.
        """

        def layer(view: TokenView) -> tuple[Tensor, LayerProbe]:
            x_btd = to_padded(view.values, view.offsets)
            inside = held(view.lengths, x_btd.shape[1])
            query, key, value = self.project(x_btd)
            added = self.out(attend(query, key, value, view.lengths).transpose(1, 2).flatten(2))
            between = x_btd + added
            read = self.ffn_norm(between)
            hidden = self.ffn[:-1](read)
            update = self.ffn[-1](hidden)
            probe = LayerProbe(
                0,
                attention_in=self.attention_norm(x_btd)[inside],
                attention_out=added[inside],
                ffn_in=read[inside],
                ffn_out=update[inside],
                ffn_hidden=hidden[inside],
                query=asking(query, key, value, view.lengths),
                key=key.transpose(1, 2)[inside],
                value=value.transpose(1, 2)[inside],
            )
            return (between + update)[inside], probe

        return layer

    def _split(self, x_btd: Tensor) -> Tensor:
        split: Tensor = x_btd.unflatten(-1, (self.heads, -1))
        return split.transpose(1, 2)


class Transformer(nn.Module):
    """What the forms share: learned positions (ids 0 to ``max_length``), input dropout, the blocks and a final norm.

    Attributes:
        schedule: which tokens go on from layer to layer where only the state after a whole history is wanted; see `take_efficiency`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.position = nn.Embedding(config.max_length + 1, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.schedule: PruneSchedule | None = None

    def take_efficiency(self, config: RetrieverEfficiency | None) -> None:
        """Take a schedule for the state after a whole history, or none.

        Raises:
            ConfigError: it drops tokens after a layer that is not there, or after the last one.
        """
        schedule = None if config is None else config.schedule
        made = None if schedule is None else placed(PruneSchedule(schedule), self)
        if made is not None:
            made.require(len(self.blocks) - 1)
        self.schedule = made

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))


class CausalTransformer(Transformer):
    """Each token sees itself and the earlier ones.

    Attributes:
        attention: in the place of PyTorch's; see `take_efficiency`.
        routes: which tokens the feed-forward networks compute for, where the configuration says so.
        routing: whether `routes` decide; else all tokens are computed.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.attention: SparseAttention | None = None
        routing = None if config.efficiency is None else config.efficiency.routing
        self.routes = None if routing is None else RoutedNetworks(routing, config.blocks, config.dim)
        self.routing = False

    def take_efficiency(self, config: RetrieverEfficiency | None) -> None:
        """Take another attention, a schedule for `last`, and routing; None for none of them.

        Raises:
            ConfigError: the attention needs rotary positions, where those here are learned, or is not causal; or routing is asked for that
                the model was not built with, or together with a schedule.
        """
        attention = None if config is None or config.attention is None else components.build("sparse_attention", config.attention)
        if attention is not None and config is not None:
            name = config.attention.name
            if attention.needs_rotary:
                raise ConfigError(f"efficiency: attention: {name!r} needs rotary positions, got learned ones")
            if not attention.causal:
                raise ConfigError(f"efficiency: attention: {name!r} as configured lets later events choose what earlier ones read")
        routing = None if config is None else config.routing
        if routing is not None and (self.routes is None or self.routes.config != routing):
            raise ConfigError("efficiency: routing: it has weights of its own; expected what the model was built with")
        if config is not None and routing is not None and config.schedule is not None:
            raise ConfigError("efficiency: routing: expected no schedule beside it")
        super().take_efficiency(config)
        self.attention = None if attention is None else placed(attention, self)
        self.routing = routing is not None

    def forward(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, T, d]`` to ``[B, T, d]``, of right-padded rows of ``lengths_b`` tokens.

        Fused attention needs no mask for padding, which comes after everything that matters; a form that chooses is told the lengths.
        """
        x_btd = self.dropout(x_btd + self.position.weight[: x_btd.shape[1]])
        for number, block in enumerate(self._layers()):
            query, key, value = block.project(x_btd)
            x_btd = block.update(x_btd, self._attend(query, key, value, lengths_b), self._feed(number, block, lengths_b))
        normed: Tensor = self.norm(x_btd)
        return normed

    def penalized(self, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss with what routing adds to it in training, and its parts."""
        if self.routes is None or not (self.routing and self.training):
            return loss, parts
        added, told = self.routes.penalty()
        return loss + added, parts | told

    def _feed(self, number: int, block: Block, lengths_b: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What stands in the place of a block's feed-forward network; None for nothing."""
        routes = self.routes
        if routes is None or not self.routing:
            return None
        return lambda normed: routes(number, block.ffn, normed, held(lengths_b, normed.shape[1]))

    def last(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, d]``: the state of the last token of each row, which has ``lengths_b`` of them, at least 1."""
        if self.schedule is None:
            states: Tensor = self(x_btd, lengths_b)
            return states[torch.arange(len(x_btd), device=x_btd.device), lengths_b - 1]
        view = TokenView.padded(self.dropout(x_btd + self.position.weight[: x_btd.shape[1]]), lengths_b)
        values, kept = self.schedule([block.probed(self._attend, last_queries(1)) for block in self._layers()], view)
        normed: Tensor = self.norm(values[kept.offsets[1:] - 1])
        return normed

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths_b: Tensor) -> Tensor:
        if self.attention is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        places = torch.arange(query.shape[2], device=query.device)
        attended: Tensor = self.attention(query, key, value, query_positions=places, lengths=lengths_b)
        return attended


class HybridTransformer(Transformer):
    """Groups of K tokens: a token sees all tokens of the groups before its own, and those of its own (RecGPT, arXiv 2506.06270).

    Groups take the place of the items in a history for their position ids.
    """

    def forward(self, groups_blkd: Tensor, bidirectional: bool = True) -> Tensor:
        """``[B, L, K, d]`` to ``[B, L, K, d]``. Right padding needs no mask: it comes after everything that matters.

        Args:
            groups_blkd: at most ``max_length + 1`` groups.
            bidirectional: whether a token sees the later ones of its own group.
        """
        length, tokens = groups_blkd.shape[1:3]
        x_btd = self.dropout(groups_blkd + self.position.weight[:length, None]).flatten(1, 2)
        mask = _group_mask(length * tokens, tokens if bidirectional else 1, x_btd.device)
        for block in self._layers():
            query, key, value = block.project(x_btd)
            x_btd = block.update(x_btd, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        normed: Tensor = self.norm(x_btd).unflatten(1, (length, tokens))
        return normed

    def last(self, groups_blkd: Tensor, lengths_b: Tensor, bidirectional: bool = True) -> Tensor:
        """``[B, K, d]``: the states of the last group of each row, which has ``lengths_b`` of them, at least 1."""
        length, tokens = groups_blkd.shape[1:3]
        if self.schedule is None:
            states: Tensor = self(groups_blkd, bidirectional)
            return states[torch.arange(len(lengths_b), device=lengths_b.device), lengths_b - 1]

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

    Queries never enter the memory, so any choice of states costs only its own queries, all prefixes train in one pass, and no mask
    over items and queries together is ever built. In the last block the items serve as keys and values alone.
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
        length, tokens = items_blnd.shape[1:3]
        item_seen = torch.arange(length, device=seen_bp.device)[None]
        item_bias, query_bias = (_seen_bias(seen, length, tokens, items_blnd) for seen in (item_seen, seen_bp))
        memory = self.dropout(items_blnd + self.position(item_seen)[:, :, None]).flatten(1, 2)
        x_btd = self.dropout(queries_nd + self.position(seen_bp)[:, :, None]).flatten(1, 2)
        *inner, last = self._layers()
        for block in inner:
            query, key, value = block.project(memory)
            x_btd = block.update(x_btd, attend_seen(*block.project(x_btd), key, value, query_bias))
            memory = block.update(memory, attend_seen(query, key, value, key, value, item_bias))
        x_btd = last.update(x_btd, attend_seen(*last.project(x_btd), *last.memory(memory), query_bias))
        outputs: Tensor = self.norm(x_btd).unflatten(1, (-1, tokens))
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

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
        items = query.shape[2] // tokens
        return attend_seen(query, key, value, key, value, _seen_bias(torch.arange(items, device=query.device)[None], items, tokens, query))

    return attend


def last_queries(tokens: int) -> Attend:
    """The queries of the last tokens of each row, of which it has at least so many."""

    def ask(query: Tensor, key: Tensor, value: Tensor, lengths_b: Tensor) -> Tensor:
        places = lengths_b[:, None] + torch.arange(-tokens, 0, device=lengths_b.device)
        return query[torch.arange(len(lengths_b), device=lengths_b.device)[:, None], :, places].transpose(1, 2)

    return ask


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
