# SPDX-License-Identifier: Apache-2.0
"""Selected attention in Triton's interpreter: shares of keys, keys that many blocks choose, and memory layouts."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.selected_attention import OP, selected_attention, triton_ops
from kernels.selected_attention.shape import Case
from kernels.testing import assert_matches_reference, error_ratio


def drawn(case: Case) -> tuple:
    return OP.inputs(case, torch.float32, torch.Generator().manual_seed(0))


def test_shares_of_which_some_are_empty_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "SPAN", 4)
    q, k, v, index, valid, _, scale = drawn(Case(2, 2, 1, 2, 30, 1, 1, 11, 5, 3, 0))
    valid[0, :, :, 4:8] = False
    valid[1, :, :, 3:] = False
    last = torch.tensor([-1, 25])  # the first query reads nothing in any share
    with backend.use("triton"):
        found = selected_attention(q, k, v, index, valid, last, scale)
    expected = OP.reference(*(x.detach().double() for x in (q, k, v)), index, valid, last, scale)
    assert error_ratio(found.detach(), expected) < 2e-6
    assert torch.equal(found[:, :, 0], torch.zeros_like(found[:, :, 0]))


def test_a_key_of_many_blocks_is_summed_the_same_every_time() -> None:
    q, k, v, index, valid, last, scale = drawn(Case(1, 2, 1, 6, 12, 1, 6, 3, 4, 4, 0))
    index, valid = index.clone(), torch.ones_like(valid)
    index[..., 0] = 11
    index[..., 1:] %= 11
    index[..., 2] = index[..., 1]  # and a key that is listed twice
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(OP.reference(*wide, index, valid, last, scale).square().sum(), wide)
    with backend.use("triton"):
        found = [torch.autograd.grad(selected_attention(q, k, v, index, valid).square().sum(), (q, k, v)) for _ in range(2)]
    for mine, again, theirs in zip(*found, expected, strict=True):
        assert torch.equal(mine, again)
        assert error_ratio(mine, theirs) < 4e-6


def test_keys_in_other_orders_and_at_odd_addresses_give_the_same() -> None:
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in drawn(Case(2, 2, 2, 3, 9, 1, 1, 5, 32, 32, 1)))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    odd = [torch.cat((x[..., :1], x), 3)[..., 1:] for x in (k, v)]
    with backend.use("triton"):
        expected = selected_attention(q, k, v, *rest)
        assert torch.equal(selected_attention(q, *turned, *rest), expected)
        assert torch.equal(selected_attention(q, *odd, *rest), expected)


def test_places_that_no_key_has_are_not_read() -> None:
    q, k, v, index, valid, last, scale = drawn(Case(1, 1, 1, 2, 9, 1, 1, 5, 4, 4, 0))
    outside, counts = index.clone(), torch.ones_like(valid)
    outside[..., 1], outside[..., 3] = -1, 9
    everything = counts.clone()
    counts[..., 1], counts[..., 3] = False, False
    with backend.use("triton"):
        found, expected = (selected_attention(q, k, v, *choice, last, scale) for choice in ((outside, everything), (index, counts)))
        gradients = [torch.autograd.grad(y.sum(), (k, v)) for y in (found, expected)]
    assert torch.equal(found, expected)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_several_tiles_of_queries_and_keys_with_heads_that_choose_apart() -> None:
    with backend.use("triton"):
        assert_matches_reference(OP, Case(1, 2, 1, 70, 90, 2, 2, 40, 8, 12, 1), torch.float32)
