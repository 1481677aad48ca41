# SPDX-License-Identifier: Apache-2.0
"""The best items of a catalogue in Triton's interpreter: the bits of the CPU's, with masks, ties, several tiles and parts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.gather_topk import best_items, triton_ops


@pytest.fixture(autouse=True)
def unwritten_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *sizes, **options) -> Tensor:
        made = new_empty(self, *sizes, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 0x6BADBEEF)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def drawn(users: int, slots: int, codes: int, items: int) -> list[Tensor]:
    """Normal numbers, whose sums are of the CPU's order of addition; the first user may get every row."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(users, slots, codes, generator=random)
    values[torch.rand(values.shape, generator=random) < 0.1] = -torch.inf
    table = torch.randint(0, codes, (items, slots), generator=random)
    rows = (torch.rand(items, generator=random) < 0.7).nonzero()[:, 0]
    dropped = torch.rand(users, items, generator=random) < 0.4
    dropped[:1] = False
    user, excluded = dropped.nonzero(as_tuple=True)
    return [values, table, rows, torch.searchsorted(user, torch.arange(users + 1)), excluded]


def hold_equal_to_the_cpu(tensors: list[Tensor | None], k: int) -> None:
    expected = best_items(*tensors, k)
    with backend.use("triton"):
        found = best_items(*tensors, k)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


@pytest.mark.parametrize("programs", [1, 7])
def test_equals_the_cpu_in_one_part_and_in_several(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "PROGRAMS", programs)
    hold_equal_to_the_cpu(drawn(2, 3, 5, 150), 9)


def test_masks_may_be_left_out_and_lists_longer_than_the_catalogue() -> None:
    tensors = drawn(2, 3, 5, 30)
    hold_equal_to_the_cpu([*tensors[:2], None, *tensors[3:]], 33)
    hold_equal_to_the_cpu([*tensors[:3], None, None], 33)


def test_nan_is_no_score_and_minus_zero_is_zero() -> None:
    values = torch.tensor([[[-torch.inf, torch.nan, -0.0, 0.0, torch.inf, -1.0]]])
    hold_equal_to_the_cpu([values, torch.arange(6)[:, None], None, None, None], 6)


def test_no_users_no_items_and_no_rows() -> None:
    hold_equal_to_the_cpu(drawn(0, 2, 3, 5), 2)
    hold_equal_to_the_cpu(drawn(2, 2, 3, 0), 2)
    values, table, *_ = drawn(2, 2, 3, 5)
    hold_equal_to_the_cpu([values, table, torch.zeros(0, dtype=torch.int64), None, None], 2)


def test_longer_lists_than_fit_take_another_way() -> None:
    tensors = drawn(1, 2, 3, 40)
    assert triton_ops.supports(tensors[0], 1024) and not triton_ops.supports(tensors[0], 1025)
    hold_equal_to_the_cpu(tensors, 1025)
