# SPDX-License-Identifier: Apache-2.0
"""What every op must hold on the CPU: equal to its reference in values and gradients, and transparent to torch's compilers."""

import dataclasses

import pytest
import torch

from kernels import backend
from kernels.op import Op, Result
from kernels.registry import OPS
from kernels.shapes import RECIPES
from kernels.testing import assert_matches_reference, error_ratio, unwritten_is_nan

CASES = [pytest.param(op, shape, id=f"{op.name}-{'x'.join(map(str, shape))}") for op in OPS for shape in op.shapes]


@pytest.mark.parametrize("way", ["cpu", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_each_way_equals_the_reference_in_values_and_gradients(op: Op, shape, dtype, way: backend.Backend) -> None:
    with backend.use(way), unwritten_is_nan():
        assert_matches_reference(op, shape, dtype)


@pytest.mark.parametrize("op", [op for op in OPS if op.small is not None], ids=lambda op: op.name)
def test_gradients_match_finite_differences(op: Op) -> None:
    assert op.small is not None
    inputs = op.inputs(op.small, torch.float64, torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(op.call, inputs)
    assert torch.autograd.gradcheck(op.reference, inputs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_inputs_that_do_not_lie_together_give_the_same(op: Op) -> None:
    """Every second element of a tensor twice as wide."""
    inputs = op.inputs(op.shapes[1], torch.float32, torch.Generator().manual_seed(0))
    spread = tuple(_spread(i) if isinstance(i, torch.Tensor) and i.ndim else i for i in inputs)
    assert any(isinstance(i, torch.Tensor) and not i.is_contiguous() for i in spread)
    torch.testing.assert_close(op.call(*spread), op.call(*inputs))


def _spread(given: torch.Tensor) -> torch.Tensor:
    wide = torch.stack((given.detach(), torch.zeros_like(given)), -1)
    return wide[..., 0]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_work_grows_with_the_shape(op: Op) -> None:
    for shape in RECIPES[op.name]:
        work, half = op.work(shape, torch.float32), op.work(shape, torch.bfloat16)
        assert work.flops > 0 and work.read > 0 and work.written > 0
        assert half.read <= work.read and half.flops == work.flops


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_torch_library_accepts_the_op(op: Op) -> None:
    inputs = op.inputs(op.shapes[1], torch.float32, torch.Generator().manual_seed(0))
    overload = getattr(torch.ops.recsys, op.name).default
    result = torch.library.opcheck(overload, inputs)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compile_and_export_see_through_the_op(op: Op) -> None:
    torch._dynamo.reset()  # one function below stands for all ops
    inputs = op.inputs(op.shapes[2], torch.float32, torch.Generator().manual_seed(0))
    tensors = tuple(i for i in inputs if isinstance(i, torch.Tensor))
    rest = inputs[len(tensors) :]

    class Module(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> Result:
            found = op.call(*args, *rest)
            return tuple(one * 2 for one in found) if isinstance(found, tuple) else found * 2

    eager = Module()(*tensors)
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, eager)
    exported = torch.export.export(Module(), tensors, strict=False)
    torch.testing.assert_close(exported.module()(*tensors), eager)
    assert any(f"recsys.{op.name}" in str(node.target) for node in exported.graph.nodes)


def test_every_op_has_the_recipes_shapes() -> None:
    assert set(RECIPES) == {op.name for op in OPS}
    assert all(RECIPES.values())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_reference_can_be_chosen(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = op.inputs(op.shapes[1], torch.float32, torch.Generator().manual_seed(0))
    expected = op.reference(*inputs)
    with backend.use("reference"):
        torch.testing.assert_close(op.call(*inputs), expected, rtol=0, atol=0)
    monkeypatch.setenv(backend.ENV, "reference")
    torch.testing.assert_close(op.call(*inputs), expected, rtol=0, atol=0)


def test_fresh_memory_can_be_seen() -> None:
    with unwritten_is_nan():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_comparison_can_fail() -> None:
    op = OPS[0]
    wrong = dataclasses.replace(op, call=lambda *inputs: op.call(*inputs) * 1.001)
    with pytest.raises(AssertionError, match=r"value: error ratio 1\.00e-03"):
        assert_matches_reference(wrong, op.shapes[2], torch.float32)
    assert not error_ratio(torch.tensor([float("nan")]), torch.ones(1)) <= 1
