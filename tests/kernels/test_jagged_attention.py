# SPDX-License-Identifier: Apache-2.0
"""Jagged attention against torch's fused attention and the model's own layers, row by row, and what it must not depend on."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.jagged_attention import cpu, jagged_attention
from kernels.jagged_attention.reference import visible
from kernels.jagged_attention.shape import Case
from recsys.layers.hstu import HSTULayer
from recsys.retrieval.item_transformers import _attend_before, _group_mask

LENGTHS = [6, 0, 9, 3, 0]
MASKS = [("causal", 1), ("grouped", 3), ("grouped", 1), ("prefix", 1)]


def drawn(lengths: list[int] = LENGTHS, heads: int = 2, width: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(int(offsets[-1]), heads, width, generator=random, dtype=torch.float64).requires_grad_() for _ in range(3))
    return q, k, v, offsets


def by_row(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, attend) -> Tensor:
    """Rows as [1, H, L, e], through another attention."""
    rows = [
        attend(*(x[start:end].transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
        for start, end in itertools.pairwise(offsets.tolist())
        if end > start
    ]
    return torch.cat(rows)


def told(offsets: Tensor, mask: str, seed: int = 0) -> Tensor | None:
    """Of the prefix mask: any number of the tokens before."""
    if mask != "prefix":
        return None
    place = torch.cat([torch.arange(length) for length in offsets.diff().tolist()])
    share = torch.rand(len(place), generator=torch.Generator().manual_seed(seed))
    return (share * (place + 1)).long()


def assert_same_with_gradients(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_causal_form_is_torchs_attention_row_by_row() -> None:
    q, k, v, offsets = drawn()
    expected = by_row(q, k, v, offsets, lambda *qkv: functional.scaled_dot_product_attention(*qkv, is_causal=True))
    assert_same_with_gradients(jagged_attention(q, k, v, offsets), expected, (q, k, v))


def test_the_grouped_form_is_recgpts() -> None:
    q, k, v, offsets = drawn()

    def attend(*qkv: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*qkv, attn_mask=_group_mask(qkv[0].shape[2], 3, qkv[0].device))

    found = jagged_attention(q, k, v, offsets, mask="grouped", group=3)
    assert_same_with_gradients(found, by_row(q, k, v, offsets, attend), (q, k, v))


def test_prefixes_of_whole_items_are_setrecs() -> None:
    q, k, v, offsets = drawn()
    expected = by_row(q, k, v, offsets, lambda q, k, v: _attend_before(3)(q, k, v, torch.tensor([q.shape[2]])))
    seen = torch.cat([torch.arange(length) // 3 * 3 for length in offsets.diff().tolist()])
    assert_same_with_gradients(jagged_attention(q, k, v, offsets, mask="prefix", seen=seen), expected, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("longest_prefix", [0, 5, 40, 70])
def test_queries_behind_the_items_read_them_and_nobody_reads_queries(dtype: torch.dtype, longest_prefix: int) -> None:
    """Rows longer than a block of queries, so that keys between the prefix and a block's own are passed over."""
    q, k, v, offsets = (x.detach().to(dtype) if x.is_floating_point() else x for x in drawn([150, 0, 90, 33]))
    seen = torch.cat([torch.arange(length).clamp(max=longest_prefix) for length in offsets.diff().tolist()])
    leaves = tuple(x.requires_grad_() for x in (q, k, v))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        mask = (place[None] < place.clamp(max=longest_prefix)[:, None]) | torch.eye(len(place), dtype=torch.bool)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert_same_with_gradients(jagged_attention(*leaves, offsets, mask="prefix", seen=seen), by_row(*leaves, offsets, attend), leaves)


@pytest.mark.parametrize("longest", [4, 9, 20])
def test_the_silu_form_is_that_of_a_layer_of_hstu(longest: int) -> None:
    """Also where rows are longer than the bias."""
    q, k, v, offsets = drawn()
    layer = HSTULayer(8, 2, longest, 0.0).double()
    torch.nn.init.normal_(layer.distance)
    layer.norm_out, layer.out = torch.nn.Identity(), torch.nn.Identity()

    def attend(*qkv: Tensor) -> Tensor:
        length = qkv[0].shape[2]
        pooled = layer.added(torch.ones(1, length, 8, dtype=torch.float64), qkv[2], qkv[0], qkv[1], torch.arange(length))
        return pooled.unflatten(2, (2, 4)).transpose(1, 2)

    found = jagged_attention(q, k, v, offsets, layer.distance[None], "silu", divisor=longest)
    assert_same_with_gradients(found, by_row(q, k, v, offsets, attend), (q, k, v, layer.distance))


@pytest.mark.parametrize("form", ["softmax", "silu"])
@pytest.mark.parametrize(("mask", "group"), MASKS)
def test_gradients_match_finite_differences(form: str, mask: str, group: int) -> None:
    q, k, v, offsets = drawn([4, 0, 3], 2, 2)
    bias = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    divisor = 1.0 if form == "softmax" else 5.0
    seen = told(offsets, mask)
    assert torch.autograd.gradcheck(lambda *x: jagged_attention(*x[:3], offsets, x[3], form, mask, group, divisor, seen), (q, k, v, bias))


@pytest.mark.parametrize("form", ["softmax", "silu"])
@pytest.mark.parametrize(("mask", "group"), MASKS)
def test_rows_know_nothing_of_each_other(form: str, mask: str, group: int) -> None:
    q, k, v, offsets = drawn()
    rule = {"form": form, "mask": mask, "group": group}
    seen = told(offsets, mask)
    whole = jagged_attention(q, k, v, offsets, **rule, seen=seen)
    alone = jagged_attention(q[6:15], k[6:15], v[6:15], torch.tensor([0, 9]), **rule, seen=None if seen is None else seen[6:15])
    torch.testing.assert_close(whole[6:15], alone)


