# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import pytest
import torch

from benchmarks.frame import Check, Ratio
from benchmarks.token_efficiency import pruning_choices, pruning_inside
from benchmarks.token_efficiency.pruning_needles import NOISE, QUERY, Reader, Sizes, needles, seeded
from benchmarks.token_efficiency.rows import Row, table
from recsys.efficiency.pruning.cacovid import GroupedSubsetSampler
from recsys.efficiency.pruning.transprune import plan
from recsys.efficiency.selection import RowSelection

TINY = Sizes(length=12, dim=16, heads=2, batch=4, steps=2, tuning=2, tested=32)
BOUNDS = {
    "transprune_flops": (None, 0.5),
    "adaptive_sparse_macs": (None, 0.7),
    "core_matching_decode": (1.8, None),
    "kcenter_radius": (None, 0.5),
    "idpruner_frontier": (1.0, None),
    "cacovid_samples": (None, 0.999),
    "quota_relevant_share": (1.001, None),
}


@pytest.fixture(scope="module")
def found() -> list[tuple[Row, Check]]:
    """Everything once, with models that were hardly trained, and no time taken."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pruning_inside, pruning_choices):
            patch.setattr(module, "beside", lambda dense, ours: Ratio(1.0, 1.0, 1.0, 5))
        patch.setattr(pruning_inside, "published_size", partial(pruning_inside.published_size, 48, 30))
        return pruning_inside.measure(range(1), TINY) + pruning_choices.measure(range(1), range(1), at_most=1)


def test_every_check_is_there_with_its_bound_and_a_value(found: list[tuple[Row, Check]]) -> None:
    assert {check.name: (check.at_least, check.at_most) for _, check in found} == BOUNDS
    assert all(math.isfinite(check.value) and check.note for _, check in found)


def test_every_row_is_told(found: list[tuple[Row, Check]]) -> None:
    rows = [table(row) for row, _ in found]
    assert [row["module"] for row in rows] == ["transprune", "adaptive_sparse", "core_matching", "todre", "idpruner", "cacovid", "quota"]
    assert all(row["setting"] and row["saved"] and row["paper"] and row["quality"] for row in rows)


@pytest.mark.parametrize(("length", "dim", "depth", "rows", "local"), [(12, 16, 8, 3, 3), (40, 8, 4, 1, 0), (65, 16, 12, 2, 5)])
def test_the_readers_formulas_are_what_is_executed(length: int, dim: int, depth: int, rows: int, local: int) -> None:
    model, items = Reader(Sizes(length=length, dim=dim, heads=2), depth, local).eval(), needles(rows, length, seeded(0))[0]
    scaled = plan(depth)
    assert pruning_inside.macs(lambda: model(items)) == pruning_inside.dense_macs(length, dim, depth, rows, local)
    assert pruning_inside.macs(lambda: pruning_inside.pruned_answer(model, items, scaled)) == pruning_inside.pruned_macs(
        length, dim, scaled, rows, local
    )


def test_the_dense_encoders_formula_is_what_is_executed() -> None:
    dense, sparse, view = pruning_inside.published_size(48, 30)
    assert pruning_inside.macs(lambda: dense(view)) == pruning_inside.sparse_macs([31] * 12, 48)
    assert pruning_inside.macs(lambda: sparse(view)) < pruning_inside.macs(lambda: dense(view))


def test_where_quality_is_missed_only_the_dense_model_counts() -> None:
    assert pruning_inside.at_quality(0.4, 0.995) == 0.4 and pruning_inside.at_quality(0.4, 0.98) == 1.0


def test_a_history_holds_one_needle_and_its_label() -> None:
    items, label, place = needles(50, 12, seeded(3))
    there = (items >= NOISE) & (items < QUERY)
    assert there.sum(1).eq(1).all() and there[torch.arange(50), place].all() and items[:, -1].eq(QUERY).all()
    assert torch.equal(items[there] - NOISE, label)


def test_a_reader_sees_nothing_later_and_pruning_keeps_its_last_token() -> None:
    model = Reader(TINY, 8, 2).eval()
    items = needles(4, TINY.length, seeded(0))[0]
    changed = items.clone()
    changed[:, -1] = 0
    before, after = (model.read(own).view(4, TINY.length, -1) for own in (items, changed))
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    whole = plan(8)
    kept = pruning_inside.pruned_answer(model, items, type(whole)(whole.layers, dict.fromkeys(whole.keep, 1.0), 8))
    torch.testing.assert_close(kept, model(items))


def test_with_all_neurons_nothing_is_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = Reader(TINY, 3).eval(), needles(4, TINY.length, seeded(0))[0]
    assert not torch.allclose(pruning_inside.sliced_answer(model, items), model(items), atol=1e-6)
    monkeypatch.setattr(pruning_inside, "BETA", 1.0)
    torch.testing.assert_close(pruning_inside.sliced_answer(model, items), model(items))


def test_the_future_is_covered_where_every_event_is_kept() -> None:
    drawn = pruning_choices.tastes(0, rows=3)
    everything, nothing = (
        RowSelection.of_mask(torch.full((3 * pruning_choices.EVENTS,), kept), drawn.view.offsets) for kept in (True, False)
    )
    assert 0.95 < pruning_choices.covered(drawn, everything) <= 1.0 and pruning_choices.covered(drawn, nothing) == 0.0


def test_evaluations_are_counted_up_to_the_limit() -> None:
    total, recall, similarity = pruning_choices.evaluations(GroupedSubsetSampler(), 0, 2)
    assert total in (64, 128) and 0.0 <= recall <= 1.0 and similarity < 0.5
