# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from recsys.efficiency.attend import dense_attend, sparse_attend
from recsys.efficiency.cost import Cost
from recsys.efficiency.selection import BlockSelection


def qkv(keys: int = 10, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(2, 3, 8, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, 4)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def test_products_are_counted():
    with Cost() as cost:
        nn.Linear(6, 5)(torch.randn(7, 6))
        torch.randn(2, 3, 4) @ torch.randn(2, 4, 5)
    assert cost.macs == 7 * 6 * 5 + 2 * 3 * 4 * 5 and cost.gathered_bytes == 0


def test_nothing_costs_nothing():
    with Cost() as cost:
        torch.randn(3).exp()
    assert (cost.macs, cost.gathered_bytes, cost.calls) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_counted_by_pairs(dtype: torch.dtype):
    q, k, v = qkv(dtype=dtype)
    with Cost() as cost:
        dense_attend(q, k, v)
    assert cost.macs == 2 * 3 * 8 * 10 * (4 + 4)


def test_causal_attention_counts_the_lower_half():
    q, k, v = qkv(8)
    with Cost() as cost:
        dense_attend(q, k, v, query_positions=torch.arange(8))
    assert cost.macs == 2 * 3 * (8 * 9 // 2) * (4 + 4)


def test_masked_attention_counts_all_pairs():
    q, k, v = qkv()
    with Cost() as cost:
        dense_attend(q, k, v, lengths=torch.tensor([3, 10]))
    assert cost.macs == 2 * 3 * 8 * 10 * (4 + 4)


def test_sparse_attention_counts_what_is_read_and_what_is_gathered():
    q, k, v = qkv()
    keep = torch.zeros(2, 1, 2, 10, dtype=torch.bool)
    keep[..., [1, 4, 7]] = True
    with Cost() as cost:
        sparse_attend(q, k, v, BlockSelection.of_mask(keep))
    assert cost.macs == 2 * 3 * 8 * 3 * (4 + 4)
    assert cost.gathered_bytes == 2 * (2 * 3 * 2 * 3 * 4) * 4 + keep[..., :3].numel()


def test_gathers_are_counted_in_bytes_of_their_results():
    table, index = torch.randn(9, 4), torch.tensor([1, 2, 2])
    with Cost() as cost:
        table[index]
    assert cost.gathered_bytes == 3 * 4 * 4
    with Cost() as cost:
        table.double().index_select(0, index)
        torch.nn.functional.embedding(index, table)
        table.gather(0, index[:, None])
    assert cost.gathered_bytes == 3 * 4 * 8 + 3 * 4 * 4 + 3 * 4


def test_costs_add_up_and_calls_are_counted():
    layer = nn.Linear(6, 5)
    cost = Cost()
    watched = cost.watch(layer)
    with cost:
        for _ in range(3):
            watched(torch.randn(7, 6))
    assert cost.calls == 3 and cost.macs == 3 * 7 * 6 * 5


def test_counting_changes_no_result():
    q, k, v = qkv()
    plain = dense_attend(q, k, v)
    with Cost():
        counted = dense_attend(q, k, v)
    assert torch.equal(plain, counted)


def test_a_backward_pass_of_attention_counts_too():
    q, k, v = (x.requires_grad_() for x in qkv())
    with Cost() as forward:
        out = dense_attend(q, k, v).sum()
    with Cost() as backward:
        out.backward()
    assert backward.macs >= forward.macs > 0
