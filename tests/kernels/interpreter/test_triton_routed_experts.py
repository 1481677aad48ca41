# SPDX-License-Identifier: Apache-2.0
"""Routed experts in Triton's interpreter: what can be left out, other memory layouts, groups of many tiles and of no rows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels import backend
from kernels.routed_experts import OP, cpu, draw, routed_experts, triton_ops
from kernels.routed_experts.quantized import OP as QUANTIZED
from kernels.routed_experts.quantized import routed_experts_quantized
from kernels.testing import error_ratio


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def drawn(*shape: int) -> tuple[Any, ...]:
    return draw(shape, torch.float32, torch.Generator().manual_seed(0))


def gradients(given: tuple[Any, ...], call: Any) -> tuple[Tensor, ...]:
    value = call(*given)
    leaves = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


def compare(given: tuple[Any, ...]) -> None:
    wide = tuple(
        one.detach().double().requires_grad_(one.requires_grad) if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in given
    )
    with backend.use("triton"):
        found = gradients(given, routed_experts)
    for mine, theirs in zip(found, gradients(wide, OP.reference), strict=True):
        assert error_ratio(mine, theirs) < 4e-6


@pytest.mark.parametrize("gelu", [0, 1])
@pytest.mark.parametrize("left_out", [(5,), (6,), (5, 6)], ids=str)
def test_bias_and_what_the_sum_starts_from_can_be_left_out(left_out: tuple[int, ...], gelu: int) -> None:
    given = drawn(1, 9, 20, 12, 3, 2, gelu)
    compare(tuple(None if place in left_out else one for place, one in enumerate(given)))


def test_other_layouts_give_the_same() -> None:
    """Rows outermost, and weights of which the columns of several experts lie side by side, as in ReLU routing."""
    x, w_in, w_out, chosen, gates, bias, onto, _ = (
        one.detach() if isinstance(one, Tensor) else one for one in drawn(2, 9, 20, 12, 3, 2, 1)
    )
    with backend.use("triton"):
        expected = routed_experts(x, w_in, w_out, chosen, gates, bias, onto, "gelu")
        rows = x.transpose(0, 1).contiguous().transpose(0, 1)
        beside = w_in.transpose(1, 2).contiguous().transpose(1, 2)
        turned = w_out.transpose(2, 3).contiguous().transpose(2, 3)
        spread = torch.stack((x, torch.zeros_like(x)), -1)[..., 0]
        for given in ((rows, beside, turned), (spread, w_in, w_out)):
            assert not any(one.is_contiguous() for one in given[:1])
            assert torch.equal(routed_experts(*given, chosen, gates, bias, onto, "gelu"), expected)


def test_groups_of_many_tiles_of_one_row_and_of_none() -> None:
    """Of 200 rows expert 0 gets 199 at token 0, expert 1 one, expert 2 none; at token 1 no row has an expert."""
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(2, 200, 5, 4, 3, 1, 0)
    chosen.fill_(-1)
    chosen[0] = 0
    chosen[0, 77] = 1
    compare((x, w_in, w_out, chosen, gates, bias, onto, activation))


def test_every_tile_lies_in_one_group_and_together_they_are_all_pairs() -> None:
    counts = torch.tensor([0, 1, 63, 64, 65, 0, 200, 128, 0])
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    for without in (0, 150):
        tiles = triton_ops._tiles(offsets, int(offsets[-1]) + without).tolist()
        seen = []
        for group, first in tiles:
            if group >= 0:
                assert offsets[group] <= first < offsets[group + 1]
                seen += range(first, min(first + triton_ops.BLOCK_M, int(offsets[group + 1])))
        assert sorted(seen) == list(range(int(offsets[-1])))
        assert len(tiles) == (int(offsets[-1]) + without) // triton_ops.BLOCK_M + len(counts)


def test_the_host_never_waits_for_what_the_device_sorts() -> None:
    """Tensors without values make every look at one an error."""
    with FakeTensorMode():
        chosen, gates = torch.zeros(2, 100, 3, dtype=torch.int64), torch.zeros(2, 100, 3)
        order, offsets = cpu.sort_pairs(chosen, 5)
        plan = triton_ops._plan(order, offsets, gates)
        assert plan.tiles.shape == (600 // triton_ops.BLOCK_M + 10, 2)
        with pytest.raises(DataDependentOutputException):
            int(offsets[-1])


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = (
        one.detach() if isinstance(one, Tensor) else one for one in drawn(1, 80, 6, 5, 2, 1, 0)
    )
    with backend.use("triton"):
        together = routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation)
        some = [79, 3, 40]
        alone = routed_experts(x[:, some], w_in, w_out, chosen[:, some], gates[:, some], bias, onto[:, some], activation)
    assert torch.equal(alone, together[:, some])


def test_a_choice_beyond_the_experts_is_none() -> None:
    """The host does not look at choices on a GPU; whatever stands there must not lead out of bounds."""
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(2, 5, 6, 5, 3, 2, 0)
    beyond, none = chosen.clone(), chosen.clone()
    beyond[:, 1:3], none[:, 1:3] = 3, -1
    with backend.use("triton"):
        found = routed_experts(x, w_in, w_out, beyond, gates, bias, onto, activation)
        assert torch.equal(found, routed_experts(x, w_in, w_out, none, gates, bias, onto, activation))


@pytest.mark.parametrize(("batch", "choices"), [(0, 2), (5, 0)])
def test_no_rows_and_no_choices_give_weights_no_gradient(batch: int, choices: int) -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(2, 5, 6, 5, 3, 2, 0)
    x, onto, chosen, gates = x[:, :batch], onto[:, :batch], chosen[:, :batch, :choices], gates[:, :batch, :choices]
    with backend.use("triton"):
        value = routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation)
        found = torch.autograd.grad(value.sum(), (w_in, w_out, bias))
    assert torch.equal(value, onto)
    assert all(torch.equal(one, torch.zeros_like(one)) for one in found)


@pytest.mark.parametrize("fp8", [0, 1])
@pytest.mark.parametrize("left_out", [(7,), (7, 8)], ids=str)
def test_quantized_weights_without_bias_and_start(left_out: tuple[int, ...], fp8: int) -> None:
    drawn_bytes = QUANTIZED.inputs((1, 9, 20, 12, 3, 2, 0, fp8), torch.float32, torch.Generator().manual_seed(0))
    given = tuple(None if place in left_out else one for place, one in enumerate(drawn_bytes))
    with backend.use("triton"):
        found = routed_experts_quantized(*given)
    assert error_ratio(found, QUANTIZED.reference(*given)) < 2e-6


def test_every_float8_is_read_as_it_is() -> None:
    """All finite ones, the tiny ones without a leading digit among them, each behind a gate of silu(96), which is 96."""
    bits = torch.tensor([byte for byte in range(256) if byte & 127 != 127], dtype=torch.uint8)
    every = bits.view(torch.float8_e4m3fn).float()
    x, chosen = torch.eye(len(bits))[None], torch.zeros(1, len(bits), 1, dtype=torch.int64)
    weight_in = torch.stack([torch.full_like(every, 96.0), every], 1)[None, None].to(torch.float8_e4m3fn)
    weight_out = torch.ones(1, 1, 1, len(bits)).to(torch.float8_e4m3fn)
    with backend.use("triton"):
        scales = torch.ones(1, 1, 2), torch.ones(1, 1, len(bits))
        found = routed_experts_quantized(x, weight_in, weight_out, chosen, torch.ones(1, len(bits), 1), *scales)
    assert torch.equal(found[0, :, 0], 96 * every)
