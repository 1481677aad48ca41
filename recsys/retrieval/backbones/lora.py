# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the projections of a language model, by peft."""

from importlib.util import find_spec

import torch
from pydantic import Field
from torch import nn

from recsys.core.config import Config
from recsys.core.errors import ComponentError, ConfigError


class LoRAConfig(Config):
    """Adapters of rank r on frozen weights, ``W x + alpha / r · B A x``; the defaults are SETRec's.

    Attributes:
        rank: r.
        alpha: see above.
        dropout: on what the adapters read.
        targets: the names of the projections that get one; null for the queries, values and outputs of every attention.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    dropout: float = Field(default=0.02, ge=0.0, lt=1.0)
    targets: tuple[str, ...] | None = None


def adapt(model: nn.Module, config: LoRAConfig, targets: tuple[str, ...]) -> None:
    """Put adapters into the model, which peft freezes; they are float32 whatever the model is, and change nothing at first (B = 0).

    Raises:
        ComponentError: peft is not installed.
        ConfigError: the model has no projection of one of these names.
    """
    if not find_spec("peft"):
        raise ComponentError("lora: needs peft: install the extra [text]")
    from peft import LoraConfig, inject_adapter_in_model

    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if absent := sorted(set(targets) - names):
        raise ConfigError(f"lora.targets: expected names among {', '.join(sorted(names))}, got {absent[0]!r}")
    inject_adapter_in_model(
        LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(targets), bias="none"), model
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
