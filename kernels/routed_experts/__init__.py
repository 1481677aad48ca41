# SPDX-License-Identifier: Apache-2.0
"""Routed experts as the torch.library op ``recsys::routed_experts``, with a fake implementation and a gradient of its own.

How many rows each expert gets is data, so that the whole computation is one op: ``torch.compile`` and ``torch.export`` see one node.
`kernels.routed_experts.quantized` has the forward pass alone, with weights of a byte each.
"""

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.routed_experts import cpu, reference
from kernels.routed_experts.reference import Activation

# T, B, D, h, E, k, activation (0 swiglu, 1 gelu)
SHAPES: tuple[Shape, ...] = (
    (1, 1, 3, 5, 1, 1, 0),
    (2, 9, 5, 7, 3, 2, 0),
    (3, 20, 63, 33, 4, 3, 1),
    (1, 130, 33, 65, 2, 1, 0),
    (1, 100, 20, 12, 5, 3, 0),
    (1, 3, 500, 9, 2, 2, 1),
)


def routed_experts(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """``y[t, b] = onto[t, b] + Σ_j gates[t, b, j] · expert[t, chosen[t, b, j]](x[t, b])``, computing nothing that was not chosen.

    An expert is ``act(x W_in + b_in) W_out``; see `kernels.routed_experts.reference`. Under autocast everything is cast to its dtype.

    Args:
        x: ``[T, B, D]``. Tokens or rows may be outermost in memory.
        weight_in: ``[T, E, D, F]``, the dtype of ``x``; F is h, and for ``swiglu`` 2 h. Any strides.
        weight_out: ``[T, E, h, D]``, the dtype of ``x``. Any strides.
        chosen: int64 ``[T, B, k]``, the experts of each row; a negative one is none. One beyond E - 1 is an error on the CPU and none on
            a GPU, which would have to wait to see it.
        gates: ``[T, B, k]``, the dtype of ``x``. A gate of zero does not spare the work, only a negative choice does.
        bias: ``[T, E, F]``, the dtype of ``x``, or None.
        onto: what the sum starts from, ``[T, B, D]``, the dtype of ``x``; zero if None. Cheaper than an addition afterwards.
        activation: "swiglu" or "gelu".

    Returns:
        ``[T, B, D]``, contiguous.

    Raises:
        ValueError: a shape, a dtype or the activation does not fit, or a choice is not an expert.
    """
    check_shapes(x, weight_in, weight_out, chosen, gates, bias, onto, activation)
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        floats = {"weight_in": weight_in, "weight_out": weight_out, "gates": gates, "bias": bias, "onto": onto}
        check_dtypes(x.dtype, floats)
    save = torch.is_grad_enabled()
    found = _forward(x, weight_in, weight_out, chosen, gates, bias, onto, activation, save)
    return cast(Tensor, found[0])


def check_shapes(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
) -> None:
    """Look whether all shapes fit together.

    Raises:
        ValueError: one does not, or the activation is unknown; names it and what was expected.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {activation!r}")
    for name, given, axes in (("x", x, "T, B, D"), ("weight_out", weight_out, "T, E, h, D"), ("chosen", chosen, "T, B, k")):
        if given.ndim != axes.count(",") + 1:
            raise ValueError(f"{name}: expected [{axes}], got {tuple(given.shape)}")
    if chosen.dtype != torch.int64:
        raise ValueError(f"chosen: expected torch.int64, got {chosen.dtype}")
    (tokens, batch, dim), (experts, hidden) = x.shape, weight_out.shape[1:3]
    width = 2 * hidden if activation == "swiglu" else hidden
    wanted = {
        "weight_in": (weight_in, (tokens, experts, dim, width)),
        "weight_out": (weight_out, (tokens, experts, hidden, dim)),
        "chosen": (chosen, (tokens, batch, chosen.shape[2])),
        "gates": (gates, (tokens, batch, chosen.shape[2])),
        "bias": (bias, (tokens, experts, width)),
        "onto": (onto, (tokens, batch, dim)),
    }
    for name, (one, shape) in wanted.items():
        if one is not None and one.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(one.shape)}")


def check_dtypes(dtype: torch.dtype, tensors: dict[str, Tensor | None]) -> None:
    """Look whether all that are given have a dtype.

    Raises:
        ValueError: names the one that has not.
    """
    for name, given in tensors.items():
        if given is not None and given.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {given.dtype}")


def _kept(x: Tensor, chosen: Tensor, save: bool) -> int:
    """Rows of the inner layer that are kept for the backward pass: on the CPU one for each pair, none where Triton forms it again."""
    return chosen.numel() if save and x.device.type == "cpu" and not backend.interpreting() else 0


@define("recsys::routed_experts")
def _forward(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and what the gradient needs: the inner layer (`_kept`), the order of the pairs, where their groups begin."""
    module = backend.implementation("routed_experts", x, weight_in)
    given = (x, weight_in, weight_out, chosen, gates, bias, onto)
    y, inner, order, offsets = (module or cpu).forward(*given, activation, _kept(x, chosen, save) > 0)
    if module is None:
        y = reference.routed_experts(*given, cast(Activation, activation)).contiguous()
    return y, inner, order, offsets


@define("recsys::routed_experts_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    inner: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W_in, W_out, the gates and the bias, the last one empty where there is none."""
    module = backend.implementation("routed_experts", x, weight_in) or cpu
    gradients = module.backward(dy, x, weight_in, weight_out, gates, bias, inner, order, offsets, activation)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], gradients)


