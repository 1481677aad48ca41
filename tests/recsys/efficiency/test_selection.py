# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from recsys.core.errors import DataError
from recsys.efficiency.selection import BlockSelection, Merge, RowSelection
from recsys.efficiency.view import TokenView, offsets_of, row_of


def view(lengths: list[int], **others: torch.Tensor | None) -> TokenView:
    values = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TokenView.of(values, offsets_of(torch.tensor(lengths, dtype=torch.long)), **others)


def some(source: torch.Tensor, seed: int, share: float = 0.6) -> RowSelection:
    """A random choice among tokens with these offsets."""
    return RowSelection.of_mask(torch.rand(int(source[-1]), generator=torch.Generator().manual_seed(seed)) < share, source)


def merging(source: torch.Tensor, seed: int) -> RowSelection:
    """A random choice in which each token goes, by a random share, into a kept one of its row, or into none."""
    generator = torch.Generator().manual_seed(seed)
    chosen = some(source, seed)
    rows, kept_rows = row_of(source), row_of(chosen.offsets)
    into = torch.full((len(rows),), -1)
    into[chosen.index] = torch.arange(len(chosen.index))
    for s in range(len(rows)):
        places = (kept_rows == rows[s]).nonzero()[:, 0]
        if int(into[s]) < 0 and len(places) and float(torch.rand(1, generator=generator)) < 0.8:
            into[s] = places[int(torch.randint(len(places), (1,), generator=generator))]
    raw = torch.rand(len(rows), generator=generator, dtype=torch.float64) + 0.1
    used = into >= 0
    whole = torch.zeros(len(chosen.index), dtype=torch.float64).index_add(0, into[used], raw[used])
    weights = torch.where(used, raw / whole[into.clamp(min=0)] if len(whole) else raw, 0.0)
    return RowSelection(chosen.index, chosen.offsets, source, Merge(into, weights))


def same(a: RowSelection, b: RowSelection) -> None:
    assert torch.equal(a.index, b.index) and torch.equal(a.offsets, b.offsets) and torch.equal(a.source, b.source)
    assert (a.merge is None) == (b.merge is None)
    if a.merge is not None and b.merge is not None:
        assert torch.equal(a.merge.into, b.merge.into)
        torch.testing.assert_close(a.merge.weights, b.merge.weights, atol=1e-12, rtol=0)


LENGTHS = [4, 0, 7, 1, 3]


def test_of_mask_against_a_loop():
    source = offsets_of(torch.tensor(LENGTHS))
    keep = torch.rand(15, generator=torch.Generator().manual_seed(5)) < 0.5
    chosen = RowSelection.of_mask(keep, source)
    assert chosen.index.tolist() == [s for s in range(15) if bool(keep[s])]
    assert chosen.lengths.tolist() == [int(keep[source[b] : source[b + 1]].sum()) for b in range(5)]
    assert torch.equal(chosen.mask(), keep) and chosen.size == 15


def test_all_is_the_unit():
    made = view(LENGTHS)
    unit = RowSelection.all(made)
    assert torch.equal(unit.gather(made.values), made.values)
    assert torch.equal(unit.scatter(made.values), made.values)
    for chosen in (some(made.offsets, 1), merging(made.offsets, 2)):
        composed = unit.compose(chosen)
        assert torch.equal(composed.gather(made.values), chosen.gather(made.values))
        after = chosen.compose(RowSelection(torch.arange(len(chosen.index)), chosen.offsets, chosen.offsets))
        same(after, chosen)
        same(composed, chosen)


@pytest.mark.parametrize("kinds", [("p", "p", "p"), ("m", "p", "p"), ("p", "m", "p"), ("p", "p", "m"), ("m", "m", "m"), ("m", "p", "m")])
@pytest.mark.parametrize("seed", range(4))
def test_compose_is_sequential_and_associative(kinds: tuple[str, str, str], seed: int):
    made = view(LENGTHS)
    source, steps = made.offsets, []
    for number, kind in enumerate(kinds):
        steps.append((some if kind == "p" else merging)(source, 10 * seed + number))
        source = steps[-1].offsets
    a, b, c = steps
    x = made.values
    in_turn = c.gather(b.gather(a.gather(x)))
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    same(left, right)
    torch.testing.assert_close(left.gather(x), in_turn, atol=1e-12, rtol=0)
    assert torch.equal(left.mask().nonzero()[:, 0], a.index[b.index][c.index])


