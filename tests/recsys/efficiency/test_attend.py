# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend, sparse_attend
from recsys.efficiency.selection import BlockSelection

CLOSE = {"atol": 1e-10, "rtol": 0.0}


def inputs(batch: int = 2, heads: int = 4, key_heads: int = 2, queries: int = 6, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, queries, 5), (batch, key_heads, keys, 5), (batch, key_heads, keys, 3))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask_bhtn: Tensor, scale: float | None = None) -> Tensor:
    """Masked dense attention, spelled out; zeros for a query that reads nothing."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    logits = (q @ k.transpose(2, 3)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    mask = mask_bhtn.expand(logits.shape)
    weights = torch.where(mask, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)) @ v


def token_mask(selection: BlockSelection, heads: int, queries: int, keys: int) -> Tensor:
    """bool [B, H, T, N] of a choice for groups and blocks."""
    mask = selection.mask(keys)
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    return mask.repeat_interleave(-(-queries // mask.shape[2]), 2)[:, :, :queries]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_against_masked_dense_attention(groups: int, blocks: int, causal: bool, density: float):
    q, k, v = inputs(queries=7)
    keep = torch.rand(2, groups, blocks, 9, generator=torch.Generator().manual_seed(1)) < density
    if -(-7 // -(-7 // blocks)) != blocks:
        pytest.fail("a number of blocks that cannot be")
    selection = BlockSelection.of_mask(keep)
    positions = torch.arange(2, 9) if causal else None
    mask = token_mask(selection, 4, 7, 9)
    if positions is not None:
        mask = mask & (torch.arange(9) <= positions[:, None])
    torch.testing.assert_close(sparse_attend(q, k, v, selection, query_positions=positions), by_hand(q, k, v, mask), **CLOSE)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_keys_are_dense_attention(key_heads: int, batch: int):
    q, k, v = inputs(batch=batch, key_heads=key_heads)
    everything = torch.ones(1, dtype=torch.bool).expand(1, 1, 9)
    for groups in {1, key_heads, 4}:
        for blocks in (1, 2, 3, 6):
            selection = BlockSelection.of_mask(everything.expand(batch, groups, blocks, 9))
            torch.testing.assert_close(sparse_attend(q, k, v, selection), dense_attend(q, k, v), **CLOSE)
            torch.testing.assert_close(sparse_attend(q, k, v, selection), by_hand(q, k, v, torch.ones(1, 1, 1, 9).bool()), **CLOSE)


def test_causal_on_all_keys_is_causal_dense_attention():
    q, k, v = inputs(queries=9)
    selection = BlockSelection.of_mask(torch.ones(2, 1, 3, 9, dtype=torch.bool))
    place = torch.arange(9)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse_attend(q, k, v, selection, query_positions=place), wanted, **CLOSE)
    torch.testing.assert_close(dense_attend(q, k, v, query_positions=place), wanted, **CLOSE)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_scale_is_used(scale: float):
    q, k, v = inputs()
    keep = torch.rand(2, 2, 3, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    selection = BlockSelection.of_mask(keep)
    mask = token_mask(selection, 4, 6, 9)
    torch.testing.assert_close(sparse_attend(q, k, v, selection, scale=scale), by_hand(q, k, v, mask, scale), **CLOSE)
    torch.testing.assert_close(dense_attend(q, k, v, scale=scale), by_hand(q, k, v, torch.ones(1, 1, 1, 9).bool(), scale), **CLOSE)


def test_order_of_the_choice_and_what_is_invalid_make_no_difference():
    q, k, v = inputs()
    index = torch.tensor([5, 2, 7, 8, 0, 3], dtype=torch.int32).expand(2, 1, 2, 6)
    valid = torch.tensor([True, True, False, True, False, True]).expand(2, 1, 2, 6)
    found = sparse_attend(q, k, v, BlockSelection(index, valid))
    plain = sparse_attend(
        q, k, v, BlockSelection(torch.tensor([2, 3, 5, 8], dtype=torch.int32).expand(2, 1, 2, 4), valid.new_ones(2, 1, 2, 4))
    )
    torch.testing.assert_close(found, plain, **CLOSE)
    changed = v.clone()
    changed[:, :, [0, 7]] = 1e6
    torch.testing.assert_close(sparse_attend(q, k, changed, BlockSelection(index, valid)), plain, **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_reads_nothing_gets_zeros_and_gives_no_nan(causal: bool):
    q, k, v = (x.requires_grad_() for x in inputs())
    keep = torch.rand(2, 2, 6, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    keep[0, :, 2] = False
    keep[..., 0] = False
    selection = BlockSelection.of_mask(keep)
    positions = torch.tensor([0, 2, 4, 5, 6, 8]) if causal else None  # the first query may read key 0 alone, which is not chosen
    found = sparse_attend(q, k, v, selection, query_positions=positions)
    assert bool((found[0, :, 2] == 0).all())
    assert not causal or bool((found[:, :, 0] == 0).all())
    found.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and bool(x.grad.isfinite().all())
    assert bool((q.grad[0, :, 2] == 0).all())


def test_no_key_at_all():
    q, k, v = inputs()
    nothing = BlockSelection.of_mask(torch.zeros(2, 1, 1, 9, dtype=torch.bool))
    assert nothing.index.shape[-1] == 0
    assert bool((sparse_attend(q, k, v, nothing) == 0).all()) and sparse_attend(q, k, v, nothing).shape == (2, 4, 6, 3)
    empty = BlockSelection.of_mask(torch.zeros(2, 1, 1, 0, dtype=torch.bool))
    assert bool((sparse_attend(q, k[:, :, :0], v[:, :, :0], empty) == 0).all())
    assert bool((dense_attend(q, k[:, :, :0], v[:, :, :0]) == 0).all())


def test_no_key_at_all_has_a_gradient_of_zero():
    q, k, v = (x.requires_grad_() for x in inputs())
    found = sparse_attend(q, k, v, BlockSelection.of_mask(torch.zeros(2, 1, 1, 9, dtype=torch.bool)))
    grads = torch.autograd.grad(found.sum(), (q, k, v), allow_unused=True)
    assert all(grad is None or bool((grad == 0).all()) for grad in grads)


def test_an_empty_batch():
    q, k, v = inputs(batch=0)
    for blocks in (1, 3):
        selection = BlockSelection(torch.zeros(0, 1, blocks, 2, dtype=torch.int32), torch.ones(0, 1, blocks, 2, dtype=torch.bool))
        assert sparse_attend(q, k, v, selection).shape == (0, 4, 6, 3)
        assert sparse_attend(q, k, v, selection, query_positions=torch.arange(6)).shape == (0, 4, 6, 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(groups: int, causal: bool):
    q, k, v = (x[:, :, :4].clone().requires_grad_() for x in inputs(batch=2, keys=5))
    keep = torch.rand(2, groups, 2, 4, generator=torch.Generator().manual_seed(4)) < 0.6
    selection = BlockSelection.of_mask(keep)
    positions = torch.arange(4) if causal else None
    assert torch.autograd.gradcheck(lambda q, k, v: sparse_attend(q, k, v, selection, query_positions=positions), (q, k, v))


def test_keys_that_are_not_read_get_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs())
    keep = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    keep[..., [1, 4]] = True
    sparse_attend(q, k, v, BlockSelection.of_mask(keep)).square().sum().backward()
    touched = k.grad.abs().sum((0, 1, 3)) > 0
    assert touched.nonzero()[:, 0].tolist() == [1, 4]


def test_inputs_that_are_not_contiguous():
    q, k, v = inputs()
    keep = torch.rand(2, 2, 3, 9, generator=torch.Generator().manual_seed(5)) < 0.5
    selection = BlockSelection.of_mask(keep)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(sparse_attend(*turned, selection), sparse_attend(q, k, v, selection), **CLOSE)


def test_a_row_does_not_depend_on_its_batch_mates():
    q, k, v = inputs(batch=3)
    keep = torch.rand(3, 2, 3, 9, generator=torch.Generator().manual_seed(6)) < 0.5
    whole = sparse_attend(q, k, v, BlockSelection.of_mask(keep), query_positions=torch.arange(3, 9))
    for b in range(3):
        alone = BlockSelection.of_mask(keep[b : b + 1])
        one = sparse_attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], alone, query_positions=torch.arange(3, 9))
        torch.testing.assert_close(whole[b : b + 1], one, **CLOSE)


def test_a_later_key_has_no_influence():
    q, k, v = inputs(queries=9)
    selection = BlockSelection.of_mask(torch.ones(2, 1, 3, 9, dtype=torch.bool))
    before = sparse_attend(q, k, v, selection, query_positions=torch.arange(9))
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 5:], v2[:, :, 5:] = 100.0, -100.0
    after = sparse_attend(q, k2, v2, selection, query_positions=torch.arange(9))
    torch.testing.assert_close(before[:, :, :5], after[:, :, :5], **CLOSE)
    assert not torch.allclose(before[:, :, 5:], after[:, :, 5:])


@pytest.mark.parametrize("lengths", [[9, 4], [0, 9], [3, 3]])
@pytest.mark.parametrize("positions", [None, [1, 2, 4, 5, 6, 8]])
def test_dense_attention_of_padded_rows(lengths: list[int], positions: list[int] | None):
    q, k, v = inputs()
    mask = torch.arange(9) < torch.tensor(lengths)[:, None, None, None]
    places = None if positions is None else torch.tensor(positions)
    if places is not None:
        mask = mask & (torch.arange(9) <= places[:, None])
    found = dense_attend(q, k, v, query_positions=places, lengths=torch.tensor(lengths))
    torch.testing.assert_close(found, by_hand(q, k, v, mask), **CLOSE)


@pytest.mark.parametrize(
    ("groups", "blocks", "text"), [(3, 1, "1, 2 or 4 groups"), (1, 0, "1 to 6 blocks"), (1, 7, "1 to 6"), (1, 4, "equal size")]
)
def test_what_does_not_fit_is_named(groups: int, blocks: int, text: str):
    q, k, v = inputs()
    selection = BlockSelection(torch.zeros(2, groups, blocks, 1, dtype=torch.int32), torch.ones(2, groups, blocks, 1, dtype=torch.bool))
    with pytest.raises(ConfigError, match=text):
        sparse_attend(q, k, v, selection)


def test_heads_that_do_not_divide_are_named():
    q, k, v = inputs(heads=3)
    with pytest.raises(ConfigError, match="3 heads over 2 key heads"):
        sparse_attend(q, k, v, BlockSelection(torch.zeros(2, 1, 1, 1, dtype=torch.int32), torch.ones(2, 1, 1, 1, dtype=torch.bool)))


def test_a_choice_for_another_batch_is_named():
    q, k, v = inputs()
    with pytest.raises(ConfigError, match="selection"):
        sparse_attend(q, k, v, BlockSelection(torch.zeros(3, 1, 1, 1, dtype=torch.int32), torch.ones(3, 1, 1, 1, dtype=torch.bool)))