@_forward.register_fake
def _(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inner = x.new_empty(_kept(x, chosen, save), weight_in.shape[3])
    order, offsets = chosen.new_empty(chosen.numel()), chosen.new_empty(weight_in.shape[0] * weight_in.shape[1] + 1)
    return x.new_empty(x.shape), inner, order, offsets


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    inner: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0 if bias is None else bias.shape)
    return x.new_empty(x.shape), x.new_empty(weight_in.shape), x.new_empty(weight_out.shape), gates.new_empty(gates.shape), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight_in, weight_out, _, gates, bias, onto, activation, _ = inputs
    _, *kept = output
    ctx.save_for_backward(x, weight_in, weight_out, gates, bias, *kept)
    ctx.is_onto, ctx.activation = onto is not None, activation


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_in, weight_out, gates, bias, *kept = ctx.saved_tensors
    dx, dweight_in, dweight_out, dgates, dbias = _backward(dy, x, weight_in, weight_out, gates, bias, *kept, ctx.activation)
    return dx, dweight_in, dweight_out, None, dgates, None if bias is None else dbias, dy if ctx.is_onto else None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
for _device in ("cpu", "cuda"):
    _forward.register_autocast(_device, torch.bfloat16)


def pair_flops(weight_in: Tensor, weight_out: Tensor) -> int:
    """Operations of one row through one expert."""
    return 2 * (weight_in.shape[2] * weight_in.shape[3] + weight_out.shape[2] * weight_out.shape[3])


def count_pairs(chosen: Tensor) -> int:
    """Choices that are an expert. Where only shapes are known, every choice counts as one."""
    return chosen.numel() if isinstance(chosen, FakeTensor) or chosen.is_meta else int((chosen >= 0).sum())


@register_flop_formula(torch.ops.recsys.routed_experts, get_raw=True)
def _forward_flops(x: Tensor, weight_in: Tensor, weight_out: Tensor, chosen: Tensor, *_: Any, **__: Any) -> int:
    return count_pairs(chosen) * pair_flops(weight_in, weight_out)


@register_flop_formula(torch.ops.recsys.routed_experts_backward, get_raw=True)
def _backward_flops(dy: Tensor, x: Tensor, weight_in: Tensor, weight_out: Tensor, gates: Tensor, *rest: Any, **__: Any) -> int:
    offsets = rest[3]
    pairs = gates.numel() if isinstance(offsets, FakeTensor) or offsets.is_meta else int(offsets[-1])
    return 2 * pairs * pair_flops(weight_in, weight_out)


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments of `routed_experts` for a shape, with a bias and something to start from.

    Every eighth row has one choice less, and no row of token 0 takes the last expert where there are more experts than choices.
    """
    tokens, batch, dim, hidden, experts, choices, gelu = shape
    width = hidden if gelu else 2 * hidden

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    logits = drawn(tokens, batch, experts)
    logits[0, :, -1] = -torch.inf
    chosen = logits.argsort(-1, descending=True)[..., :choices].contiguous()
    chosen[:, 7::8, -1] = -1
    x, onto = (drawn(tokens, batch, dim).to(dtype).requires_grad_() for _ in range(2))
    weight_in = drawn(tokens, experts, dim, width).div_(dim**0.5).to(dtype).requires_grad_()
    weight_out = drawn(tokens, experts, hidden, dim).div_(hidden**0.5).to(dtype).requires_grad_()
    gates = (0.5 + torch.rand(tokens, batch, choices, generator=generator)).to(dtype).requires_grad_()
    bias = drawn(tokens, experts, width).mul_(0.3).to(dtype).requires_grad_()
    return x, weight_in, weight_out, chosen, gates, bias, onto, "gelu" if gelu else "swiglu"


def pairs_of(shape: Shape) -> int:
    """How many choices are an expert in what `draw` gives."""
    tokens, batch, _, _, _, choices, _ = shape
    return tokens * (batch * choices - batch // 8)


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.routed_experts import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: x, onto, gates, choices and both weights in, y out. Backward: dy and again these, but for onto, in; their gradients out.

    The gradient of onto is dy itself. Each product of the forward pass has two of its size in the backward pass.
    """
    tokens, batch, dim, hidden, experts, choices, gelu = shape
    width = hidden if gelu else 2 * hidden
    rows, gates = (tokens * batch * size * dtype.itemsize for size in (dim, choices))
    weights = tokens * experts * (dim * width + hidden * dim + width) * dtype.itemsize
    indices = 8 * tokens * batch * choices
    flops = 6 * pairs_of(shape) * (dim * width + hidden * dim)
    return Work(flops, read=4 * rows + 2 * (weights + gates + indices), written=2 * rows + weights + gates)


OP = Op("routed_experts", routed_experts, reference.routed_experts, draw, SHAPES, small=(2, 9, 4, 3, 3, 2, 0), work=_work, specs=_specs)
