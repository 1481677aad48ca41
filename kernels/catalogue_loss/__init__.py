# SPDX-License-Identifier: Apache-2.0
"""A catalogue's log-partition as the torch.library op ``recsys::catalogue_log_partition``, with a fake implementation and a gradient."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.catalogue_loss import cpu, reference
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work

# States, slots, candidates, width of a slot.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (3, 2, 5, 7),
    (63, 1, 100, 33),
    (7, 3, 130, 16),
    (130, 2, 63, 5),
    (65, 1, 129, 192),
    (2, 1, 1000, 20),
)


def weighted_log_partition(states_snd: Tensor, items_cnd: Tensor, weights_s: Tensor) -> Tensor:
    """``out[k] = Σ_s w_s · log Σ_c exp⟨states[s, k], items[c, k]⟩``, never holding S·C logits; see `kernels.catalogue_loss.reference`.

    With a state's share of the targets as its weight, this less the targets' mean logit is the cross-entropy over the catalogue.
    Logits and sums are float32 at least, under autocast too. Gradients have no gradient of their own: asking for one is an error.

    Args:
        states_snd: ``[S, n, d]``.
        items_cnd: ``[C, n, d]``, the dtype of the states, C at least 1.
        weights_s: ``[S]``, the dtype of the states or float32. They get no gradient.

    Returns:
        ``[n]`` in the dtype of the weights; zero where S = 0.

    Raises:
        ValueError: a shape or a dtype does not fit, there is no item, or the weights ask for a gradient.
    """
    if states_snd.ndim != 3 or states_snd.shape[2] < 1 or not states_snd.is_floating_point():
        raise ValueError(f"states_snd: expected floats [S, n, d] with d at least 1, got {states_snd.dtype} {tuple(states_snd.shape)}")
    _, slots, width = states_snd.shape
    if items_cnd.ndim != 3 or items_cnd.shape[1:] != (slots, width) or items_cnd.shape[0] < 1 or items_cnd.dtype != states_snd.dtype:
        wanted = f"{states_snd.dtype} [C, {slots}, {width}] with C at least 1, as states_snd"
        raise ValueError(f"items_cnd: expected {wanted}, got {items_cnd.dtype} {tuple(items_cnd.shape)}")
    dtypes = (states_snd.dtype, torch.promote_types(states_snd.dtype, torch.float32))
    if weights_s.shape != states_snd.shape[:1] or weights_s.dtype not in dtypes:
        wanted = f"{' or '.join(map(str, dict.fromkeys(dtypes)))} [{states_snd.shape[0]}]"
        raise ValueError(f"weights_s: expected {wanted}, got {weights_s.dtype} {tuple(weights_s.shape)}")
    if weights_s.requires_grad:
        raise ValueError("weights_s: expected constants, got a tensor that asks for a gradient")
    differentiate = torch.is_grad_enabled() and (states_snd.requires_grad or items_cnd.requires_grad)
    return cast(Tensor, _forward(states_snd, items_cnd, weights_s, differentiate)[0])


def _keeps(states: Tensor, items: Tensor, differentiate: bool) -> bool:
    """Whether gradients are formed along with the value and kept; elsewhere the backward pass forms the logits again."""
    return differentiate and states.device.type == "cpu" and not backend.interpreting() and items.shape[0] <= cpu.LIMIT


@define("recsys::catalogue_log_partition")
def _forward(states: Tensor, items: Tensor, weights: Tensor, differentiate: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value, the states' largest logits and sums ``[2, n, S]``, and the gradients or two tensors without elements."""
    module = backend.implementation("catalogue_loss", states)
    with torch.autocast(states.device.type, enabled=False):
        if _keeps(states, items, differentiate):
            out, statistics, dstates, ditems = (module or cpu).at_once(states, items, weights)
        else:
            statistics, dstates, ditems = (module or cpu).statistics_of(states, items), _nothing(states), _nothing(states)
            out = cpu.log_partition(statistics, weights)
        if module is None:
            out = reference.weighted_log_partition(states, items, weights)
    return out, statistics, dstates, ditems


@define("recsys::catalogue_log_partition_backward")
def _backward(
    grad: Tensor, states: Tensor, items: Tensor, weights: Tensor, statistics: Tensor, dstates: Tensor, ditems: Tensor
) -> tuple[Tensor, Tensor]:
    if ditems.numel():
        scale = grad.to(statistics.dtype)[:, None]
        return (dstates * scale).to(states.dtype), (ditems * scale).to(items.dtype)
    module = backend.implementation("catalogue_loss", states) or cpu
    with torch.autocast(states.device.type, enabled=False):
        return cast(tuple[Tensor, Tensor], module.backward(grad, states, items, weights, statistics))


def _nothing(states: Tensor) -> Tensor:
    """In the place of a gradient that is not kept."""
    return states.new_empty(0, dtype=torch.promote_types(states.dtype, torch.float32))


@_forward.register_fake
def _(states: Tensor, items: Tensor, weights: Tensor, differentiate: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(states.dtype, torch.float32)
    statistics = states.new_empty(2, states.shape[1], states.shape[0], dtype=wide)
    out = weights.new_empty(states.shape[1])
    if _keeps(states, items, differentiate):
        return out, statistics, states.new_empty(states.shape, dtype=wide), items.new_empty(items.shape, dtype=wide)
    return out, statistics, _nothing(states), _nothing(states)


@_backward.register_fake
def _(
    grad: Tensor, states: Tensor, items: Tensor, weights: Tensor, statistics: Tensor, dstates: Tensor, ditems: Tensor
) -> tuple[Tensor, Tensor]:
    return states.new_empty(states.shape), items.new_empty(items.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    states, items, weights, _ = inputs
    _, *kept = output
    ctx.save_for_backward(states, items, weights, *kept)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dstates, ditems = _backward(grad, *ctx.saved_tensors)
    return dstates, ditems, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def _product_flops(states_shape: Sequence[int], items_shape: Sequence[int]) -> int:
    states, slots, width = states_shape
    return 2 * states * slots * width * items_shape[0]


@register_flop_formula(torch.ops.recsys.catalogue_log_partition, get_raw=True)
def _forward_flops(states: Tensor, items: Tensor, weights: Tensor, differentiate: bool = True, **_: Any) -> int:
    return _product_flops(states.shape, items.shape) * (3 if _keeps(states, items, differentiate) else 1)


@register_flop_formula(torch.ops.recsys.catalogue_log_partition_backward, get_raw=True)
def _backward_flops(grad: Tensor, states: Tensor, items: Tensor, *rest: Any, **_: Any) -> int:
    """Nothing where the gradients were kept."""
    ditems = rest[3]
    return 0 if ditems.numel() else 3 * _product_flops(states.shape, items.shape)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    count, slots, candidates, width = shape
    states = torch.randn(count, slots, width, generator=generator).mul_(2 * width**-0.5).to(dtype).requires_grad_()
    items = torch.randn(candidates, slots, width, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(count, generator=generator).div_(count).to(dtype)
    return states, items, weights


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.catalogue_loss import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: states and items in; one product. Backward: both again in, their gradients out; two products. The weights in each time."""
    count, slots, candidates, width = shape
    one = (count + candidates) * slots * width * dtype.itemsize
    flops = 3 * _product_flops((count, slots, width), (candidates, slots, width))
    return Work(flops, read=2 * (one + count * dtype.itemsize), written=one + slots * dtype.itemsize)


OP = Op(
    "catalogue_log_partition",
    weighted_log_partition,
    reference.weighted_log_partition,
    _inputs,
    SHAPES,
    small=(3, 2, 4, 3),
    work=_work,
    specs=_specs,
)
