# SPDX-License-Identifier: Apache-2.0
"""Pattention and TokenFormer: growth that changes nothing, and what it starts from."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.efficiency.growth.tokenformer import Pattention, TokenFormer, grow_optimizer_state, rotated

GROWING = ("l2_norm_gelu", "gelu_l2_norm")
EXACT = {"rtol": 0.0, "atol": 1e-10}


def build(activation="l2_norm_gelu", pairs=9, dtype=torch.float64, seed=0) -> Pattention:
    torch.manual_seed(seed)
    return Pattention(5, 3, pairs, activation, key_std=1.0, value_std=1.0).to(dtype)


def model(seed=0, **config) -> TokenFormer:
    torch.manual_seed(seed)
    found = TokenFormer(TokenFormer.Config(**{"dim": 8, "layers": 2, "heads": 2, "pairs": 6, "ffn_pairs": 10, **config})).double()
    for name, parameter in found.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith("key") else 0.5)
    return found


def drawn(*shape, seed=1, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(layer: Pattention, x: Tensor, tau: float) -> Tensor:
    """The equations, for one token and one pair at a time."""
    scores = torch.stack([sum(x[i] * key[i] for i in range(len(x))) for key in layer.key])
    if layer.activation == "l2_norm_gelu":
        weights = F.gelu(scores * tau / scores.square().sum().sqrt())
    elif layer.activation == "gelu_l2_norm":
        weights = F.gelu(scores) * tau / F.gelu(scores).square().sum().sqrt()
    else:
        weights = scores.exp() / scores.exp().sum() * tau
    return sum(weights[n] * layer.value[n] for n in range(layer.pairs))


@pytest.mark.parametrize("activation, tau", [("l2_norm_gelu", 3.0), ("gelu_l2_norm", 3.0), ("softmax", 9.0)])
@torch.no_grad()
def test_it_is_what_the_equations_say(activation, tau):
    layer, x = build(activation), drawn(2, 4, 5)
    expected = torch.stack([by_hand(layer, row, tau) for row in x.flatten(0, 1)]).view(2, 4, 3)
    torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("activation", GROWING)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_growth_changes_no_result(activation, dtype, tolerance):
    layer, x = build(activation, dtype=dtype), drawn(7, 5, dtype=dtype)
    before = layer(x)
    for pairs in (4, 0, 13):
        layer.grow(pairs)
    assert layer.pairs == 26 and float(layer.tau) == 3.0 and float(layer.value[9:].abs().min()) > 0.0
    torch.testing.assert_close(layer(x), before, rtol=0.0, atol=tolerance)
    layer.tau.fill_(26**0.5)  # the release's tau: the reason why ours stays
    assert float((layer(x) - before).abs().max()) > 1e-2


@torch.no_grad()
def test_a_grown_model_says_the_same():
    for activation in GROWING:
        grown, x = model(activation=activation), drawn(3, 6, 8)
        before = grown(x)
        grown.grow(5, 11)
        assert [part.pairs for part in grown.modules() if isinstance(part, Pattention)] == 2 * [11, 11, 11, 11, 21]
        torch.testing.assert_close(grown(x), before, **EXACT)


def test_softmax_does_not_grow():
    layer = build("softmax")
    with pytest.raises(ConfigError, match="softmax"):
        layer.grow(2)
    assert layer.pairs == 9
    x = drawn(7, 5)
    extended = Pattention(5, 3, 11, "softmax").double()
    extended.key.data, extended.value.data = torch.cat((layer.key, torch.zeros(2, 5))), torch.cat((layer.value, drawn(2, 3)))
    extended.tau = layer.tau
    assert float((extended(x) - layer(x)).detach().abs().max()) > 1e-2  # which is why
    whole = model(activation="softmax")
    with pytest.raises(ConfigError, match="softmax"):
        whole.grow(1, 1)


@pytest.mark.parametrize("activation", [*GROWING, "softmax"])
@torch.no_grad()
def test_the_order_of_pairs_does_not_matter(activation):
    layer, x = build(activation), drawn(4, 5)
    before, order = layer(x), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    layer.key.copy_(layer.key[order])
    layer.value.copy_(layer.value[order])
    torch.testing.assert_close(layer(x), before, **EXACT)


def test_gradients_where_it_grew():
    layer, x = build(), drawn(6, 5)
    layer.grow(4)
    layer(x).square().sum().backward()
    assert torch.equal(layer.value.grad[9:], torch.zeros(4, 3, dtype=torch.float64))
    assert bool((layer.key.grad[9:].abs().sum(1) > 1e-6).all()) and bool((layer.value.grad[:9].abs().sum(1) > 0).all())
    layer.zero_grad()
    layer.value.data[9:] = 0.0  # both at zero: nothing would ever train
    layer(x).square().sum().backward()
    assert float(layer.key.grad[9:].abs().max()) == 0.0 == float(layer.value.grad[9:].abs().max())


@pytest.mark.parametrize("activation", [*GROWING, "softmax"])
def test_gradients_are_right(activation):
    layer = build(activation, pairs=4)
    x = drawn(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, k, v: torch.func.functional_call(layer, {"key": k, "value": v}, x), (x, layer.key, layer.value)
    )


@torch.no_grad()
def test_the_default_is_blind_to_scale_and_the_others_are_not():
    x = drawn(4, 5)
    for c in (1e-3, 7.0, 1e4):
        torch.testing.assert_close(build()(c * x), build()(x), **EXACT)
    for activation in ("gelu_l2_norm", "softmax"):
        assert float((build(activation)(7.0 * x) - build(activation)(x)).abs().max()) > 1e-2


@pytest.mark.parametrize("activation", [*GROWING, "softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_and_no_rows(activation, dtype):
    layer = build(activation, dtype=dtype)
    x = torch.cat((torch.zeros(2, 5), torch.ones(1, 5))).to(dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype and bool(out.isfinite().all())
    assert activation == "softmax" or float(out[:2].detach().abs().max()) == 0.0
    out.sum().backward()
    assert float(x.grad[:2].abs().max()) < 100.0 and bool(x.grad.isfinite().all()) and bool(layer.key.grad.isfinite().all())
    assert layer(x[:0]).shape == (0, 3) and layer(torch.zeros(2, 0, 5, dtype=dtype)).shape == (2, 0, 3)


@torch.no_grad()
def test_shrinking_undoes_growing():
    layer = build()
    before, result = copy.deepcopy(layer.state_dict()), layer(drawn(4, 5))
    layer.grow(6)
    layer.shrink(6)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(layer(drawn(4, 5)), result)


def test_bad_sizes_are_errors():
    with pytest.raises(ConfigError, match="pairs: expected at least 1, got 0"):
        Pattention(5, 3, 0)
    with pytest.raises(ConfigError, match=r"activation: .* got 'relu'"):
        Pattention(5, 3, 2, "relu")
    for call, value in (("grow", -1), ("shrink", -1), ("shrink", 9), ("shrink", 12)):
        with pytest.raises(ConfigError, match=f"{call}: pairs: .* got {value}"):
            getattr(build(), call)(value)
    with pytest.raises(ConfigError, match="got 3 and -1"):
        (whole := model()).grow(3, -1)
    assert all(part.pairs in (6, 10) for part in whole.modules() if isinstance(part, Pattention))
    with pytest.raises(ValueError, match="multiple of heads=3"):
        TokenFormer.Config(dim=8, heads=3)


def test_the_number_of_parameters():
    for pairs, ffn_pairs, layers in ((6, 10, 2), (3, 1, 3)):
        found = model(pairs=pairs, ffn_pairs=ffn_pairs, layers=layers)
        assert sum(p.numel() for p in found.parameters()) == layers * 2 * 8 * (4 * pairs + ffn_pairs)
        found.grow(2, 5)
        assert sum(p.numel() for p in found.parameters()) == layers * 2 * 8 * (4 * (pairs + 2) + ffn_pairs + 5)


@torch.no_grad()
def test_initial_values_are_the_releases():
    torch.manual_seed(0)
    config = TokenFormer.Config(dim=64, layers=4, pairs=400, ffn_pairs=400)
    for part in (part for part in TokenFormer(config).modules() if isinstance(part, Pattention)):
        assert float(part.key.std()) == pytest.approx(0.02, rel=0.05) and float(part.value.std()) == pytest.approx(2 / (4 * 8), rel=0.05)


def trained(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int, width: int = 5) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        layer(drawn(8, width, seed=step)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_optimizer_keeps_what_it_knows_of_old_rows(kind):
    plain = build()
    plain_optimizer = kind(plain.parameters(), lr=0.01, amsgrad=True)
    trained(plain, plain_optimizer, 3)
    grown = copy.deepcopy(plain)
    optimizer = kind(grown.parameters(), lr=0.01, amsgrad=True)
    optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    grown.grow(4)
    grow_optimizer_state(optimizer)
    for old, new in zip(plain.parameters(), grown.parameters(), strict=True):
        before, after = plain_optimizer.state[old], optimizer.state[new]
        assert float(after["step"]) == 3.0
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert after[name].shape == new.shape and float(after[name][9:].abs().max()) == 0.0
            assert torch.equal(after[name][:9], before[name])
    new_keys = grown.key.detach()[9:].clone()
    trained(plain, plain_optimizer, 1)
    trained(grown, optimizer, 1)  # at the point of growth old rows have their old gradients: one step is the same for them
    for old, new in zip(plain.parameters(), grown.parameters(), strict=True):
        torch.testing.assert_close(new[:9], old, **EXACT)
    assert bool((grown.key[9:] != new_keys).any(1).all())
    grown.shrink(4)
    grow_optimizer_state(optimizer)
    trained(grown, optimizer, 1)
    assert optimizer.state[grown.key]["exp_avg"].shape == (9, 5)


def test_an_optimizer_without_state_needs_nothing():
    whole = model()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    whole(drawn(2, 3, 8)).sum().backward()
    whole.grow(2, 2)
    assert all(parameter.grad is None for parameter in whole.parameters())
    before = whole.blocks[0].ffn.key.detach().clone()
    (whole(drawn(2, 3, 8)) * drawn(2, 3, 8, seed=5)).sum().backward()
    optimizer.step()
    assert bool((whole.blocks[0].ffn.key[10:] != before[10:]).any())


@pytest.mark.parametrize("assign", [False, True])
def test_grown_checkpoints_load(assign):
    grown, x = model(), drawn(2, 4, 8)
    grown.grow(3, 7)
    with torch.no_grad():
        grown.blocks[1].ffn.key[10:] = 1.0
    other = model(seed=9)
    other.load_state_dict(copy.deepcopy(grown.state_dict()), assign=assign)
    assert torch.equal(other(x), grown(x)) and other.blocks[0].query.pairs == 9
    large = TokenFormer(TokenFormer.Config(dim=8, layers=2, heads=2, pairs=9, ffn_pairs=17)).double()
    assert float(large.blocks[0].query.tau) == 3.0
    large.load_state_dict(copy.deepcopy(grown.state_dict()), assign=assign)  # built at the full size, it has the first size's tau
    assert torch.equal(large(x), grown(x)) and float(large.blocks[0].query.tau) == pytest.approx(6**0.5)
    other.load_state_dict(copy.deepcopy(model().state_dict()), assign=assign)
    assert torch.equal(other(x), model()(x)) and other.blocks[0].query.pairs == 6


def test_a_checkpoint_of_another_width_is_an_error():
    with pytest.raises(RuntimeError, match="size mismatch for key"):
        build().load_state_dict(Pattention(6, 3, 4).state_dict())


def test_what_was_loaded_trains():
    grown = build()
    grown.grow(2)
    other = build(seed=4)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    trained(other, optimizer, 1)
    other.load_state_dict(grown.state_dict())
    grow_optimizer_state(optimizer)
    before = other.value.detach().clone()
    trained(other, optimizer, 2)
    assert bool((other.value != before).any(1).all())


# --- the whole model


@pytest.mark.parametrize("length", [1, 2, 7])
@torch.no_grad()
def test_no_token_sees_a_later_one(length):
    whole, x = model(), drawn(2, 7, 8)
    changed = x.clone()
    changed[:, length:] = 9.0 * drawn(2, 7 - length, 8, seed=4)
    torch.testing.assert_close(whole(changed)[:, :length], whole(x)[:, :length], **EXACT)
    assert length == 7 or float((whole(changed)[:, length:] - whole(x)[:, length:]).abs().max()) > 1e-3


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others_and_there_may_be_none():
    whole, x = model(), drawn(3, 5, 8)
    torch.testing.assert_close(whole(x)[1:2], whole(x[1:2]), **EXACT)
    assert whole(x[:0]).shape == (0, 5, 8) and whole(x[:, :0]).shape == (3, 0, 8)
    assert torch.equal(whole(x), whole(x))


@torch.no_grad()
def test_one_block_is_what_the_paper_says():
    whole, x = model(layers=1, rotary_share=1.0), drawn(1, 5, 8)

    def normed(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    block, n = whole.blocks[0], normed(x)[0]
    q, k, v = (part(n) for part in (block.query, block.key, block.value))
    attended = torch.zeros(5, 8, dtype=torch.float64)
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        for t in range(5):
            scores = torch.stack([turn(q[t, own], t) @ turn(k[s, own], s) / 2.0 for s in range(t + 1)])
            attended[t, own] = scores.softmax(0) @ v[: t + 1, own]
    middle = x[0] + block.out(attended)
    torch.testing.assert_close(whole(x)[0], normed(middle + block.ffn(normed(middle))), **EXACT)


def turn(x: Tensor, place: int) -> Tensor:
    """A vector of width 4 as two complex numbers, turned by the angle of its place."""
    pair = torch.complex(x[:2], x[2:]) * torch.exp(1j * place * torch.tensor([1.0, 0.01], dtype=torch.float64))
    return torch.cat((pair.real, pair.imag))


@torch.no_grad()
def test_rotation_makes_scores_depend_on_distance_only():
    x = drawn(1, 1, 1, 8).expand(1, 1, 9, 8)
    turned = rotated(x, 4)[0, 0]
    scores = turned @ turned.T
    for distance in range(9):
        torch.testing.assert_close(scores.diagonal(distance), scores[0, distance].expand(9 - distance), **EXACT)
    assert torch.equal(turned[:, 4:], x[0, 0, :, 4:]) and float((turned[1, :4] - turned[0, :4]).abs().min()) > 1e-3


def test_a_grown_model_learns_further():
    """After growth the loss goes on falling from where it was, below what it was."""
    torch.manual_seed(0)
    small = TokenFormer(TokenFormer.Config(dim=8, layers=1, heads=2, pairs=4, ffn_pairs=4))
    head, x = nn.Linear(8, 8), drawn(16, 6, 8, dtype=torch.float32)
    target = x.roll(1, 1) * x

    def loss() -> Tensor:
        return F.mse_loss(head(small(x)), target)

    optimizer = torch.optim.Adam([*small.parameters(), *head.parameters()], lr=0.02)

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            found = loss()
            found.backward()
            optimizer.step()
        return float(loss().detach())

    first = train(80)
    small.grow(12, 28)
    grow_optimizer_state(optimizer)
    assert float(loss().detach()) == pytest.approx(first, abs=1e-5)
    assert train(80) < 0.9 * first
