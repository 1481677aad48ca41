# SPDX-License-Identifier: Apache-2.0
"""T5 as the backbone of SETRec: an encoder over the history, and a decoder whose inputs are the queries."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.components import register
from recsys.retrieval.backbones.base import LanguageModelConfig
from recsys.retrieval.backbones.language_model import LanguageModel
from recsys.retrieval.backbones.layout import Tokens, additive, sees, self_mask


@register("set_backbone", "t5")
class T5Backbone(LanguageModel):
    """The encoder reads [instruction][items][for each state: response], the decoder the queries of all states (see `layout.intended`).

    All prefixes of a history train in one pass. Instruction and response see all of themselves, as T5's encoder is bidirectional; an
    item sees the instruction, the items before it, and itself; cross-attention shows a query what its state has seen and the response
    of its state; in the decoder's self-attention a query sees itself alone. A state that has seen nothing, without a prompt, has
    nothing to cross-attend to, which adds nothing to its queries. Outputs are those of the final norm, not scaled by d^-1/2.

    Transformers' own loop over the blocks computes its relative biases from indices, so the loop is here; blocks and biases are theirs.

    ``release`` reproduces what the authors' code does: the encoder sees all that is not padding, in both directions; the decoder's
    identity mask is added to the scores as it is, which hides nothing and adds 1 to the scores of a query with itself; positions are
    those of the history left-padded to ``max_length`` items (see `layout.released`; theirs is padded to the longest history of the
    batch). Their half precision is not reproduced.
    """

    model_type: ClassVar[str] = "t5"
    attention: ClassVar[tuple[str, ...]] = ("q", "v", "o")
    queries_inside: ClassVar[bool] = False

    class Config(LanguageModelConfig):
        """See `LanguageModelConfig`."""

        name: Literal["t5"] = "t5"

    def _take(self, model: Any) -> list[Any]:
        self.encoder, self.decoder = model.encoder, model.decoder
        for stack in (self.encoder, self.decoder):
            del stack.embed_tokens
        return [self.encoder, self.decoder]

    def _read(self, history_bcd: Tensor, queries_nd: Tensor, seen_bp: Tensor, tokens: Tokens) -> Tensor:
        states, count = seen_bp.shape[1], len(queries_nd)
        memory = self._encode(history_bcd, states, tokens)
        inputs = queries_nd.repeat(states, 1)
        own = torch.eye(len(inputs), dtype=torch.bool, device=inputs.device)
        mask = own.to(inputs.dtype)[None, None] if self.config.release else additive(own[None], inputs)
        bias = _bias(self.decoder, seen_bp.new_zeros(1, len(inputs)), span=1)
        state = torch.arange(states, device=seen_bp.device).repeat_interleave(count)
        visible = sees(seen_bp.repeat_interleave(count, 1), state, tokens)
        nothing = ~visible.any(-1, keepdim=True)
        memory_mask = additive(torch.cat((visible, nothing), -1), memory)
        memory = F.pad(memory, (0, 0, 0, 1))  # keys and values have no bias: attending to zeros adds nothing
        return _run(self.decoder, inputs.expand(len(memory), -1, -1), mask, bias, memory, memory_mask)

    def _encode(self, history_bcd: Tensor, states: int, tokens: Tokens) -> Tensor:
        """``[B, T, d]``: the encoded instruction, items and responses."""
        responses = self.prompt(self.response).repeat(states, 1).expand(len(history_bcd), -1, -1)
        sequence = torch.cat((history_bcd, responses), 1)
        mask = additive(self_mask(tokens, causal=False), sequence)
        return _run(self.encoder, sequence, mask, _bias(self.encoder, tokens.position_bt, tokens.span))


def _bias(stack: Any, position_bt: Tensor, span: int) -> Tensor:
    """``[B, H, T, T]``: the stack's biases by the distances between positions, all of which are below ``span``."""
    by_position = stack.block[0].layer[0].SelfAttention.compute_bias(span, span)[0]
    index = position_bt[:, :, None] * span + position_bt[:, None]
    return F.embedding(index, by_position.flatten(1).T).permute(0, 3, 1, 2)


def _run(
    stack: Any, inputs_btd: Tensor, mask: Tensor, bias: Tensor, memory_bsd: Tensor | None = None, memory_mask: Tensor | None = None
) -> Tensor:
    """A T5 stack from its inputs to its outputs after the final norm, under masks and biases that are added to the scores."""
    hidden = stack.dropout(inputs_btd)
    for block in stack.block:
        hidden, *_ = block(
            hidden, attention_mask=mask, position_bias=bias, encoder_hidden_states=memory_bsd, encoder_attention_mask=memory_mask
        )
    outputs: Tensor = stack.dropout(stack.final_layer_norm(hidden))
    return outputs
