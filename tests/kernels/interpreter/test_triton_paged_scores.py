# SPDX-License-Identifier: Apache-2.0
"""Paged scores in Triton's interpreter: slots that name nothing, 32-bit slots, a pool that is a view."""

import torch

from kernels import backend
from kernels.paged_scores import OP, paged_scores


def test_slots_that_name_nothing_score_minus_infinity_in_any_layout() -> None:
    q, pages, slots, offsets, _ = OP.inputs((4, 2, 5, 63, 40, 0, 7), torch.float32, torch.Generator().manual_seed(0))
    slots[3] = -1
    expected = paged_scores(q, pages, slots, offsets)
    turned = pages.transpose(0, 1).contiguous().transpose(0, 1)
    with backend.use("triton"):
        found = paged_scores(q, pages, slots, offsets)
        assert torch.equal(paged_scores(q, turned, slots.int(), offsets.int()), found)
        slots[45] = 63
        beyond = paged_scores(q, pages, slots, offsets)
    torch.testing.assert_close(found, expected)
    assert bool((found[:, 3] == -torch.inf).all()) and bool((beyond[:, 45] == -torch.inf).all())


def test_no_rows_and_no_slots() -> None:
    q, pages, slots, offsets, _ = OP.inputs((4, 2, 5, 63, 0, 0), torch.float32, torch.Generator().manual_seed(0))
    with backend.use("triton"):
        assert paged_scores(q, pages, slots, offsets).shape == (4, 0)
        assert paged_scores(q[:0], pages, slots, offsets[:1]).shape == (4, 0)
