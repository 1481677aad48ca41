# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5 as the backbone of SETRec: a causal language model at whose end the queries stand."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from recsys.core.components import register
from recsys.retrieval.backbones.base import LanguageModelConfig
from recsys.retrieval.backbones.language_model import LanguageModel
from recsys.retrieval.backbones.layout import Tokens, additive, self_mask


@register("set_backbone", "qwen2")
class Qwen2Backbone(LanguageModel):
    """One causal sequence [instruction][items][for each state: response, queries] under one mask (see `layout.intended`).

    All prefixes of a history train in one pass. Instruction and response are causal within themselves; a query sees the instruction,
    the items that its state has seen, the response of its state, and itself, and nothing sees a query. The mask is a tensor that is
    added to the scores, so that fused and eager attention both honour it; a sliding window of the model's is not applied.

    ``release`` reproduces the authors' code as it runs under fused attention, where their mask over items and queries is lost: the
    stock causal mask with padding hidden, so that an item's tokens see the earlier ones of the same item and a query the earlier
    queries; items share position ids; and positions are those of the sequence left-padded to ``max_length`` items (see
    `layout.released`; theirs is padded to the longest history of the batch). Their eager attention has the mask that is the default
    here, with their position ids. Neither their 8-bit weights nor their half precision is reproduced.
    """

    model_type: ClassVar[str] = "qwen2"
    attention: ClassVar[tuple[str, ...]] = ("q_proj", "v_proj", "o_proj")
    queries_inside: ClassVar[bool] = True

    class Config(LanguageModelConfig):
        """See `LanguageModelConfig`."""

        name: Literal["qwen2"] = "qwen2"

    def _take(self, model: Any) -> list[Any]:
        del model.embed_tokens
        self.model = model
        return [model]

    def _read(self, history_bcd: Tensor, queries_nd: Tensor, seen_bp: Tensor, tokens: Tokens) -> Tensor:
        rows, states = seen_bp.shape
        tail = torch.cat((self.prompt(self.response), queries_nd))
        sequence = torch.cat((history_bcd, tail.repeat(states, 1).expand(rows, -1, -1)), 1)
        mask = additive(self_mask(tokens, causal=True), sequence)
        hidden: Tensor = self.model(
            inputs_embeds=sequence, attention_mask=mask, position_ids=tokens.position_bt, use_cache=False
        ).last_hidden_state
        after: Tensor = hidden[:, history_bcd.shape[1] :].unflatten(1, (states, -1))
        return after[:, :, len(self.response) :].flatten(1, 2)
