# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec.modules.crossnet import LowRankCrossNet

from recsys.core.errors import ConfigError
from recsys.ranking.interactions import BilinearFusion, Cross, CrossNet, DotInteraction, FieldNorm, HiddenLayers, MaskBlock
from recsys.ranking.part import NORM_EPS, Part

B, W = 6, 5


def draw(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64, every parameter drawn anew, so that no zero hides a term."""
    torch.manual_seed(seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(cross: Cross, weight: float, bias: float) -> Cross:
    for layer in (cross.down, cross.up):
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, weight)
    nn.init.constant_(cross.up.bias, bias)
    return cross


# --- cross layers


@pytest.mark.parametrize("rank", [None, 2])
def test_a_cross_layer_of_zeros_is_the_identity_and_with_bias_one_it_adds_the_input(rank: int | None) -> None:
    cross, x0, x1 = Cross(W, rank).double(), x(B, W), x(B, W, seed=2)
    assert torch.equal(fill(cross, 0, 0)(x0, x1), x1)
    assert torch.equal(fill(cross, 0, 1)(x0, x1), x0 + x1)
    assert torch.equal(cross(x0, x0), 2 * x0)


def test_a_full_cross_layer_equals_the_equation_in_numpy() -> None:
    cross, x0, x1 = draw(Cross(W)), x(B, W), x(B, W, seed=2)
    weight, bias, a, b = (t.detach().numpy() for t in (cross.up.weight, cross.up.bias, x0, x1))
    expected = np.stack([a[i] * (weight @ b[i] + bias) + b[i] for i in range(B)])
    np.testing.assert_allclose(cross(x0, x1).detach().numpy(), expected, rtol=1e-12)


def test_low_rank_equals_full_where_the_product_of_its_factors_is_the_matrix() -> None:
    low, full = draw(Cross(W, W)), draw(Cross(W), seed=3)
    with torch.no_grad():
        full.up.weight.copy_(low.up.weight @ low.down.weight)
        full.up.bias.copy_(low.up.bias)
    torch.testing.assert_close(low(x(B, W), x(B, W, seed=2)), full(x(B, W), x(B, W, seed=2)))


def test_a_cross_network_equals_torchrecs_in_outputs_and_gradients() -> None:
    ours, theirs = draw(CrossNet(W, layers=3, rank=2)), LowRankCrossNet(W, num_layers=3, low_rank=2).double()
    with torch.no_grad():
        for layer, w, v, b in zip(ours.layers, theirs.W_kernels, theirs.V_kernels, theirs.bias, strict=True):
            w.copy_(layer.up.weight)
            v.copy_(layer.down.weight)
            b.copy_(layer.up.bias)
    a, b = x(B, W).requires_grad_(), x(B, W).requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b))
    ours(a).square().sum().backward()
    theirs(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.layers[1].down.weight.grad, theirs.V_kernels[1].grad)


def test_layers_raise_the_degree_of_the_polynomial_one_by_one() -> None:
    points = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for layers in (1, 2, 3):
        net = draw(CrossNet(1, layers))
        y = net(points[:, None])[:, 0].detach().numpy()
        coefficients = np.polynomial.polynomial.polyfit(points.numpy(), y, 8)
        assert abs(coefficients[layers + 1]) > 1e-6
        assert np.abs(coefficients[layers + 2 :]).max() < 1e-9


# --- dot products


def test_dot_products_are_the_upper_triangle_row_by_row() -> None:
    dot, e = DotInteraction(4, 3), x(B, 4, 3)
    expected = [[float(e[b, i] @ e[b, j]) for i in range(4) for j in range(i + 1, 4)] for b in range(B)]
    assert dot.width == 6
    torch.testing.assert_close(dot(e), torch.tensor(expected, dtype=torch.float64))
    gram = torch.triu(e @ e.transpose(1, 2), 1)
    assert torch.equal(dot(e), gram[gram != 0].reshape(B, -1))


def test_one_vector_has_no_pair() -> None:
    assert DotInteraction(1, 3)(x(B, 1, 3)).shape == (B, 0)


# --- masks


def layer_norm(v: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = v - v.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPS) * gain + bias


def test_a_mask_block_equals_the_equations_in_numpy() -> None:
    block, v, h = draw(MaskBlock(context=7, dim=W, width=4, reduction=1.6)), x(B, 7), x(B, W, seed=2)
    (w1, b1), (w2, b2) = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in (block.mask[0], block.mask[-1])]
    assert w1.shape == (8, 7)
    mask = np.maximum(v.numpy() @ w1.T + b1, 0) @ w2.T + b2
    masked = (mask * h.numpy()) @ block.linear.weight.detach().numpy().T
    expected = np.maximum(layer_norm(masked, block.norm.weight.detach().numpy(), block.norm.bias.detach().numpy()), 0)
    np.testing.assert_allclose(block(v, h).detach().numpy(), expected, rtol=1e-10)


def test_a_mask_of_ones_leaves_a_plain_layer() -> None:
    block, h = draw(MaskBlock(context=7, dim=W, width=4, reduction=2)), x(B, W)
    nn.init.zeros_(block.mask[-1].weight)
    nn.init.ones_(block.mask[-1].bias)
    torch.testing.assert_close(block(x(B, 7), h), block.norm(block.linear(h)).relu())


def test_each_field_is_normalised_by_itself() -> None:
    norm, e = draw(FieldNorm(3, 4)), x(B, 3, 4)
    for f in range(3):
        one = nn.LayerNorm(4, eps=NORM_EPS).double()
        one.load_state_dict({"weight": norm.weight[f], "bias": norm.bias[f]})
        torch.testing.assert_close(norm(e)[:, f], one(e[:, f]))


# --- fusion


@pytest.mark.parametrize("heads", [1, 2])
def test_fusion_equals_a_loop_over_rows_tasks_and_heads(heads: int) -> None:
    fusion, o1, o2 = draw(BilinearFusion(6, 4, heads, tasks=3)), x(B, 6), x(B, 4, seed=2)
    p, q = 6 // heads, 4 // heads
    weight = fusion.weight.reshape(heads, p, 3, q)
    expected = torch.zeros(B, 3, dtype=torch.float64)
    for b in range(B):
        for t in range(3):
            expected[b, t] = fusion.linear.bias[t] + fusion.linear.weight[t, :6] @ o1[b] + fusion.linear.weight[t, 6:] @ o2[b]
            for h in range(heads):
                expected[b, t] += o1[b, h * p : (h + 1) * p] @ weight[h, :, t] @ o2[b, h * q : (h + 1) * q]
    torch.testing.assert_close(fusion(torch.cat([o1, o2], 1)), expected)


def test_fusion_with_one_head_equals_torchs_bilinear() -> None:
    fusion, o1, o2 = draw(BilinearFusion(6, 4, 1, tasks=3)), x(B, 6), x(B, 4, seed=2)
    reference = nn.Bilinear(6, 4, 3).double()
    with torch.no_grad():
        reference.weight.copy_(fusion.weight[0].reshape(6, 3, 4).transpose(0, 1))
        reference.bias.copy_(fusion.linear.bias)
    linear = torch.cat([o1, o2], 1) @ fusion.linear.weight.T
    torch.testing.assert_close(fusion(torch.cat([o1, o2], 1)), reference(o1, o2) + linear)


def test_heads_that_do_not_divide_both_widths_are_named() -> None:
    for widths in ((6, 4), (4, 6)):
        with pytest.raises(ConfigError, match=f"heads: expected a divisor .* {widths[0]} and {widths[1]}, got 4"):
            BilinearFusion(*widths, heads=4, tasks=1)


# --- hidden layers


def test_every_hidden_layer_is_activated_and_none_is_the_identity() -> None:
    layers, h = draw(HiddenLayers(W, (4, 3))), x(B, W)
    first, _, second, _ = layers.layers
    expected = ((h @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias).relu()
    torch.testing.assert_close(layers(h), expected)
    assert layers.width == 3
    empty = HiddenLayers(W, ())
    assert empty(h) is h
    assert empty.width == W


def test_batch_norm_stands_between_map_and_activation() -> None:
    layers, h = HiddenLayers(W, (4,), batch_norm=True).double(), x(B, W)
    mapped = h @ layers.layers[0].weight.T
    centred = mapped - mapped.mean(0)
    torch.testing.assert_close(layers(h), (centred / (centred.square().mean(0) + 1e-5).sqrt()).relu())
    assert layers.layers[0].bias is None


def test_dropout_follows_every_activation_in_training_alone() -> None:
    layers = HiddenLayers(W, (4, 3), dropout=0.5)
    assert [type(m).__name__ for m in layers.layers] == ["Linear", "ReLU", "Dropout"] * 2
    assert torch.equal(layers.eval()(x(B, W).float()), layers(x(B, W).float()))


# --- all of them

PARTS: list[tuple[Part, tuple[torch.Tensor, ...]]] = [
    (Cross(W), (x(B, W), x(B, W, seed=2))),
    (CrossNet(W, 2, 3), (x(B, W),)),
    (DotInteraction(4, 3), (x(B, 4, 3),)),
    (MaskBlock(7, W, 4, 2.0), (x(B, 7), x(B, W))),
    (BilinearFusion(6, 4, 2, 3), (x(B, 10),)),
    (HiddenLayers(W, (4, 3)), (x(B, W),)),
]


@pytest.mark.parametrize(("part", "inputs"), PARTS, ids=[type(part).__name__ for part, _ in PARTS])
def test_flops_are_what_torch_counts_and_gradients_what_differences_say(part: Part, inputs: tuple[torch.Tensor, ...]) -> None:
    draw(part)
    with FlopCounterMode(display=False) as counter:
        part(*inputs)
    assert counter.get_total_flops() == B * part.flops
    leaves = [v.clone().requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(part, leaves)
    part(*leaves).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


@pytest.mark.parametrize("part", [Cross(400, 20), BilinearFusion(400, 400, 4, 2)])
def test_resetting_draws_new_weights_of_the_scale_of_the_fans(part: nn.Module) -> None:
    before = [p.clone() for p in part.parameters()]
    part.reset_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, part.parameters(), strict=True))
    fans = part.up.weight.shape if isinstance(part, Cross) else (100, 100)
    weight = part.up.weight if isinstance(part, Cross) else part.weight
    assert weight.std().item() == pytest.approx((2 / sum(fans)) ** 0.5, rel=0.05)
