# SPDX-License-Identifier: Apache-2.0
"""T5's decoder over trees of prefixes: any nodes of many users in one pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from recsys.retrieval.t5 import T5, attend_one, memory_mask


class T5Nodes:
    """A `recsys.efficiency.decoding.tree.NodeScorer`; a context is an encoded history.

    Codes are few for each item, so a node's keys and values are read along its own path, and no mask over all nodes is ever built.

    Args:
        model: in evaluation mode.
        memory_bsd: the encoded histories.
        valid_bs: their valid positions.
        token_of: the token of codes int64 ``[n]`` that stand at depths int64 ``[n]``, 0 for the start.
        score: from states ``[n, d]`` and the depths at which they were computed to ``[n, V]``.
    """

    def __init__(
        self,
        model: T5,
        memory_bsd: Tensor,
        valid_bs: Tensor,
        token_of: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._model, self._token_of, self._score = model, token_of, score
        self._mask = memory_mask(valid_bs, memory_bsd)
        self._memory = [layer.cross.memory(memory_bsd) for layer in model.decoder_layers()]
        self._past: list[tuple[Tensor, Tensor]] = []  # of each layer, [nodes, H, e] each
        self._paths: list[list[int]] = []  # of each node: the numbers from the root to itself

    @torch.no_grad()
    def extend(self, contexts: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """See `NodeScorer.extend`."""
        contexts, tokens = (x.to(self._mask.device) for x in (contexts, tokens))
        paths, depths = self._add(parents)
        column = _places_within(contexts)
        x_nd, pasts = self._model.embedding(self._token_of(tokens, depths)), []
        for i, layer in enumerate(self._model.decoder_layers()):
            own = layer.attention
            alone = own.norm(x_nd)[:, None]
            key, value = (m[:, :, 0] for m in own.memory(alone))
            if self._past:
                key, value = torch.cat((self._past[i][0], key)), torch.cat((self._past[i][1], value))
            pasts.append((key, value))
            path_key, path_value = (m[paths].transpose(1, 2) for m in (key, value))
            attended = attend_one(own.queries(alone), path_key, path_value, self._bias(depths, paths.shape[1]))
            x_nd = own.add(x_nd[:, None], attended)[:, 0]
            padded = x_nd.new_zeros(len(self._mask), int(column.max()) + 1, x_nd.shape[1])
            padded[contexts, column] = x_nd
            x_nd = layer.read(padded, self._memory[i], self._mask)[contexts, column]
        self._past = pasts
        return self._score(self._model.decoder_norm(x_nd), depths)

    def keep(self, nodes: Tensor) -> None:
        """See `NodeScorer.keep`."""
        number = {node: new for new, node in enumerate(nodes.tolist())}
        self._paths = [[number[one] for one in self._paths[node]] for node in number]
        nodes = nodes.to(self._mask.device)
        self._past = [(key[nodes], value[nodes]) for key, value in self._past]

    def _add(self, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Paths int64 ``[n, D]``, filled up with 0, and depths int64 ``[n]`` of new nodes, parents before children."""
        first = len(self._paths)
        for parent in parents.tolist():
            self._paths.append([*(self._paths[parent] if parent >= 0 else []), len(self._paths)])
        new, device = self._paths[first:], self._mask.device
        width = max(map(len, new))
        paths = torch.tensor([path + [0] * (width - len(path)) for path in new], device=device)
        return paths, torch.tensor([len(path) - 1 for path in new], device=device)

    def _bias(self, depths_n: Tensor, width: int) -> Tensor:
        """``[n, H, 1, D]``: the bias of each node's distance to its ancestors, -inf beyond its own place."""
        places = torch.arange(width, device=depths_n.device)
        bias_nhd: Tensor = self._model.decoder_bias(depths_n, places).transpose(0, 1)
        return bias_nhd.masked_fill(places > depths_n[:, None, None], -torch.inf)[:, :, None]


def _places_within(contexts: Tensor) -> Tensor:
    """int64 ``[n]``: how many nodes of the same context stand before each."""
    order = contexts.argsort(stable=True)
    counts = torch.bincount(contexts)
    place = torch.empty_like(contexts)
    place[order] = torch.arange(len(contexts), device=contexts.device) - (counts.cumsum(0) - counts)[contexts[order]]
    return place
