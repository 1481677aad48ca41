# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.retrieval.item_transformers import SetTransformer, attend_seen
from recsys.retrieval.transformer import CausalTransformer, TransformerConfig

CONFIG = TransformerConfig(dim=8, blocks=3, heads=2, ffn_multiplier=3, dropout=0.0, max_length=6, init_std=0.5)


def oracle_of(model):
    """The blocks and the final norm of `model`, in torch's own transformer."""
    dim = CONFIG.dim
    layer = nn.TransformerEncoderLayer(dim, CONFIG.heads, 3 * dim, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    stack = nn.TransformerEncoder(layer, CONFIG.blocks, norm=nn.LayerNorm(dim, dtype=torch.float64), enable_nested_tensor=False)
    for ours, theirs in zip(model.blocks, stack.layers, strict=True):
        pairs = {
            "self_attn.in_proj_weight": torch.cat((ours.query.weight, ours.key_value.weight)),
            "self_attn.in_proj_bias": torch.cat((ours.query.bias, ours.key_value.bias)),
            "self_attn.out_proj.weight": ours.out.weight,
            "self_attn.out_proj.bias": ours.out.bias,
            "norm1.weight": ours.attention_norm.weight,
            "norm1.bias": ours.attention_norm.bias,
            "norm2.weight": ours.ffn_norm.weight,
            "norm2.bias": ours.ffn_norm.bias,
            "linear1.weight": ours.ffn[0].weight,
            "linear1.bias": ours.ffn[0].bias,
            "linear2.weight": ours.ffn[2].weight,
            "linear2.bias": ours.ffn[2].bias,
        }
        theirs.load_state_dict(pairs, strict=True)
    stack.norm.load_state_dict(model.norm.state_dict())
    return stack.train()


def randomised(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_causal_equals_torch():
    model = randomised(CausalTransformer(CONFIG))
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(model(x, torch.full((4,), 5)), oracle_of(model)(x + model.position.weight[:5], mask=mask))


def test_causal_does_not_look_ahead():
    model = randomised(CausalTransformer(CONFIG))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 3:] = torch.randn(2, 3, 8, dtype=torch.float64)
    found, other = (model(z, torch.full((2,), 6)) for z in (x, y))
    torch.testing.assert_close(found[:, :3], other[:, :3], rtol=0, atol=0)
    assert (found[:, 3:] - other[:, 3:]).abs().min() > 0


def one_sequence(items, queries, positions):
    """Item tokens, then a query group for each state 0..L, with the (L·n + (L+1)·n)² mask that our code never builds (True: hidden)."""
    b, length, n, _ = items.shape
    group = torch.arange(length).repeat_interleave(n)
    seen = torch.cat((group, torch.arange(length + 1).repeat_interleave(n)))
    hidden = torch.ones(len(seen), len(seen), dtype=torch.bool)
    hidden[:, : length * n] = group[None] >= seen[:, None]
    hidden.fill_diagonal_(False)
    x = torch.cat((items.flatten(1, 2), queries.repeat(length + 1, 1).expand(b, -1, -1)), 1) + positions[seen]
    return x, hidden


def test_sets_with_queries_equal_torch_on_one_masked_sequence():
    model = randomised(SetTransformer(CONFIG))
    items = torch.randn(3, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    ours = model(items, queries, torch.arange(6).expand(3, -1))
    x, hidden = one_sequence(items, queries, model.position.weight)
    theirs = oracle_of(model)(x, mask=hidden)[:, 5 * 4 :].unflatten(1, (6, 4))
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    wanted = (items, queries, model.position.weight)
    for a, b in zip(torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(theirs, wanted, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_any_choice_of_states_gives_the_same_outputs():
    model = randomised(SetTransformer(CONFIG))
    items, queries = torch.randn(2, 6, 3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    every = model(items, queries, torch.arange(7).expand(2, -1))
    some = model(items, queries, torch.tensor([[4, 1, 1], [6, 0, 2]]))
    torch.testing.assert_close(some, torch.stack((every[0, [4, 1, 1]], every[1, [6, 0, 2]])))


def test_a_block_alone_and_no_items_at_all():
    config = CONFIG.model_copy(update={"blocks": 1})
    model = randomised(SetTransformer(config))
    out = model(torch.randn(2, 0, 3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.int64))
    assert out.shape == (2, 1, 3, 8)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], out[1])
    items, queries = torch.randn(2, 4, 3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    nobody = model(items, queries, torch.zeros(2, 0, dtype=torch.int64))
    assert nobody.shape == (2, 0, 3, 8)


def attention_example():
    b, h, t, s, e = 2, 2, 3, 4, 3
    query, own_key, own_value = torch.randn(3, b, h, t, e, dtype=torch.float64).requires_grad_().unbind(0)
    keys, values = torch.randn(2, b, h, s, e, dtype=torch.float64).requires_grad_().unbind(0)
    bias = torch.zeros(b, 1, t, 1 + s, dtype=torch.float64)
    bias[0, :, 0, 1:] = bias[1, :, 2, 3:] = -torch.inf
    return query, own_key, own_value, keys, values, bias


def brute_force_attention(query, own_key, own_value, keys, values, bias):
    out = torch.empty_like(query)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        scores = torch.cat((own_key[b, h, t][None], keys[b, h])) @ query[b, h, t] / query.shape[-1] ** 0.5 + bias[b, 0, t]
        out[b, h, t] = scores.softmax(0) @ torch.cat((own_value[b, h, t][None], values[b, h]))
    return out


def test_attend_seen_equals_brute_force_and_a_token_that_sees_nothing_keeps_its_own_value():
    example = attention_example()
    out = attend_seen(*example)
    torch.testing.assert_close(out, brute_force_attention(*example))
    torch.testing.assert_close(out[0, :, 0], example[2][0, :, 0])


def test_attend_seen_gradcheck():
    *leaves, bias = (t.detach().requires_grad_() for t in attention_example())
    assert torch.autograd.gradcheck(lambda *x: attend_seen(*x, bias.detach()), leaves)


def test_heads_must_divide_dim():
    with pytest.raises(ConfigError, match=r"dim: expected a multiple of heads=3, got 64"):
        parse(TransformerConfig, {"heads": 3}, source="recipe.yaml")
