# SPDX-License-Identifier: Apache-2.0
"""Against the stock models of transformers, on one sequence and by their own loops."""

import pytest
import torch
from transformers import Qwen2Model, T5Config, T5ForConditionalGeneration, T5Model

from tests.recsys.retrieval.backbones.tiny import DIM, MAX_LENGTH, NO_PROMPT, PROMPT, TOKENS, build, histories

PROMPTS = [NO_PROMPT, PROMPT, {**PROMPT, "response": ""}]


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def stock(folders, kind):
    return (T5Model if kind == "t5" else Qwen2Model).from_pretrained(folders[kind], attn_implementation="eager")


def embedded(model, prompt):
    """The embeddings of instruction and response, ``[1, I, d]`` and ``[1, R, d]``."""
    for part in ("instruction", "response"):
        tokens = TOKENS[f"{part}_tokens"] if prompt[part] else ()
        yield model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.int64))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_qwen2_with_one_token_for_each_item_is_the_stock_model(folders, prompt):
    model = stock(folders, "qwen2")
    items, queries = histories(rows=1, tokens=1)
    instruction, response = embedded(model, prompt)
    outputs = build("qwen2", folders["qwen2"], **prompt)(items, queries, torch.arange(6)[None])[0, :, 0]
    for s in range(6):
        sequence = torch.cat((instruction, items[:, :s, 0], response, queries[None]), 1)
        close(outputs[s], model(inputs_embeds=sequence).last_hidden_state[0, -1])


def t5_outputs(model, sequence, encoder_mask, queries, decoder_mask, cross_mask=None):
    memory = model.encoder(inputs_embeds=sequence, attention_mask=encoder_mask).last_hidden_state
    return model.decoder(
        inputs_embeds=queries[None],
        attention_mask=decoder_mask,
        encoder_hidden_states=memory,
        encoder_attention_mask=cross_mask,
        use_cache=False,
    ).last_hidden_state[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_t5_with_one_token_for_each_item_is_the_stock_model_under_a_mask(folders, prompt):
    model = stock(folders, "t5")
    items, queries = histories(rows=1, tokens=1)
    instruction, response = embedded(model, prompt)
    outputs = build("t5", folders["t5"], **prompt)(items, queries, torch.arange(6)[None])[0, :, 0]
    i, r = instruction.shape[1], response.shape[1]
    for s in range(1, 6):
        sequence = torch.cat((instruction, items[:, :s, 0], response), 1)
        hidden = torch.ones(i + s + r, i + s + r, dtype=torch.bool)
        hidden[:, :i] = False
        hidden[i : i + s, i : i + s].triu_(1)
        hidden[i + s :] = False
        mask = torch.zeros(1, 1, i + s + r, i + s + r).masked_fill_(hidden, -torch.inf)
        close(outputs[s], t5_outputs(model, sequence, mask, queries, torch.zeros(1, 1, 1, 1))[0])


def left_padded(items, s, instruction, response):
    """One row as the authors' code lays it out: the sequence and its 2-D mask, ``max_length`` items wide."""
    count = items.shape[2]
    padding = torch.randn(1, (MAX_LENGTH - s) * count, DIM)
    sequence = torch.cat((instruction, padding, items[:, :s].flatten(1, 2), response), 1)
    mask = torch.ones(sequence.shape[:2], dtype=torch.int64)
    mask[:, instruction.shape[1] : instruction.shape[1] + padding.shape[1]] = 0
    return sequence, mask


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_released_t5_is_the_stock_model_with_padding_hidden_and_one_added_to_the_diagonal(folders, tokens, prompt):
    """With several tokens for each item positions are shared, which the stock model cannot do: there, its biases are all equal."""
    model, backbone = stock(folders, "t5"), build("t5", folders["t5"], release=True, **prompt)
    pairs = [(model.encoder, backbone.encoder), (model.decoder, backbone.decoder)]
    for stacks in pairs if tokens > 1 else []:
        for stack in stacks:
            weight = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            weight[:] = weight[0].clone()
    items, queries = histories(rows=1, tokens=tokens)
    instruction, response = embedded(model, prompt)
    outputs = backbone(items, queries, torch.arange(6)[None])[0]
    for s in range(1, 6):
        sequence, mask = left_padded(items, s, instruction, response)
        close(outputs[s], t5_outputs(model, sequence, mask, queries, torch.eye(tokens)[None, None], mask))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_released_qwen2_is_the_stock_model_with_shared_positions(folders, tokens, prompt):
    model, backbone = stock(folders, "qwen2"), build("qwen2", folders["qwen2"], release=True, **prompt)
    items, queries = histories(rows=1, tokens=tokens)
    instruction, response = embedded(model, prompt)
    outputs = backbone(items, queries, torch.arange(6)[None])[0]
    i, history = instruction.shape[1], MAX_LENGTH * tokens
    position = torch.arange(i + history + response.shape[1] + tokens)
    position[i : i + history] = i + torch.arange(history) // tokens
    for s in range(1, 6):
        sequence, mask = left_padded(items, s, instruction, torch.cat((response, queries[None]), 1))
        hidden = model(inputs_embeds=sequence, attention_mask=mask, position_ids=position[None]).last_hidden_state
        close(outputs[s], hidden[0, -tokens:])


def test_gated_feed_forward_layers_and_stacks_of_unlike_depth(tmp_path):
    """As in T5 1.1."""
    config = T5Config(
        vocab_size=4, d_model=DIM, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=3, num_heads=2, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    backbone = build("t5", tmp_path, **NO_PROMPT)
    model = T5Model.from_pretrained(tmp_path)
    assert len(backbone.encoder.block) == 1 and len(backbone.decoder.block) == 3
    items, queries = histories(rows=1, length=1, tokens=1)
    outputs = backbone(items, queries, torch.ones(1, 1, dtype=torch.int64))[0, 0]
    close(outputs, t5_outputs(model, items[:, :, 0], None, queries, torch.zeros(1, 1, 1, 1)))
