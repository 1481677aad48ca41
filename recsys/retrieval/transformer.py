# SPDX-License-Identifier: Apache-2.0
"""A small pre-norm transformer, causal over items of one token each; `recsys.retrieval.item_transformers` has items of several."""

from collections.abc import Callable
from typing import Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kernels.jagged_attention import jagged_attention
from kernels.jagged_attention.reference import Mask
from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.efficiency.attention.base import SparseAttention
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.schedule import ProbedLayer, PruneSchedule
from recsys.efficiency.view import TokenView, held, through_tokens, to_padded
from recsys.retrieval.efficiency import RetrieverEfficiency, placed, placed_schedule
from recsys.retrieval.padding import after_all
from recsys.retrieval.routed import RoutedNetworks

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[B, H, T, e]`` of right-padded rows and their lengths ``[B]``, to ``[B, H, T, e]``."""

Feed: TypeAlias = Callable[[Tensor], Tensor]
"""In the place of a feed-forward network: normed tokens to their update."""


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

    def update(self, x_btd: Tensor, attended_bhtd: Tensor, feed: Feed | None = None) -> Tensor:
        """The tokens after both sub-layers, given what each attended to; ``feed`` may stand in the place of the feed-forward network."""
        return self._added(x_btd, attended_bhtd.transpose(1, 2).flatten(2), feed or self.ffn)

    def jagged(self, x_sd: Tensor, offsets: Tensor, mask: Mask, group: int, feed: Feed | None = None) -> Tensor:
        """``[S, d]`` to ``[S, d]``: the tokens after both sub-layers, of rows one after another; see `kernels.jagged_attention`."""
        attended = jagged_attention(*self._in_rows(x_sd), offsets, mask=mask, group=group)
        return self._added(x_sd, attended.flatten(1), feed or self.ffn)

    def reading(self, x_sd: Tensor, offsets: Tensor, seen: Tensor, wanted: Tensor | None = None) -> Tensor:
        """As `jagged`, of tokens that see the first ``seen`` ones of their row (int64 ``[S]``), and themselves.

        With ``wanted`` (bool ``[S]``) only W tokens are updated, ``[W, d]``; the others are read.
        """
        if wanted is None:
            attended = jagged_attention(*self._in_rows(x_sd), offsets, mask="prefix", seen=seen)
            return self._added(x_sd, attended.flatten(1), self.ffn)
        place = wanted.nonzero()[:, 0]
        query, key, value = self._in_rows(x_sd, place)
        attended = jagged_attention(query, key, value, offsets, mask="prefix", seen=seen.where(wanted, 0))
        return self._added(x_sd[place], attended[place].flatten(1), self.ffn)

    def _in_rows(self, x_sd: Tensor, asking: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens, each ``[S, H, d / H]``; where only some ask, at these places, other queries are zeros."""
        normed = self.attention_norm(x_sd)
        key, value = self.key_value(normed).chunk(2, -1)
        query = self.query(normed if asking is None else normed[asking])
        if asking is not None:
            query = torch.zeros_like(normed).index_put((asking,), query)
        query, key, value = (x.unflatten(1, (self.heads, -1)) for x in (query, key, value))
        return query, key, value

    def _added(self, x: Tensor, attended: Tensor, feed: Feed) -> Tensor:
        x = x + self.dropout(self.out(attended))
        updated: Tensor = x + self.dropout(feed(self.ffn_norm(x)))
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
        self.schedule = placed_schedule(config, self, len(self.blocks) - 1)

    def _layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _feed(self, number: int, block: Block) -> Feed | None:
        """What stands in the place of a block's feed-forward network; None for nothing."""
        return None

    def _over_rows(self, x_btd: Tensor, lengths_b: Tensor, mask: Mask = "causal", group: int = 1) -> Tensor:
        """``[B, T, d]`` to ``[B, T, d]`` through all blocks and the final norm; padding takes no part, and what stands there is zero."""

        def run(x_sd: Tensor, offsets: Tensor) -> Tensor:
            for number, block in enumerate(self._layers()):
                x_sd = block.jagged(x_sd, offsets, mask, group, self._feed(number, block))
            normed: Tensor = self.norm(x_sd)
            return normed

        return through_tokens(x_btd, lengths_b, run)


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
        """``[B, T, d]`` to ``[B, T, d]``, of right-padded rows of ``lengths_b`` tokens."""
        x_btd = self.dropout(x_btd + self.position.weight[: x_btd.shape[1]])
        if self.attention is None:
            return self._over_rows(x_btd, lengths_b)
        for number, block in enumerate(self._layers()):
            query, key, value = block.project(x_btd)
            attended = self._attend(query, key, value, lengths_b)
            x_btd = block.update(x_btd, attended, _of_tokens(self._feed(number, block), lengths_b))
        normed: Tensor = self.norm(x_btd)
        return normed

    def penalized(self, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss with what routing adds to it in training, and its parts."""
        if self.routes is None or not (self.routing and self.training):
            return loss, parts
        added, told = self.routes.penalty()
        return loss + added, parts | told

    def _feed(self, number: int, block: Block) -> Feed | None:
        """See `Transformer._feed`."""
        routes = self.routes
        if routes is None or not self.routing:
            return None
        return lambda normed: routes(number, block.ffn, normed)

    def last(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, d]``: the state of the last token of each row, which has ``lengths_b`` of them, at least 1."""
        if self.schedule is None:
            states: Tensor = self(x_btd, lengths_b)
            return after_all(states, lengths_b - 1)
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


def _of_tokens(feed: Feed | None, lengths_b: Tensor) -> Feed | None:
    """A network of tokens over right-padded rows; padding gets zero."""
    if feed is None:
        return None
    return lambda normed: through_tokens(normed, lengths_b, lambda tokens, _: feed(tokens))


def last_queries(tokens: int) -> Attend:
    """The queries of the last tokens of each row, of which it has at least so many."""

    def ask(query: Tensor, key: Tensor, value: Tensor, lengths_b: Tensor) -> Tensor:
        places = lengths_b[:, None] + torch.arange(-tokens, 0, device=lengths_b.device)
        return query[torch.arange(len(lengths_b), device=lengths_b.device)[:, None], :, places].transpose(1, 2)

    return ask
