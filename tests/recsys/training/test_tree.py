# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
import torch

from recsys.core.errors import CheckpointError
from recsys.training.tree import pack, unpack


def through_json(value: object) -> object:
    packed, tensors = pack(value)
    return unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)


def test_round_trip() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    value = {0: {"exp_avg": tensor, "step": torch.tensor(3.0)}, "b": [1, 2.5, None, True, "x", (tensor.T, [])], "empty": {}, "tensor": 1}
    back = through_json(value)
    assert list(back) == [0, "b", "empty", "tensor"]
    assert torch.equal(back[0]["exp_avg"], tensor) and back[0]["step"].shape == ()
    assert back["b"][:5] == [1, 2.5, None, True, "x"] and back["b"][3] is True
    assert isinstance(back["b"][5], tuple) and torch.equal(back["b"][5][0], tensor.T) and back["b"][5][1] == []
    assert back["empty"] == {} and back["tensor"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    back = through_json(torch.ones(3, dtype=dtype))
    assert back.dtype == dtype and bool((back == 1).all())


def test_floats_stay_to_the_bit_also_those_that_json_does_not_know() -> None:
    values = [0.1 + 0.2, 1e-320, math.inf, -math.inf]
    assert through_json(values) == values
    assert math.isnan(through_json(math.nan))


def test_shared_memory_is_taken_apart_and_names_are_paths() -> None:
    tensor = torch.arange(4.0)
    packed, tensors = pack({"a": tensor, "b": {"c": tensor[:2]}, "a.x": [tensor]})
    assert set(tensors) == {"a", "b.c", "a.x.0"}
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 3
    assert torch.equal(unpack(packed, tensors)["b"]["c"], tensor[:2])


def test_two_tensors_of_one_path_stay_apart() -> None:
    back = through_json({"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2)})
    assert back["a"]["b"] == 1 and back["a.b"] == 2


def test_what_only_a_pickle_could_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a\.0: a set cannot be saved without a pickle"):
        pack({"a": [{1}]})
    with pytest.raises(CheckpointError, match=r"expected keys that are text or whole numbers, got \(1, 2\)"):
        pack({(1, 2): 3})
    with pytest.raises(CheckpointError, match="state: cannot read"):
        unpack({"tensor": "absent"}, {})