def test_shares_of_composed_merges_sum_to_one():
    made = view(LENGTHS)
    first = merging(made.offsets, 1)
    composed = first.compose(merging(first.offsets, 2))
    assert composed.merge is not None
    used = composed.merge.into >= 0
    sums = torch.zeros(len(composed.index), dtype=torch.float64).index_add(0, composed.merge.into[used], composed.merge.weights[used])
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert bool((composed.merge.weights[~used] == 0).all())
    ones = torch.ones(15, 2, dtype=torch.float64)
    torch.testing.assert_close(composed.gather(ones), torch.ones(len(composed.index), 2, dtype=torch.float64))


def test_compose_where_nothing_is_kept_in_between():
    made = view([2, 3])
    none = RowSelection.of_mask(torch.zeros(5, dtype=torch.bool), made.offsets)
    empty = torch.zeros(0, dtype=torch.long)
    then = RowSelection(empty, none.offsets, none.offsets, Merge(empty, torch.zeros(0)))
    composed = none.compose(then)
    assert composed.gather(made.values).shape == (0, 3)
    assert composed.merge is not None and composed.merge.into.tolist() == [-1] * 5


def test_compose_refuses_another_choice():
    source = offsets_of(torch.tensor(LENGTHS))
    chosen = some(source, 1)
    with pytest.raises(DataError, match=f"the {len(chosen.index)} kept tokens, got one among 15"):
        chosen.compose(some(source, 2))


def test_gather_of_a_merge_against_a_loop():
    made = view(LENGTHS)
    chosen = merging(made.offsets, 3)
    assert chosen.merge is not None
    wanted = torch.zeros(len(chosen.index), 3, dtype=torch.float64)
    for s in range(15):
        if int(chosen.merge.into[s]) >= 0:
            wanted[int(chosen.merge.into[s])] += float(chosen.merge.weights[s]) * made.values[s]
    torch.testing.assert_close(chosen.gather(made.values), wanted)
    assert chosen.gather(made.values.float()).dtype == torch.float32


def test_gradients_of_gather_and_scatter():
    source = offsets_of(torch.tensor(LENGTHS))
    x = torch.randn(15, 2, dtype=torch.float64, requires_grad=True)
    for chosen in (some(source, 1), merging(source, 2), some(source, 1, share=0.0)):
        assert torch.autograd.gradcheck(lambda v, c=chosen: c.scatter(c.gather(v), 1.0).square() + 0 * v, (x,))


def test_gradient_reaches_the_weights_of_a_merge():
    source = offsets_of(torch.tensor([3]))
    x = torch.randn(3, 2, dtype=torch.float64)
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def gathered(w: torch.Tensor) -> torch.Tensor:
        return RowSelection(torch.tensor([1]), torch.tensor([0, 1]), source, Merge(torch.zeros(3, dtype=torch.long), w)).gather(x)

    assert torch.autograd.gradcheck(gathered, (weights,))


def test_scatter_fills_what_was_dropped():
    chosen = RowSelection.of_mask(torch.tensor([True, False, True, False]), torch.tensor([0, 2, 4]))
    assert chosen.scatter(torch.tensor([1.0, 2.0]), fill=-9.0).tolist() == [1.0, -9.0, 2.0, -9.0]


def test_a_view_of_what_is_kept():
    made = view(LENGTHS, groups=torch.arange(15), protected=torch.arange(15) % 2 == 0, context=torch.zeros(5, 1, 3))
    chosen = some(made.offsets, 4)
    kept = chosen.view(made)
    assert torch.equal(kept.positions, made.positions[chosen.index]) and torch.equal(kept.groups, chosen.index)
    assert torch.equal(kept.protected, chosen.index % 2 == 0) and kept.context is made.context
    assert torch.equal(kept.rows, made.rows[chosen.index])


def test_expanded_keeps_whole_groups():
    made = view([4, 3], groups=torch.tensor([0, 0, 1, 2, 2, 2, 3]))
    units, unit = made.units()
    chosen = RowSelection.of_mask(torch.tensor([True, False, True, False, True]), units.offsets).expanded(unit, made.offsets)
    assert chosen.mask().tolist() == [True, True, False, True, False, False, True]
    assert chosen.lengths.tolist() == [3, 1]


