# SPDX-License-Identifier: Apache-2.0
"""UniMixing (UniMixer, arXiv 2604.00590): rule-based token mixing made learnable, block-wise and doubly stochastic."""

import math
from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.mixers.base import Mixer
from recsys.ranking.mixers.temperature import Temperature
from recsys.ranking.mixers.token_mix import mix
from recsys.ranking.sinkhorn import full_precision, sinkhorn


def mix_blocks(x_btd: Tensor, global_mn: Tensor, local_nio: Tensor) -> Tensor:
    """The mixing of UniMixer (arXiv 2604.00590, §4.2), for given matrices.

    Each row of the batch is one vector of ``L = T · D`` numbers, cut into n blocks of B: ``h_n = x_n W_B^n``, ``y_m = Σ_n W_G[m, n] h_n``.

    Args:
        x_btd: ``[batch, T, D]``.
        global_mn: W_G, ``[n, n]``.
        local_nio: W_B, ``[n, B, B]``.

    Returns:
        ``[batch, T, D]``.
    """
    batch, (blocks, width) = x_btd.shape[0], local_nio.shape[:2]
    x_nbi = x_btd.reshape(batch, blocks, width).transpose(0, 1)
    h_nbo = torch.bmm(x_nbi, local_nio.to(x_btd.dtype))
    y_mbo = torch.mm(global_mn.to(x_btd.dtype), h_nbo.flatten(1)).unflatten(1, (batch, width))
    y_btd: Tensor = y_mbo.transpose(0, 1).reshape(x_btd.shape)
    return y_btd


def permutation(tokens: int, heads: int) -> Tensor:
    """G ``[T · H, T · H]``: `mix` on slices, ``vec(mix(X)) = (G ⊗ I) vec(X)``. It is its own transpose if T = H."""
    slices = tokens * heads
    return mix(torch.eye(slices).reshape(slices, tokens, heads), heads).flatten(1).T


