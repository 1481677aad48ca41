# SPDX-License-Identifier: Apache-2.0
"""What a ranker's and a retriever's histories both build on."""

import math

import pytest
import torch
from torch import Tensor, nn

from recsys.layers.hstu import HSTULayer

DIM, LONGEST = 6, 7


def build(heads: int = 2, dropout: float = 0.0) -> HSTULayer:
    torch.manual_seed(0)
    layer = HSTULayer(DIM, heads, LONGEST, dropout).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def rows(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(count, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(layer: HSTULayer, x_ld: Tensor) -> Tensor:
    """Equations 1 to 3, for one event, one head and one earlier event at a time."""

    def norm(x: Tensor, own: nn.LayerNorm) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + own.eps).sqrt() * own.weight + own.bias

    width, out = DIM // layer.heads, []
    projected = [layer.project.weight @ norm(x, layer.norm_in) + layer.project.bias for x in x_ld]
    u, v, q, k = zip(*((x / (1 + (-x).exp())).split(DIM) for x in projected), strict=True)
    for i, x in enumerate(x_ld):
        pooled = torch.zeros(DIM, dtype=torch.float64)
        for head in range(layer.heads):
            own = slice(head * width, (head + 1) * width)
            for j in range(i + 1):
                score = q[i][own] @ k[j][own] / math.sqrt(width) + layer.distance[i - j]
                pooled[own] += score * score.sigmoid() / LONGEST * v[j][own]
        out.append(x + layer.out.weight @ (norm(pooled, layer.norm_out) * u[i]))
    return torch.stack(out)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 4, LONGEST])
@torch.no_grad()
def test_it_is_what_the_equations_say_of_every_row(heads: int, length: int) -> None:
    layer, x = build(heads), rows(3, length)
    out = layer(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    torch.testing.assert_close(out, torch.stack([by_loop(layer, row) for row in x]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_there_may_be_no_rows_and_no_events(shape: tuple[int, int]) -> None:
    assert build()(rows(*shape)).shape == (*shape, DIM)


def test_an_event_sees_itself_and_all_before_it_and_nothing_else() -> None:
    layer, x = build(), rows(2, 5)
    sees = torch.autograd.functional.jacobian(layer, x).abs().amax(dim=(2, 5)) > 0  # [B, L, B, L]
    causal = torch.ones(5, 5).tril().bool()
    for row in range(2):
        assert torch.equal(sees[row, :, row], causal)
        assert not sees[row, :, 1 - row].any(), "nor does it see another row"


@torch.no_grad()
def test_padding_behind_a_row_changes_nothing_whatever_it_holds() -> None:
    layer, x = build(), rows(3, LONGEST)
    for length in range(1, LONGEST):
        alone = layer(x[:, :length])
        for padding in (0.0, -3.0, 1e6):
            padded = x.clone()
            padded[:, length:] = padding
            torch.testing.assert_close(layer(padded)[:, :length], alone, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_order_is_told_by_distances_alone() -> None:
    layer, x = build(), rows(2, 5)
    turned = x[:, [2, 0, 3, 1, 4]]
    assert not torch.allclose(layer(turned)[:, -1], layer(x)[:, -1])
    nn.init.zeros_(layer.distance)
    torch.testing.assert_close(layer(turned)[:, -1], layer(x)[:, -1])


def test_gradients_agree_with_finite_differences_and_reach_every_parameter() -> None:
    layer, x = build(), rows(2, LONGEST).requires_grad_()
    parameters = dict(layer.named_parameters())

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters.values()))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters.values())
    assert (layer.distance.grad != 0).all(), "every distance up to the longest occurs"


def test_distances_start_at_zero_and_dropout_acts_in_training_alone() -> None:
    assert HSTULayer(DIM, 2, LONGEST, 0.0).distance.abs().max() == 0
    layer, x = build(dropout=0.5), rows(2, 5)
    torch.testing.assert_close(layer(x), build()(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
