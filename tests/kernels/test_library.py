# SPDX-License-Identifier: Apache-2.0
"""An op called without torch.library's dispatcher gives what the op gives, and whatever wants to see the op does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.library import Defined, define
from kernels.op import Op, forward_backward
from kernels.registry import OPS
from kernels.rms_norm import rms_norm


class Seen(TorchDispatchMode):
    """The names of all ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_both_doors_lead_to_the_same_bits(op: Op) -> None:
    def drawn() -> tuple[Any, ...]:
        return op.inputs(op.shapes[1], torch.float32, torch.Generator().manual_seed(0))

    straight = forward_backward(op.call, drawn())
    with Seen() as seen:
        watched = forward_backward(op.call, drawn())
    assert f"recsys.{op.name}.default" in seen.names
    torch.testing.assert_close(straight, watched, rtol=0, atol=0)


@pytest.fixture(scope="module")
def doubled() -> Defined:
    """Twice a number, which notes each call of its implementation, whose gradient is 2."""

    @define("recsys::test_doubled")
    def _doubled(x: Tensor, calls: list[int]) -> Tensor:
        return 2 * x

    _doubled.register_fake(lambda x, calls: torch.empty_like(x))
    _doubled.register_autograd(lambda ctx, dy: (2 * dy, None), setup_context=lambda ctx, inputs, output: None)
    return _doubled


def test_plain_calls_and_their_gradients_pass_the_dispatcher_by(doubled: Defined, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, requires_grad=True)
    monkeypatch.setattr(doubled, "_overload", None)
    with torch.no_grad():
        assert doubled(x, []).tolist() == [2, 2, 2]
    assert not doubled(x.detach(), []).requires_grad
    (gradient,) = torch.autograd.grad(doubled(x, []).sum(), x)
    assert gradient.tolist() == [2, 2, 2]
    assert torch.nn.Parameter(x.detach()).requires_grad and doubled(torch.nn.Parameter(x.detach()), []).requires_grad


class Wrapped(Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize("watcher", ["compile", "vmap", "trace", "profiler", "class"])
def test_whoever_looks_on_sees_the_op(watcher: str) -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    expected = rms_norm(x, weight)
    if watcher == "compile":
        graphs: list[torch.fx.GraphModule] = []
        torch.compile(rms_norm, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(x, weight)
        assert any("recsys.rms_norm" in str(node.target) for node in graphs[0].graph.nodes)
    elif watcher == "vmap":
        found = torch.vmap(lambda row: rms_norm(row[None], weight)[0], chunk_size=1)
        torch.testing.assert_close(found(x), expected)
    elif watcher == "trace":
        graph = torch.jit.trace(lambda one: rms_norm(one, weight), x, check_trace=False).graph
        assert "recsys::rms_norm" in str(graph)
    elif watcher == "profiler":
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            rms_norm(x, weight)
        assert "recsys::rms_norm" in {event.key for event in profiled.key_averages()}
    else:
        assert type(rms_norm(x.as_subclass(Wrapped), weight)) is Wrapped


def test_a_second_derivative_is_an_error_and_not_left_out() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (gradient.square().sum() + x.sum()).backward()
