# SPDX-License-Identifier: Apache-2.0
"""CoreMatching (ICML 2025): one activation pattern tells which tokens go on, and which neurons decoding needs."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.scoring import TokenScorer, probe_of
from recsys.efficiency.view import TokenView, held, offsets_of, row_of, to_padded


def token_core(hidden: Tensor, rho: float) -> Tensor:
    """The core neurons of each token: the highest share ``rho`` of its positive activations, rounded up; equal ones together.

    Args:
        hidden: ``[S, F]``, activations of a feed-forward network.
        rho: in (0, 1].

    Returns:
        bool ``[S, F]``.
    """
    _checked_share("rho", rho)
    positive = hidden > 0
    wanted = (positive.sum(-1, keepdim=True).double() * rho - 1e-9).ceil().long().clamp(min=1)
    lowest = hidden.sort(dim=-1, descending=True).values.gather(-1, wanted - 1)
    return positive & (hidden >= lowest)


def core_frequency(core: Tensor, offsets: Tensor) -> Tensor:
    """int64 ``[B, F]``: of how many tokens of each row a neuron is a core neuron; ``core`` is bool ``[S, F]``."""
    return torch.zeros(len(offsets) - 1, core.shape[1], dtype=torch.long, device=core.device).index_add(0, row_of(offsets), core.long())


def sentence_core(frequency: Tensor, beta: float) -> Tensor:
    """The core neurons of each row: the share ``beta``, rounded up, that are core neurons of the most tokens.

    All rows have the same number, so that their slices stack. Of equal ones the first; where fewer neurons were ever used, unused ones
    fill up.

    Args:
        frequency: ``[B, F]``, see `core_frequency`.
        beta: in (0, 1]; 1 takes all neurons.

    Returns:
        bool ``[B, F]``.
    """
    _checked_share("beta", beta)
    count = math.ceil(beta * frequency.shape[1] - 1e-9)
    order = frequency.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(frequency, dtype=torch.bool).scatter(1, order, True)


def match_score(active: Tensor, core: Tensor, offsets: Tensor) -> Tensor:
    """``|Γ(x) ∩ C|``: how many core neurons of its row each token activates; a product of a binary matrix and vector for each row.

    Args:
        active: bool ``[S, F]``, the activations above 0.
        core: bool ``[B, F]``.
        offsets: int64 ``[B + 1]`` of the tokens.

    Returns:
        float32 ``[S]`` of whole numbers.
    """
    padded_blf = to_padded(active.float(), offsets)
    return (padded_blf @ core.float()[..., None])[..., 0][held(offsets[1:] - offsets[:-1], padded_blf.shape[1])]


@register("token_scorer", "core_matching")
class CoreMatching(TokenScorer):
    """How many of the core neurons of the reference a token activates; goes with the selector ``elbow``.

    §9 of the specification, from ``ffn_hidden`` of the layer before. The paper takes the core of the whole sentence, its release that of
    one late text token; here either the whole row or its protected tokens (target, context) are the reference. For scores only neurons
    count that are a core neuron of at least one reference token, since those that fill up a slice say nothing. "Active" is "above 0": right
    for ReLU and its square; for SwiGLU it is the sign of a product, as in the release. Every token is judged by its whole row, so it is
    for histories that are complete before they are pruned.
    """

    class Config(BaseConfig):
        """The two shares. The paper leaves its defaults open; these are CoreInfer's.

        Attributes:
            rho: share of a token's positive activations that are its core neurons.
            beta: share of all neurons that are the row's.
            reference: whose core neurons are matched, the whole row's or its protected tokens'.
        """

        name: Literal["core_matching"] = "core_matching"
        rho: float = Field(0.4, gt=0.0, le=1.0)
        beta: float = Field(0.4, gt=0.0, le=1.0)
        reference: Literal["row", "protected"] = "row"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def score(self, view: TokenView, probe: LayerProbe | None = None) -> Tensor:
        """Whole numbers from 0 to the number of core neurons."""
        hidden, frequency = self._measured(view, probe)
        core = sentence_core(frequency, self.config.beta) & (frequency > 0)
        return match_score(hidden > 0, core, view.offsets).to(torch.promote_types(view.values.dtype, torch.float32))

    def core(self, view: TokenView, probe: LayerProbe) -> Tensor:
        """bool ``[B, F]``: each row's core neurons, all rows the same number, for `slice_ffn`."""
        return sentence_core(self._measured(view, probe)[1], self.config.beta)

    def _measured(self, view: TokenView, probe: LayerProbe | None) -> tuple[Tensor, Tensor]:
        hidden = probe_of(probe, "token_scorer 'core_matching'").require("ffn_hidden", "token_scorer 'core_matching'")
        chosen, offsets = self._reference(view)
        return hidden, core_frequency(token_core(hidden[chosen], self.config.rho), offsets)

    def _reference(self, view: TokenView) -> tuple[Tensor, Tensor]:
        """Places of the reference tokens, and their offsets."""
        chosen = torch.ones(len(view.values), dtype=torch.bool, device=view.offsets.device)
        if self.config.reference == "protected":
            if view.protected is None:
                raise ConfigError("token_scorer 'core_matching': reference 'protected': expected a view with protected tokens, got None")
            chosen = view.protected
        counts = torch.bincount(view.rows[chosen], minlength=len(view))
        bare = (counts == 0) & (view.lengths > 0)
        if bool(bare.any()):
            row = int(bare.long().argmax())
            raise ConfigError(f"token_scorer 'core_matching': reference 'protected': row {row}: expected a protected token, got none")
        return chosen.nonzero()[:, 0], offsets_of(counts)


