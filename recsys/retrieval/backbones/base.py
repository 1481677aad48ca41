# SPDX-License-Identifier: Apache-2.0
"""What SETRec asks of a backbone, and the configuration that pretrained ones share."""

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

from pydantic import model_validator
from torch import Tensor, nn

from recsys.core.config import Config
from recsys.retrieval.backbones.lora import LoRAConfig

INSTRUCTION = "What would user be likely to purchase next after buying items"
RESPONSE = "?;"


class SetBackbone(nn.Module, ABC):
    """A model over histories of token sets and groups of queries.

    Components of kind ``set_backbone`` are built as ``cls(config, max_length)``, with the length of the longest history.

    Attributes:
        config: as it was given, completed so that configuration and state dict alone rebuild the backbone.
        dim: width d of its tokens, queries and outputs.
    """

    config: Config
    dim: int

    @abstractmethod
    def forward(self, items_blnd: Tensor, queries_nd: Tensor, seen_bp: Tensor) -> Tensor:
        """``[B, P, n, d]``: the outputs of the queries, as `recsys.retrieval.item_transformers.SetTransformer.forward` has them."""

    def last(self, items_blnd: Tensor, queries_nd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, n, d]``: the outputs of the queries that have seen all ``lengths_b`` items of each row."""
        outputs: Tensor = self(items_blnd, queries_nd, lengths_b[:, None])
        return outputs[:, 0]


class LanguageModelConfig(Config):
    """Where a language model comes from, the prompt around the history, and what of it trains.

    Attributes:
        pretrained: a folder, or a name on a hub; only safetensors are read. Where there is an ``architecture``, it just says where
            that came from.
        revision: of a name; should be a commit.
        local_files_only: whether a name must be in the local cache already.
        architecture: the configuration that transformers has of the model, as plain values. A model that is built from it is drawn.
        instruction: the text before the history, without special tokens; may be empty.
        response: the text after the history.
        instruction_tokens: of ``instruction``; null to ask the tokenizer that comes with the model.
        response_tokens: of ``response``.
        lora: adapters to train in the place of the model's weights; null to train those.
        dtype: of the model's weights. What trains should be float32, so bfloat16 is for those under adapters.
        release: whether to do what the authors' code does and not what the paper says, see the backbones.
    """

    pretrained: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    architecture: dict[str, Any] | None = None
    instruction: str = INSTRUCTION
    response: str = RESPONSE
    instruction_tokens: tuple[int, ...] | None = None
    response_tokens: tuple[int, ...] | None = None
    lora: LoRAConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    release: bool = False

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if self.pretrained is None and self.architecture is None:
            raise ValueError("pretrained: expected a folder or a hub's name, or an architecture; got neither")
        if self.dtype == "bfloat16" and self.lora is None:
            raise ValueError("dtype: expected float32, since without lora the model's weights train; got bfloat16")
        return self