def test_expanded_refuses_merges():
    chosen = merging(torch.tensor([0, 4]), 1)
    with pytest.raises(DataError, match="merged"):
        chosen.expanded(torch.arange(4), torch.tensor([0, 4]))


def test_overlap_and_recall_against_sets():
    source = offsets_of(torch.tensor(LENGTHS))
    a, b = some(source, 1, 0.5), some(source, 2, 0.5)
    weights = torch.rand(15, generator=torch.Generator().manual_seed(9))
    iou, recall = a.iou(b), a.recall(weights)
    for row in range(5):
        inside = set(range(int(source[row]), int(source[row + 1])))
        ours, theirs = set(a.index.tolist()) & inside, set(b.index.tolist()) & inside
        assert float(iou[row]) == pytest.approx(len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0)
        whole = float(weights[sorted(inside)].double().sum())
        assert float(recall[row]) == pytest.approx(float(weights[sorted(ours)].double().sum()) / whole if whole else 1.0)
    assert bool((a.iou(a) == 1).all())


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_to_choose_from(lengths: list[int]):
    made = view(lengths)
    chosen = RowSelection.all(made)
    assert chosen.compose(RowSelection.all(made)).gather(made.values).shape == (0, 3)
    assert chosen.iou(chosen).tolist() == [1.0] * len(lengths)
    assert chosen.recall(torch.zeros(0)).tolist() == [1.0] * len(lengths)
    assert chosen.scatter(made.values).shape == (0, 3)
    assert chosen.broadcast().index.shape == (len(lengths), 1, 1, 0)


def test_broadcast_counts_from_each_rows_begin():
    source = offsets_of(torch.tensor(LENGTHS))
    chosen = some(source, 3)
    block = chosen.broadcast()
    mask = block.mask(7)
    for row in range(5):
        inside = chosen.mask()[source[row] : source[row + 1]]
        assert mask[row, 0, 0, : LENGTHS[row]].tolist() == inside.tolist()
        assert not bool(mask[row, 0, 0, LENGTHS[row] :].any())


def test_blocks_of_a_mask_and_back():
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0, 0, 0] = False
    keep[1, 2, 3] = True
    block = BlockSelection.of_mask(keep)
    assert torch.equal(block.mask(9), keep) and block.index.dtype == torch.int32 and block.index.shape[-1] == 9
    for b, g, q in [(0, 1, 2), (1, 0, 0)]:
        assert block.index[b, g, q][block.valid[b, g, q]].tolist() == keep[b, g, q].nonzero()[:, 0].tolist()
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    back = BlockSelection(block.index[..., shuffled], block.valid[..., shuffled]).sorted()
    assert torch.equal(back.mask(9), keep)
    first = back.index.masked_fill(~back.valid, 99)
    assert bool((first[..., 1:] >= first[..., :-1]).all())


def test_invalid_entries_do_not_count():
    block = BlockSelection(torch.tensor([[[[0, 3, 3, 5]]]], dtype=torch.int32), torch.tensor([[[[False, True, False, False]]]]))
    assert block.mask(6)[0, 0, 0].tolist() == [False, False, False, True, False, False]
    assert float(block.recall(torch.full((1, 1, 1, 6), 0.5))) == pytest.approx(1 / 6)


def test_overlap_and_recall_of_blocks():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 2, 3, 8, generator=generator) < 0.5 for _ in range(2))
    a[0, 0, 0], b[0, 0, 0] = False, False
    weights = torch.rand(2, 2, 3, 8, generator=generator)
    weights[1, 1, 1] = 0
    iou = BlockSelection.of_mask(a).iou(BlockSelection.of_mask(b), 8)
    either = (a | b).sum(-1)
    torch.testing.assert_close(iou, torch.where(either > 0, (a & b).sum(-1) / either, 1.0))
    recall = BlockSelection.of_mask(a).recall(weights)
    torch.testing.assert_close(recall[0, 1], (weights * a)[0, 1].sum(-1) / weights[0, 1].sum(-1))
    assert float(recall[1, 1, 1]) == 1.0


def test_blocks_need_four_axes():
    with pytest.raises(DataError, match=r"\[B, G, Q, K\]"):
        BlockSelection(torch.zeros(1, 1, 2, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.bool))
    with pytest.raises(DataError, match=r"\[B, G, Q, K\]"):
        BlockSelection(torch.zeros(1, 1, 1, 2, dtype=torch.int32), torch.ones(1, 1, 1, 3, dtype=torch.bool))
