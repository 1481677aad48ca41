# SPDX-License-Identifier: Apache-2.0
"""Int8 pooling against FBGEMM's quantiser and torch's embedding bag, and what it does with empty bags and wrong rows."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.int8_pooling import int8_pooling, reference


def quantised(weight: Tensor) -> Tensor:
    import fbgemm_gpu  # noqa: F401

    stored = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight, 8)
    return torch.cat((stored[:, -4:], stored[:, :-4]), 1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_is_an_embedding_bag_of_the_dequantised_table(index: torch.dtype) -> None:
    rows = quantised(drawn(40, 24))
    to_float = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat
    table = to_float(torch.cat((rows[:, 4:], rows[:, :4]), 1), 8)
    torch.testing.assert_close(reference.dequantised(rows).float(), table)
    values = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(1)).to(index)
    offsets = torch.tensor([0, 0, 4, 4, 29, 30, 30]).to(index)
    expected = torch.nn.functional.embedding_bag(values, table, offsets, mode="sum", include_last_offset=True)
    found = int8_pooling(rows, values, offsets)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 2, 5]], torch.zeros(3, 24))


def test_is_within_half_a_step_of_the_floats() -> None:
    weight = drawn(40, 24)
    values = torch.arange(40)
    found = int8_pooling(quantised(weight), values, torch.arange(41))
    step = (weight.amax(1) - weight.amin(1)) / 255
    assert ((found - weight).abs().amax(1) <= step / 2 + weight.abs().amax(1) * 2**-9).all()


def test_one_bag_is_the_sum_of_its_parts() -> None:
    rows, values = quantised(drawn(10, 6)), torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(1))
    parts = int8_pooling(rows, values, torch.tensor([0, 20, 20, 50]))
    torch.testing.assert_close(int8_pooling(rows, values, torch.tensor([0, 50]))[0], parts.sum(0))


def test_no_bags_and_no_values() -> None:
    rows, none = quantised(drawn(3, 4)), torch.zeros(0, dtype=torch.int64)
    assert int8_pooling(rows, none, torch.tensor([0])).shape == (0, 4)
    assert torch.equal(int8_pooling(rows, none, torch.tensor([0, 0, 0]), torch.float16), torch.zeros(2, 4, dtype=torch.float16))


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_wrong_rows_and_offsets_are_named(chosen) -> None:
    rows = quantised(drawn(3, 4))
    with backend.use(chosen):
        for wrong in (-1, 3):
            with pytest.raises(RuntimeError, match=f"values: expected rows from 0 to 2, got {min(wrong, 0)} to {max(wrong, 0)}"):
                int8_pooling(rows, torch.tensor([0, wrong]), torch.tensor([0, 2]))
        for offsets in ([0, 1], [1, 2], [0, 2, 1, 2], [0, 3]):
            with pytest.raises(RuntimeError, match="offsets: expected not descending ones from 0 to 2, got"):
                int8_pooling(rows, torch.tensor([0, 1]), torch.tensor(offsets))


def test_wrong_arguments_are_named() -> None:
    rows, values, offsets = quantised(drawn(3, 4)), torch.tensor([0]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"rows: expected torch.uint8 \[R, 4 \+ D\], got torch.int8"):
        int8_pooling(rows.to(torch.int8), values, offsets)
    with pytest.raises(ValueError, match=r"rows: .* got torch.uint8 of shape \(3, 4\)"):
        int8_pooling(rows[:, :4], values, offsets)
    with pytest.raises(ValueError, match=r"values: expected int32 or int64 of one axis, at least 0, got torch.float32"):
        int8_pooling(rows, values.float(), offsets)
    with pytest.raises(ValueError, match=r"offsets: expected int32 or int64 of one axis, at least 1, got torch.int64 of shape \(0,\)"):
        int8_pooling(rows, values, offsets[:0])
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.float32, torch.bfloat16, torch.float16, got torch.float64"):
        int8_pooling(rows, values, offsets, torch.float64)
