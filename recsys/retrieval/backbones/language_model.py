# SPDX-License-Identifier: Apache-2.0
"""What the backbones that are pretrained language models have in common: prompt, adapters, dtype, and the two layouts."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recsys.retrieval.backbones.base import LanguageModelConfig, SetBackbone
from recsys.retrieval.backbones.layout import Sizes, Tokens, intended, released
from recsys.retrieval.backbones.lora import adapt
from recsys.retrieval.backbones.pretrained import places, resolve, vocabulary


class LanguageModel(SetBackbone):
    """A transformers model that reads [instruction][items][for each state: response, and queries if it has no decoder].

    Of its vocabulary it keeps the prompt's tokens only. With ``release`` every state is a row of its own, as in the authors' code.

    Attributes:
        model_type: of the architecture, as transformers names it.
        attention: the names of the projections that make queries, values and outputs.
        queries_inside: whether the queries stand in the sequence itself.

    Raises:
        ComponentError: a package is not installed, or the model cannot be loaded.
        ConfigError: the model is not of this type, or the configuration does not fit it.
    """

    model_type: ClassVar[str]
    attention: ClassVar[tuple[str, ...]]
    queries_inside: ClassVar[bool]

    config: LanguageModelConfig
    instruction: Tensor
    response: Tensor

    def __init__(self, config: LanguageModelConfig, max_length: int) -> None:
        super().__init__()
        self.config, model = resolve(config, self.model_type)
        self.max_length = max_length
        self.dim = model.config.hidden_size
        self.prompt: nn.Embedding = model.get_input_embeddings()
        words = vocabulary(self.config)
        for name, tokens in (("instruction", self.config.instruction_tokens), ("response", self.config.response_tokens)):
            self.register_buffer(name, places(tokens or (), words), persistent=False)
        stacks = self._take(model)
        if config.lora is not None:
            self.prompt.requires_grad_(False)
            for stack in stacks:
                adapt(stack, config.lora, config.lora.targets or self.attention)
        self.train()

    @abstractmethod
    def _take(self, model: Any) -> list[Any]:
        """Keep what is needed of the model, without its embeddings, and return the parts that have projections to adapt."""

    @abstractmethod
    def _read(self, history_bcd: Tensor, queries_nd: Tensor, seen_bp: Tensor, tokens: Tokens) -> Tensor:
        """The outputs of the queries ``[B, P n, d]``, of rows that begin with the instruction and the items; ``tokens`` says who is who."""

    def forward(self, items_blnd: Tensor, queries_nd: Tensor, seen_bp: Tensor) -> Tensor:
        """See `SetBackbone.forward`; after the final norm, in the dtype of the queries."""
        if not seen_bp.numel():
            return queries_nd.expand(*seen_bp.shape, *queries_nd.shape)
        if not self.config.release:
            return self._outputs(items_blnd, queries_nd, seen_bp)
        rows_blnd = items_blnd.repeat_interleave(seen_bp.shape[1], 0)
        return self._outputs(rows_blnd, queries_nd, seen_bp.reshape(-1, 1)).view(*seen_bp.shape, *queries_nd.shape)

    def _outputs(self, items_blnd: Tensor, queries_nd: Tensor, seen_bp: Tensor) -> Tensor:
        rows, length, count, dim = items_blnd.shape
        if not length:  # one item of padding, so that there is something to attend to
            items_blnd, length = items_blnd.new_zeros(rows, 1, count, dim), 1
        sizes = Sizes(len(self.instruction), length, count, len(self.response), count if self.queries_inside else 0)
        tokens = released(sizes, seen_bp, self.max_length) if self.config.release else intended(sizes, seen_bp)
        dtype = self.prompt.weight.dtype
        instruction = self.prompt(self.instruction).expand(rows, -1, -1)
        history = torch.cat((instruction, items_blnd.flatten(1, 2).to(dtype)), 1)
        outputs = self._read(history, queries_nd.to(dtype), seen_bp, tokens)
        by_state: Tensor = outputs.to(queries_nd.dtype).unflatten(1, (-1, count))
        return by_state