class SlicedFFN(nn.Module):
    """A feed-forward network of chosen neurons alone: what the full one gives when the other activations are zero.

    The weights are copied together once, contiguous, which costs about as much as five decoding steps save; beams and the codes of an
    item share them. For decoding: they are constants, without gradient. Made by `slice_ffn`.

    Args:
        entering: weights ``[C, D, K]`` and biases ``[C, 1, K]`` (or None) of the gate and up layers, or of the only one that enters; C is
            the number of sets of neurons, 1 where all rows share.
        leaving: weight ``[C, K, D']`` and bias ``[D']`` (or None).
        activation: between them; of the gate where there are two.
    """

    weight_0: Tensor
    weight_1: Tensor
    weight_out: Tensor
    bias_0: Tensor | None
    bias_1: Tensor | None
    bias_out: Tensor | None

    def __init__(
        self,
        entering: Sequence[tuple[Tensor, Tensor | None]],
        leaving: tuple[Tensor, Tensor | None],
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.activation, self.gated = activation, len(entering) == 2
        for number, (weight, bias) in enumerate(entering):
            self.register_buffer(f"weight_{number}", weight, persistent=False)
            self.register_buffer(f"bias_{number}", bias, persistent=False)
        self.register_buffer("weight_out", leaving[0], persistent=False)
        self.register_buffer("bias_out", leaving[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D']``, T tokens of each row; with one set of neurons any ``[…, D]``.

        Raises:
            DataError: there are not as many rows as sets of neurons.
        """
        sets = len(self.weight_out)
        if sets != 1 and (x.dim() != 3 or len(x) != sets):
            raise DataError(f"x: expected [{sets}, T, D], a row for each set of neurons, got {tuple(x.shape)}")
        hidden = self.activation(_affine(x, self.weight_0, self.bias_0))
        if self.gated:
            hidden = hidden * _affine(x, self.weight_1, self.bias_1)
        y = _affine(hidden, self.weight_out, None)
        return y if self.bias_out is None else y + self.bias_out


@torch.no_grad()
def slice_ffn(
    core: Tensor, layers: Sequence[nn.Linear], activation: Callable[[Tensor], Tensor], sets: Literal["row", "union"] = "row"
) -> SlicedFFN:
    """Cut a feed-forward network down to core neurons.

    Args:
        core: bool ``[F]`` or ``[B, F]``.
        layers: ``(gate, up, down)`` of ``down(activation(gate(x)) * up(x))``, or ``(enter, leave)`` of ``leave(activation(enter(x)))``.
        activation: elementwise.
        sets: ``row`` copies the weights for each row and multiplies by batches; ``union`` takes the neurons of all rows together once: less
            memory, but a row then has the activations of its batch mates' neurons too.

    Raises:
        ConfigError: there are not two or three layers.
        DataError: the layers and the core have different numbers of neurons.
    """
    if len(layers) not in (2, 3):
        raise ConfigError(f"layers: expected (gate, up, down) or (enter, leave), got {len(layers)} layers")
    *entering, leaving = layers
    core = core[None] if core.dim() == 1 else core
    neurons = leaving.in_features
    if core.dtype != torch.bool or core.shape[-1] != neurons or any(layer.out_features != neurons for layer in entering):
        found = [layer.out_features for layer in entering]
        raise DataError(f"core: expected bool [B, {neurons}] for layers of {found} and {neurons} neurons, got {tuple(core.shape)}")
    core = core.any(0, keepdim=True) if sets == "union" else core
    index, valid = _places(core)
    enter = [
        (layer.weight[index].transpose(1, 2).contiguous(), None if layer.bias is None else layer.bias[index][:, None]) for layer in entering
    ]
    leave = leaving.weight.t()[index] * valid[..., None]
    return SlicedFFN(enter, (leave, None if leaving.bias is None else leaving.bias.detach()), activation)


def _places(core: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ``[C, K]`` places of the chosen neurons, filled up to the largest set with others, and which count."""
    width = int(core.sum(1).max()) if len(core) else 0
    index = core.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    return index, core.gather(1, index)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(weight) == 1:
        product = x @ weight[0]
        return product if bias is None else product + bias[0, 0]
    product = torch.bmm(x, weight)
    return product if bias is None else product + bias


def _checked_share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"core_matching: {name}: expected above 0 and at most 1, got {value!r}")
