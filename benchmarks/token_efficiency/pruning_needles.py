# SPDX-License-Identifier: Apache-2.0
"""Histories in which one planted event decides, and a small causal model that reads them: jagged layers that tell what they saw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.schedule import ProbedLayer
from recsys.efficiency.view import TokenView, held, to_padded

NOISE, CLASSES = 64, 8
QUERY = NOISE + CLASSES
ITEMS = QUERY + 1


@dataclass(frozen=True)
class Sizes:
    """How much is trained and tested; the defaults are the benchmark's.

    Attributes:
        length: of a history, with the query at its end.
        dim: d of the models.
        heads: of their attention.
        batch: histories of a training step.
        steps: of training a dense model.
        tuning: of what comes after.
        tested: histories that quality is measured on.
    """

    length: int = 32
    dim: int = 32
    heads: int = 4
    batch: int = 16
    steps: int = 200
    tuning: int = 80
    tested: int = 1024


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def needles(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Histories int64 ``[B, N]``, the one event of each that is no noise, ``[B]`` of 8 kinds, and its place; a query comes last."""
    items = torch.randint(NOISE, (rows, length), generator=generator)
    label = torch.randint(CLASSES, (rows,), generator=generator)
    place = torch.randint(length - 1, (rows,), generator=generator)
    items[torch.arange(rows), place] = NOISE + label
    items[:, -1] = QUERY
    return items, label, place


class Layer(nn.Module):
    """Pre-norm causal attention and a ReLU feed-forward network over jagged tokens.

    Args:
        dim: d.
        heads: of the attention.
        local: whether a token reads only itself and the event right before it.
    """

    def __init__(self, dim: int, heads: int, local: bool = False) -> None:
        super().__init__()
        self.heads, self.local = heads, local
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.enter, self.leave = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(
        self, view: TokenView, reader: "Layer | None" = None, slicing: Callable[[TokenView, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, LayerProbe]:
        """See `ProbedLayer`.

        Args:
            view: the tokens; what was dropped before is not among them.
            reader: whose projections say how the last token of each row looks at the others after this layer; None for no such probe.
            slicing: from the view and the activations ``[S, F]`` to those that the network goes on with.
        """
        normed = self.norm_attention(view.values)
        q, k, v = (to_padded(self._split(x), view.offsets).transpose(1, 2) for x in self.qkv(normed).chunk(3, -1))
        if self.local:
            place = to_padded(view.positions, view.offsets)
            distance = place[:, :, None] - place[:, None]
            made = F.scaled_dot_product_attention(q, k, v, attn_mask=((distance == 0) | (distance == 1))[:, None])
        else:
            made = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # what is padded comes after all that matters
        attended = self.out(made.transpose(1, 2)[held(view.lengths, q.shape[2])].flatten(1))
        middle = view.values + attended
        read = self.norm_ffn(middle)
        hidden = self.enter(read).relu()
        added = self.leave(hidden if slicing is None else slicing(view, hidden))
        values = middle + added
        query, key = (None, None) if reader is None else reader.looks(view.with_values(values))
        return values, LayerProbe(
            -1, attention_in=normed, attention_out=attended, ffn_in=read, ffn_out=added, ffn_hidden=hidden, query=query, key=key
        )

    def looks(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """Queries ``[B, H, 1, e]`` of the last token of each row, and keys ``[S, H, e]`` of all."""
        normed, dim = self.norm_attention(view.values), view.values.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(normed[view.offsets[1:] - 1], weight[:dim], bias[:dim])
        return self._split(query)[:, :, None], self._split(F.linear(normed, weight[dim : 2 * dim], bias[dim : 2 * dim]))

    def _split(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1))
        return split


class Reader(nn.Module):
    """A causal model whose last token tells which event was planted.

    Args:
        sizes: of histories and vectors.
        depth: layers.
        local: of the first layers, see `Layer`: only layers after these can carry a far event to the last token, so that dropping the
            event before them shows.
    """

    def __init__(self, sizes: Sizes, depth: int, local: int = 0) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(ITEMS, sizes.dim), nn.Embedding(sizes.length, sizes.dim)
        self.layers = nn.ModuleList(Layer(sizes.dim, sizes.heads, number < local) for number in range(depth))
        self.norm, self.head = nn.LayerNorm(sizes.dim), nn.Linear(sizes.dim, CLASSES)
        nn.init.normal_(self.places.weight, std=0.1)

    def view(self, items: Tensor) -> TokenView:
        """The tokens of histories ``[B, N]``."""
        rows, length = items.shape
        values = self.items(items) + self.places(torch.arange(length))
        return TokenView.of(values.flatten(0, 1), torch.arange(rows + 1) * length)

    def probed(self, reading: Sequence[int] = ()) -> list[ProbedLayer]:
        """The layers; those of ``reading`` also tell how the last token will look at the others in the layer after them."""
        layers = list(self.layers)
        return [_probed(layer, layers[number + 1] if number in reading else None) for number, layer in enumerate(layers)]

    def answer(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Logits ``[B, 8]`` from the last token of each row."""
        logits: Tensor = self.head(self.norm(values[offsets[1:] - 1]))
        return logits

    def read(self, items: Tensor) -> Tensor:
        """Vectors ``[B N, d]`` of histories ``[B, N]``."""
        view = self.view(items)
        for layer in self.probed():
            view = view.with_values(layer(view)[0])
        return view.values

    def forward(self, items: Tensor) -> Tensor:
        """Logits ``[B, 8]`` of histories ``[B, N]``."""
        return self.answer(self.read(items), torch.arange(len(items) + 1) * items.shape[1])

    def loss(self, items: Tensor, label: Tensor, place: Tensor) -> Tensor:
        """Every token from the planted one on is asked, as sequential recommenders are trained at every event."""
        asked = (torch.arange(items.shape[1]) >= place[:, None]).flatten()
        logits = self.head(self.norm(self.read(items)[asked]))
        return F.cross_entropy(logits, label[:, None].expand_as(items).flatten()[asked])


def _probed(layer: nn.Module, reader: nn.Module | None) -> ProbedLayer:
    def run(view: TokenView) -> tuple[Tensor, LayerProbe]:
        found: tuple[Tensor, LayerProbe] = layer(view, reader)
        return found

    return run


def trained_reader(seed: int, sizes: Sizes, depth: int, local: int) -> Reader:
    """A reader that learned from drawn histories."""
    torch.manual_seed(seed)
    model, generator = Reader(sizes, depth, local), seeded(seed)
    fit(model.parameters(), sizes.steps, lambda: model.loss(*needles(sizes.batch, sizes.length, generator)))
    return model.eval()


def fit(parameters: object, steps: int, loss: Callable[[], Tensor], rate: float = 4e-3) -> None:
    """Adam with a short warm-up and a cosine, by losses of ever new batches."""
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)  # type: ignore[arg-type]
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=max(steps // 10, 1))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=0.1 * rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        warm.step()
        fall.step()


@torch.no_grad()
def accuracy(answer: Callable[[Tensor], Tensor], sizes: Sizes, seed: int, chunk: int = 128) -> float:
    """The share of new histories whose planted event is told; ``answer`` gives logits ``[B, 8]``."""
    items, label, _ = needles(sizes.tested, sizes.length, seeded(10_000 + seed))
    found = [answer(own).argmax(-1) == true for own, true in zip(items.split(chunk), label.split(chunk), strict=True)]
    return float(torch.cat(found).double().mean())