@pytest.mark.parametrize(("mask", "group"), MASKS)
def test_small_blocks_change_nothing(mask: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, offsets = drawn([7, 5, 0, 11, 2, 10])
    bias = torch.randn(1, 4, dtype=torch.float64).requires_grad_()
    seen = told(offsets, mask)
    whole = jagged_attention(q, k, v, offsets, bias, mask=mask, group=group, seen=seen)
    expected = torch.autograd.grad(whole.square().sum(), (q, k, v, bias))
    monkeypatch.setattr(cpu, "_QUERIES", 3)
    monkeypatch.setattr(cpu, "_PAIRS", 100)
    blocks = jagged_attention(q, k, v, offsets, bias, mask=mask, group=group, seen=seen)
    torch.testing.assert_close(blocks, whole)
    for mine, other in zip(torch.autograd.grad(blocks.square().sum(), (q, k, v, bias)), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("mask_number", [0, 1, 2])
@pytest.mark.parametrize("group", [1, 4])
def test_a_shape_counts_the_pairs_that_see_each_other(mask_number: int, group: int) -> None:
    case = Case(4, 11, 1, 1, 0, mask_number, group, 0, 0)
    prefixes = [torch.tensor(seen, dtype=torch.int64) for seen in case.seen]
    places = [torch.arange(n) for n in case.lengths]
    seen = [visible(place, place, case.mask, group, prefix).sum() for place, prefix in zip(places, prefixes, strict=True)]
    assert case.lengths == [0, 3, 7, 11]
    assert case.pairs == sum(seen)


@pytest.mark.parametrize("form", ["softmax", "silu"])
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_tokens_are_no_error(form: str, offsets: list[int]) -> None:
    q = torch.zeros(0, 2, 3, requires_grad=True)
    bias = torch.zeros(2, 4, requires_grad=True)
    y = jagged_attention(q, q, q, torch.tensor(offsets), bias, form)
    y.sum().backward()
    assert y.shape == (0, 2, 3)
    assert q.grad is not None and q.grad.shape == q.shape
    assert bias.grad is not None and not bias.grad.any()


def test_large_scores_give_finite_values_and_gradients() -> None:
    q, k, v, offsets = drawn()
    y = jagged_attention(1e4 * q, k, v, offsets)
    y.sum().backward()
    assert y.isfinite().all() and q.grad is not None and q.grad.isfinite().all()


def test_wrong_arguments_are_named() -> None:
    q, k, v, offsets = drawn()
    with pytest.raises(ValueError, match=r"q: expected \[S, H, e\] with e at least 1, got \(18, 8\)"):
        jagged_attention(q.flatten(1), k, v, offsets)
    with pytest.raises(ValueError, match=r"v: expected torch.float64 of shape \(18, 2, 4\), as q, got torch.float64 of shape \(17, 2, 4\)"):
        jagged_attention(q, k, v[1:], offsets)
    with pytest.raises(ValueError, match=r"offsets: expected torch.int64 of shape \[B \+ 1\], got torch.int32"):
        jagged_attention(q, k, v, offsets.int())
    with pytest.raises(ValueError, match=r"offsets: expected to ascend from 0 to 18, the tokens of q, got \[0, 6, 5, 18\]"):
        jagged_attention(q, k, v, torch.tensor([0, 6, 5, 18]))
    with pytest.raises(ValueError, match=r"bias: expected torch.float64 of shape \[1 or 2, D\] with D at least 1, got .* \(3, 4\)"):
        jagged_attention(q, k, v, offsets, torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="form: expected one of softmax, silu, got 'relu'"):
        jagged_attention(q, k, v, offsets, form="relu")
    with pytest.raises(ValueError, match="mask: expected one of causal, grouped, prefix, got 'none'"):
        jagged_attention(q, k, v, offsets, mask="none")
    with pytest.raises(ValueError, match="group: expected 1 for the causal mask, got 2"):
        jagged_attention(q, k, v, offsets, group=2)
    with pytest.raises(ValueError, match="group: expected 1 for the prefix mask, got 3"):
        jagged_attention(q, k, v, offsets, mask="prefix", group=3)
    with pytest.raises(ValueError, match="seen: expected one number for each token with the prefix mask"):
        jagged_attention(q, k, v, offsets, mask="prefix")
    with pytest.raises(ValueError, match="seen: expected none with the causal mask"):
        jagged_attention(q, k, v, offsets, seen=torch.zeros(18, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"seen: expected torch.int64 of shape \(18,\), got torch.int32"):
        jagged_attention(q, k, v, offsets, mask="prefix", seen=torch.zeros(18, dtype=torch.int32))
    with pytest.raises(ValueError, match="seen: expected 0 to 1, the tokens before it, for token 7, got 2"):
        jagged_attention(q, k, v, offsets, mask="prefix", seen=torch.tensor([0] * 7 + [2] + [0] * 10))
    with pytest.raises(ValueError, match="group: expected at least 1, got 0"):
        jagged_attention(q, k, v, offsets, mask="grouped", group=0)
    with pytest.raises(ValueError, match="divisor: expected 1 for softmax, got 2"):
        jagged_attention(q, k, v, offsets, divisor=2)
    with pytest.raises(ValueError, match="divisor: expected more than 0, got 0"):
        jagged_attention(q, k, v, offsets, form="silu", divisor=0)
