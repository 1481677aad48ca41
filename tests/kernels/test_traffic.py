# SPDX-License-Identifier: Apache-2.0
"""Bytes counted from launches, against counts by hand."""

import pytest
import torch

from kernels import backend
from kernels.registry import OPS
from kernels.shapes import RECIPES
from kernels.traffic import moved

BY_NAME = {op.name: op for op in OPS}


def test_rms_norm_moves_its_rows_five_times_and_little_else() -> None:
    rows = 4096 * 64 * 2
    weight, scale, partial = 2 * 64, 4 * 4096, 128 * 64 * 4  # of 128 programs; what stands in between is written and read
    assert moved(BY_NAME["rms_norm"], (4096, 64), torch.bfloat16) == 5 * rows + 2 * weight + 2 * scale + 2 * partial


def test_what_is_read_in_part_counts_in_part() -> None:
    """One row of four heads, whose query reads 96 of 1,024 keys."""
    query, keys, slots, offsets, scores = 4 * 16 * 2, 96 * 16 * 2, 96 * 8, 2 * 8, 4 * 96 * 2
    tiles = 2 * 16  # which part of which row a program has; written and read
    assert moved(BY_NAME["paged_scores"], (4, 1, 16, 1024, 96), torch.bfloat16) == query + keys + slots + offsets + scores + tiles


def test_every_op_moves_at_least_what_it_must() -> None:
    for op in OPS:
        shape = RECIPES[op.name][0]
        work = op.work(shape, torch.float32)
        assert moved(op, shape, torch.float32) >= 0.9 * (work.read + work.written), op.name


def test_interpreted_kernels_are_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        moved(BY_NAME["rms_norm"], (4, 4), torch.float32)
