# SPDX-License-Identifier: Apache-2.0
"""What a layer saw and made, for scorers that look inside a model."""

from dataclasses import dataclass

from torch import Tensor

from recsys.core.errors import ConfigError


@dataclass(frozen=True)
class LayerProbe:
    """Tensors of one layer for the S tokens of a view; None for what the layer does not have or nobody asked for.

    Attributes:
        layer: which one, counted from 0.
        attention_in: float ``[S, d]``, what the attention reads, normed.
        attention_out: float ``[S, d]``, what it adds to the residual stream.
        ffn_in: float ``[S, d]``, what the feed-forward network reads, normed.
        ffn_out: float ``[S, d]``, what it adds.
        ffn_hidden: float ``[S, F]``, its activations.
        query: float ``[B, H, M, e]``, queries of the context's tokens.
        key: float ``[S, H, e]``, keys of the tokens.
        value: float ``[S, H, e]``, their values.
        carried: float ``[S]``, what a scorer kept from the layers before, see `TokenScorer.carry`.
    """

    layer: int
    attention_in: Tensor | None = None
    attention_out: Tensor | None = None
    ffn_in: Tensor | None = None
    ffn_out: Tensor | None = None
    ffn_hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    carried: Tensor | None = None

    def require(self, field: str, who: str) -> Tensor:
        """A tensor of the probe.

        Raises:
            ConfigError: the layer does not have it.
        """
        found: Tensor | None = getattr(self, field)
        if found is None:
            raise ConfigError(f"{who}: expected a layer with {field}, but layer {self.layer} has none")
        return found
