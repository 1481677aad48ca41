# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from recsys.retrieval.t5 import T5, BeamDecoder, RelativeBias, T5Config

VOCABULARY = 41
CONFIG = T5Config(dim=32, layers=3, heads=4, head_dim=8, ffn=64)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None}
    config = transformers.T5Config(**sizes, **tokens, feed_forward_proj="relu", tie_word_embeddings=True)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture
def model(theirs):
    ours = T5(CONFIG, VOCABULARY).eval()
    ours.load_transformers(theirs.state_dict())
    return ours


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Histories up to 140 tokens, beyond the last bucket of distances, and what is generated."""
    torch.manual_seed(1)
    valid = torch.arange(140) < torch.tensor([140, 3, 1, 50])[:, None]
    tokens = torch.randint(1, VOCABULARY, (4, 140)).masked_fill(~valid, 0)
    generated = torch.randint(1, VOCABULARY, (4, 6))
    generated[:, 0] = 0
    return tokens, valid, generated


@torch.no_grad()
def test_the_same_weights_give_what_transformers_gives(theirs, model, inputs):
    tokens, valid, generated = inputs
    expected = theirs(input_ids=tokens, attention_mask=valid.long(), decoder_input_ids=generated)
    memory = model.encode(tokens, valid)
    torch.testing.assert_close(memory[valid], expected.encoder_last_hidden_state[valid])
    logits = model.logits(model.decode(generated, memory, valid), slice(None))
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_the_same_weights_have_the_same_gradients(theirs, inputs):
    tokens, valid, generated = inputs
    model = T5(CONFIG, VOCABULARY).eval()
    model.load_transformers(theirs.state_dict())
    theirs.zero_grad()
    theirs(input_ids=tokens, attention_mask=valid.long(), decoder_input_ids=generated).logits.square().mean().backward()
    model.logits(model.decode(generated, model.encode(tokens, valid), valid), slice(None)).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for ours, name in model._transformers_names().items():
        torch.testing.assert_close(model.get_parameter(ours).grad, expected[name].grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_beams_step_by_step_are_the_decoder_at_once_whatever_their_parents(model, inputs):
    tokens, valid, _ = inputs
    memory = model.encode(tokens, valid)
    torch.manual_seed(2)
    decoder, prefixes = BeamDecoder(model, memory, valid), torch.zeros(4, 1, 0, dtype=torch.int64)
    for step, beams in enumerate((1, 3, 5, 2)):
        parents = torch.full((4, 1), -1) if step == 0 else torch.randint(0, prefixes.shape[1], (4, beams))
        taken = torch.zeros(4, 1, dtype=torch.int64) if step == 0 else torch.randint(1, VOCABULARY, (4, beams))
        before = prefixes.gather(1, parents.clamp(min=0)[..., None].expand(-1, -1, step))
        prefixes = torch.cat((before, taken[..., None]), 2)
        states = decoder.advance(parents, taken)
        for beam in range(beams):
            expected = model.decode(prefixes[:, beam], memory, valid)[:, -1]
            torch.testing.assert_close(states[:, beam], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_not_valid_does_not_matter(model, inputs):
    tokens, valid, generated = inputs
    other = torch.where(valid, tokens, torch.randint(1, VOCABULARY, tokens.shape))
    memory, changed = model.encode(tokens, valid), model.encode(other, valid)
    torch.testing.assert_close(memory[valid], changed[valid])
    alone = model.encode(tokens[1:2, :3], valid[1:2, :3])
    torch.testing.assert_close(memory[1, :3], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(generated, memory, valid), model.decode(generated, changed, valid))


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_transformers(causal):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    bias, places = RelativeBias(T5Config(), causal), torch.arange(300)
    offset = places[None, :] - places[:, None]
    expected = modeling.T5Attention._relative_position_bucket(offset, bidirectional=not causal, num_buckets=32, max_distance=128)
    assert torch.equal(bias._bucket(offset), expected)


def test_distances_must_reach_beyond_the_exact_buckets():
    with pytest.raises(ValidationError, match="max_distance: expected more than half of buckets=32, got 16"):
        T5Config(max_distance=16)
    bias = RelativeBias(T5Config(max_distance=17), causal=True)
    assert bias._bucket(-torch.arange(300)).max() == 31