class BlockMixing(Mixer):
    """What `UniMixing` and `UniMixingLite` share: blocks, constraints and temperature; they differ in how the matrices are parameterised.

    **Where they start matters.** Logits of noise alone make both matrices nearly uniform: every number becomes the mean of all, and the
    gradient of a single logit is small. On planted data such a model learned nothing of what two tokens make together in a thousand steps
    at a learning rate of 0.001 (docs/results/scaling.md). With ``permutation_gain`` c the matrices start within
    ``(n − 1) / (exp(c / τ) + n − 1)`` of RankMixer's permutation G, and likewise (with B for n) of I, and learn from there. Since c is
    divided by τ, a large c means matrices that hardly learn once τ has fallen; without constraints c = 1 is the rule.

    With constraints, ``W̄ = sinkhorn((W + Wᵀ) / 2τ)`` for the global matrix and every local one (§4.3). The matrices depend on
    parameters alone, so that a step pays for them once, whatever the batch; `fold_mixing` computes them once and for all, for serving.

    A forward pass in training mode counts as one step of the temperature's schedule, and in evaluation mode as none. A pass that
    activation checkpointing repeats counts twice.

    Args:
        config: the subclass's.
        tokens: T.
        dim: D.

    Raises:
        ConfigError: B does not divide ``T · D``; the damped scaling is asked for without symmetry; with ``permutation_gain``, the blocks
            are not slices of tokens, or the permutation is not symmetric though the matrices are.
    """

    class Config(BaseConfig):
        """Blocks and constraints.

        Attributes:
            block: B, a divisor of ``T · D``; null for the one nearest to its square root, where the two products cost about the same.
            constrained: whether the matrices are made doubly stochastic. If not, the weights are used as they are, and the fields below
                except ``init_std`` say nothing.
            symmetric: whether the logits are made symmetric first. A symmetric matrix cannot come near a permutation that is not its own
                inverse, such as RankMixer's with H ≠ T.
            iterations: of the Sinkhorn scaling. Monitor `stochastic_error` while the temperature falls.
            scaling: ``alternating`` (rows sum to one exactly; symmetric only in the limit) or ``damped`` (exactly symmetric, slower):
                see `recsys.ranking.sinkhorn.sinkhorn`.
            temperature: τ.
            init_std: of the noise in the initial logits.
            permutation_gain: c; the logits start as ``c G`` and ``c I`` plus the noise, G being RankMixer's permutation; 0 for noise alone.
                B must then divide D, and ``block: null`` means ``D / T``, RankMixer's slice.
        """

        block: int | None = Field(None, ge=1)
        constrained: bool = True
        symmetric: bool = True
        iterations: int = Field(20, ge=1)
        scaling: Literal["alternating", "damped"] = "alternating"
        temperature: Temperature.Config = Temperature.Config()
        init_std: float = Field(0.02, ge=0)
        permutation_gain: float = Field(0.0, ge=0)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        default = dim // tokens if config.permutation_gain and dim % tokens == 0 else nearest_divisor(tokens * dim)
        block = default if config.block is None else config.block
        if tokens * dim % block:
            raise ConfigError(f"block: expected a divisor of tokens * dim = {tokens} * {dim} = {tokens * dim}, got {block}")
        if config.scaling == "damped" and not config.symmetric:
            raise ConfigError("scaling: damped needs symmetric=true, got symmetric=false; expected scaling=alternating")
        self.config: BlockMixing.Config = config
        self.block, self.blocks = block, tokens * dim // block
        self.temperature = Temperature(config.temperature) if config.constrained else None

    @property
    def flops(self) -> int:
        """``2 L B + 2 L n``: local and global product. The matrices themselves cost the same for any batch and are left out."""
        return 2 * self.tokens * self.dim * (self.block + self.blocks)

    def _permutation(self) -> Tensor:
        """G ``[n, n]``: RankMixer's permutation of blocks."""
        if self.dim % self.block:
            raise ConfigError(f"permutation_gain: expected a block that divides dim={self.dim}, got block={self.block}")
        target = permutation(self.tokens, self.dim // self.block)
        if self.config.constrained and self.config.symmetric and not torch.equal(target, target.T):
            raise ConfigError(
                f"permutation_gain: with block={self.block}, tokens={self.tokens} and dim={self.dim} the permutation is not symmetric; "
                "expected symmetric=false, or block = dim / tokens"
            )
        return target

    @abstractmethod
    def weights(self) -> tuple[Tensor, Tensor]:
        """The unconstrained W_G ``[n, n]`` and W_B ``[n, B, B]``, in float32 or float64."""

    def matrices(self) -> tuple[Tensor, Tensor]:
        """W̄_G ``[n, n]`` and W̄_B ``[n, B, B]`` at the present temperature, in float32 or float64."""
        global_nn, local_nio = self.weights()
        if self.temperature is None:
            return global_nn, local_nio
        temperature = self.temperature()
        return self._constrain(global_nn, temperature), self._constrain(local_nio, temperature)

    def _constrain(self, logits: Tensor, temperature: Tensor) -> Tensor:
        if self.config.symmetric:
            logits = (logits + logits.mT) / 2
        return sinkhorn(logits / temperature, self.config.iterations, damped=self.config.scaling == "damped")

    @torch.no_grad()
    def stochastic_error(self) -> Tensor:
        """How far the sum of a row or column of any matrix is from one, at most; a scalar."""
        sums = [matrix.sum(dim).flatten() for matrix in self.matrices() for dim in (-2, -1)]
        return (torch.cat(sums) - 1).abs().max()

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        global_nn, local_nio = self.matrices()
        if self.training and self.temperature is not None:
            self.temperature.advance()
        return mix_blocks(x_btd, global_nn, local_nio)


def nearest_divisor(length: int) -> int:
    """The divisor of ``length`` nearest to its square root."""
    root = math.sqrt(length)
    return min((divisor for divisor in range(1, length + 1) if length % divisor == 0), key=lambda divisor: abs(divisor - root))


@register("mixer", "uni_mixing")
class UniMixing(BlockMixing):
    """UniMixing (arXiv 2604.00590, §4.2-4.3): `mix_blocks` with a full matrix for each block. ``n² + n B²`` parameters.

    ``B = D / H``, ``W_G = G`` and ``W_B = I`` is RankMixer's mixing with H heads.

    The paper says that logits are symmetrised and the temperature falls linearly from 1.0 to 0.05. Chosen where it is silent: B, 20
    iterations, initial logits from N(0, 0.02²), and how many steps the fall takes.

    Raises:
        ConfigError: as in `BlockMixing`.
    """

    class Config(BlockMixing.Config):
        """See `BlockMixing.Config`."""

        name: Literal["uni_mixing"] = "uni_mixing"

    config: Config

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(config, tokens, dim)
        self.global_weight = nn.Parameter(torch.empty(self.blocks, self.blocks))
        self.local_weight = nn.Parameter(torch.empty(self.blocks, self.block, self.block))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new logits."""
        for weight in (self.global_weight, self.local_weight):
            nn.init.normal_(weight, std=self.config.init_std)
        if gain := self.config.permutation_gain:
            with torch.no_grad():
                self.global_weight.add_(self._permutation().to(self.global_weight), alpha=gain)
                self.local_weight.add_(torch.eye(self.block).to(self.local_weight), alpha=gain)

    def weights(self) -> tuple[Tensor, Tensor]:
        """See `BlockMixing.weights`."""
        return full_precision(self.global_weight), full_precision(self.local_weight)


class FixedMixing(Mixer):
    """`mix_blocks` with constant matrices.

    Args:
        tokens: T.
        dim: D.
        global_nn: W̄_G.
        local_nio: W̄_B.
    """

    global_nn: Tensor
    local_nio: Tensor

    def __init__(self, tokens: int, dim: int, global_nn: Tensor, local_nio: Tensor) -> None:
        super().__init__(tokens, dim)
        self.register_buffer("global_nn", global_nn)
        self.register_buffer("local_nio", local_nio)

    @property
    def flops(self) -> int:
        """As in `BlockMixing.flops`."""
        blocks, block = self.local_nio.shape[:2]
        return 2 * self.tokens * self.dim * (block + blocks)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        return mix_blocks(x_btd, self.global_nn, self.local_nio)


@torch.no_grad()
def fold_mixing(model: nn.Module) -> None:
    """Replace every `BlockMixing` below ``model`` by its matrices at the present temperature, so that no request waits for Sinkhorn.

    In place, for serving: the model can no longer be trained, and its state dict has other keys.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BlockMixing):
                parent.add_module(name, FixedMixing(child.tokens, child.dim, *child.matrices()).train(child.training))
