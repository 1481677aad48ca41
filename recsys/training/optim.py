# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules: dense parameters by a PyTorch optimizer, embedding tables by themselves within the backward pass."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recsys.core.config import Config


@runtime_checkable
class HasFusedState(Protocol):
    """A module whose parameters are updated inside the backward pass, such as embedding tables in FBGEMM.

    All its parameters are its own business: the trainer gives none of them to the dense optimizer, does not clip their gradients, and
    saves the state of their optimizers beside the weights.
    """

    def fused_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers that run in the backward pass. A new ``lr`` in their ``param_groups`` holds once ``zero_grad`` was called."""
        ...

    def fused_state(self) -> dict[str, Tensor]:
        """The optimizers' state by name, without the weights."""
        ...

    def load_fused_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `fused_state` gave."""
        ...


class DenseOptimizer(Config):
    """The optimizer of the dense parameters.

    Attributes:
        name: the algorithm, PyTorch's own, in its fused form where it has one (one pass over a parameter instead of five).
        learning_rate: at the schedule's factor 1.
        weight_decay: decoupled for ``adamw``, added to the gradient for the others. Vectors and scalars (biases, norms' gains) are not
            decayed.
        betas: of ``adam`` and ``adamw``, (0.9, 0.999) by default.
    """

    name: Literal["adamw", "adam", "adagrad", "rmsprop"] = "adamw"
    learning_rate: float = Field(0.001, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _betas_belong_to_adam(self) -> Self:
        if self.betas is not None and self.name not in ("adam", "adamw"):
            raise ValueError(f"betas: {self.name} has none; they belong to adam and adamw")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two values from 0 to below 1, got {self.betas}")
        return self

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        decayed = [p for p in parameters.values() if p.ndim >= 2]
        rest = [p for p in parameters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        betas = self.betas or (0.9, 0.999)
        match self.name:
            case "adamw":
                return torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, fused=True)
            case "adam":
                return torch.optim.Adam(groups, lr=self.learning_rate, betas=betas, fused=True)
            case "adagrad":
                whole = not any(isinstance(p, DTensor) for p in parameters.values())  # its fused form does not take parts
                return torch.optim.Adagrad(groups, lr=self.learning_rate, fused=whole)
            case "rmsprop":
                return torch.optim.RMSprop(groups, lr=self.learning_rate)


class Schedule(Config):
    """The learning rate over a run, as a factor on every optimizer's own rate, dense and fused.

    Attributes:
        name: ``constant``, or ``cosine``, which falls to ``final`` on half a cosine wave (Loshchilov & Hutter, SGDR, ICLR 2017,
            equation 5, without restarts).
        warmup_steps: the factor rises in equal steps over this many optimizer steps, up to 1 with the last of them.
        final: the factor that ``cosine`` ends at.
    """

    name: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    final: float = Field(0.0, ge=0, le=1)

    def factor(self, step: int, total: int) -> float:
        """The factor of step ``step``, counted from 0, in a run of ``total`` steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimizers:
    """All optimizers of a model, and the state that a checkpoint keeps of them.

    Args:
        config: of the dense optimizer.
        model: its trainable parameters outside `HasFusedState` modules are dense. A model with fused tables only has no dense optimizer.
    """

    def __init__(self, config: DenseOptimizer, model: nn.Module) -> None:
        self._fused_modules = fused_modules(model)
        self.dense_parameters = dense_parameters(model, self._fused_modules.values())
        self._dense = config.build(self.dense_parameters) if self.dense_parameters else None
        self._all = [self._dense] if self._dense else []
        self._all += [optimizer for module in self._fused_modules.values() for optimizer in module.fused_optimizers()]
        self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in self._all]

    @property
    def has_fused(self) -> bool:
        """Whether there are parameters that are updated in the backward pass."""
        return bool(self._fused_modules)

    def begin_step(self, factor: float) -> None:
        """Drop the gradients, and set every learning rate to its configured value times ``factor``."""
        for optimizer, rates in zip(self._all, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()  # hands the new rate to fused tables, too

    def gradient_norm(self) -> float:
        """The global norm of the dense gradients; a collective call where they are in parts (see `recsys.training.fully_sharded`)."""
        gradients = [p.grad for p in self.dense_parameters.values() if p.grad is not None]
        parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        if not parts:
            return float(nn.utils.get_total_norm(gradients))
        square = nn.utils.get_total_norm(parts).double().square()  # one sum for all; a norm of DTensors has one for each of them
        dist.all_reduce(square)
        return math.sqrt(float(square))

    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the dense gradients, whose norm is ``norm``, down to a norm of at most ``max_norm``."""
        nn.utils.clip_grads_with_norm_(list(self.dense_parameters.values()), max_norm, torch.tensor(norm))

    def step(self) -> None:
        """Update the dense parameters; fused ones were updated in the backward pass."""
        if self._dense:
            self._dense.step()

    def dense_state(self) -> dict[str, dict[str, Tensor]]:
        """The state of the dense optimizer, by the parameter's name."""
        if not self._dense:
            return {}
        state = self._dense.state
        return {name: dict(state[parameter]) for name, parameter in self.dense_parameters.items() if parameter in state}

    def load_dense(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `dense_state` gave for an equal model."""
        if self._dense:
            places = {id(p): i for i, p in enumerate(p for group in self._dense.param_groups for p in group["params"])}
            numbered = {places[id(self.dense_parameters[name])]: dict(values) for name, values in state.items()}
            self._dense.load_state_dict({"state": numbered, "param_groups": self._dense.state_dict()["param_groups"]})

    def state_dict(self) -> dict[str, Any]:
        """The state of all optimizers but the learning rates, which follow from the step."""
        dense = self._dense.state_dict()["state"] if self._dense else {}
        return {"dense": dense, "fused": {name: module.fused_state() for name, module in self._fused_modules.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave for an equal model."""
        if self._dense:
            self._dense.load_state_dict({"state": state["dense"], "param_groups": self._dense.state_dict()["param_groups"]})
        for name, module in self._fused_modules.items():
            module.load_fused_state(state["fused"][name])


def fused_modules(model: nn.Module) -> dict[str, HasFusedState]:
    """The outermost submodules of ``model`` (or itself) that update their own parameters, by name."""
    found: dict[str, HasFusedState] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, HasFusedState) and not inside:
            found[name] = module
    return found


def dense_parameters(model: nn.Module, fused: Iterable[HasFusedState]) -> dict[str, nn.Parameter]:
    """The trainable parameters that the dense optimizer updates, by name."""
    owned = {id(p) for module in fused if isinstance(module, nn.Module) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned}
