# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling as the torch.library op ``recsys::log_sinkhorn``, with a fake implementation and a gradient of its own.

(``recsys::sinkhorn`` is the name of the op in `recsys.ranking.sinkhorn`.)
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.sinkhorn import cpu, reference

# Matrices, n, iterations, whether the logits are made symmetric.
SHAPES: tuple[Shape, ...] = ((1, 1, 3, 0), (3, 5, 4, 1), (2, 63, 3, 0), (1, 100, 4, 1), (4, 16, 20, 1), (1, 128, 2, 0), (5, 33, 1, 1))


def sinkhorn(
    logits: Tensor, temperature: Tensor | float = 1.0, iterations: int = 20, symmetric: bool = False, implicit: bool = False
) -> Tensor:
    """The doubly stochastic matrix of ``exp(W / τ)``; see `kernels.sinkhorn.reference`.

    Rows sum to one to machine precision, columns as far as the iteration has converged. The gradient is that of the iterations that
    were run, however many. ``implicit`` takes that of the limit instead: it keeps two vectors in all, not two for each iteration, and
    takes no exponentials in the backward pass, but it is right only where the sums are within 1e-6 of one; elsewhere it is silently
    something else. Gradients have no gradient of their own.

    Args:
        logits: W, ``[..., n, n]``. The result has its dtype: pass float32 for a float32 matrix.
        temperature: τ, a number or a scalar tensor; it gets no gradient.
        iterations: how many, at least 1.
        symmetric: whether W is replaced by ``(W + Wᵀ) / 2``.
        implicit: which gradient.

    Raises:
        ValueError: the logits are no square matrices of floating-point numbers, the temperature is not positive, no scalar or asks for
            a gradient, or there is no iteration.
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating-point [..., n, n], got {logits.dtype} of shape {tuple(logits.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    scale = _temperature(temperature, wide, logits.device)
    y, _ = _forward(logits.reshape(-1, *logits.shape[-2:]).contiguous(), scale, iterations, symmetric, implicit)
    found: Tensor = y.view(logits.shape)
    return found


def _temperature(temperature: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        return torch.full((), temperature, dtype=dtype, device=device)
    if temperature.ndim or temperature.requires_grad:
        raise ValueError(
            "temperature: expected a scalar that asks for no gradient, "
            f"got shape {tuple(temperature.shape)} with requires_grad={temperature.requires_grad}"
        )
    return temperature.to(device, dtype)


@define("recsys::log_sinkhorn")
def _forward(logits: Tensor, temperature: Tensor, iterations: int, symmetric: bool, implicit: bool = False) -> tuple[Tensor, Tensor]:
    module = backend.implementation("sinkhorn", logits)
    y, duals = (module or cpu).forward(logits, temperature, iterations, symmetric, implicit)
    return (y if module is not None else reference.sinkhorn(logits, temperature, iterations, symmetric)), duals


@define("recsys::log_sinkhorn_backward")
def _backward(dy: Tensor, logits: Tensor, temperature: Tensor, duals: Tensor, iterations: int, symmetric: bool, implicit: bool) -> Tensor:
    module = backend.implementation("sinkhorn", logits) or cpu
    return cast(Tensor, module.backward(dy.contiguous(), logits, temperature, duals, iterations, symmetric, implicit))


@_forward.register_fake
def _(logits: Tensor, temperature: Tensor, iterations: int, symmetric: bool, implicit: bool = False) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty_like(logits), logits.new_empty(logits.shape[0], 1 if implicit else iterations, 2, logits.shape[-1], dtype=wide)


@_backward.register_fake
def _(dy: Tensor, logits: Tensor, temperature: Tensor, duals: Tensor, iterations: int, symmetric: bool, implicit: bool) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool, bool], output: tuple[Tensor, Tensor]) -> None:
    logits, temperature, *ctx.settings = inputs
    ctx.save_for_backward(logits, temperature, output[1])


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _backward(dy, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, int, bool]:
    matrices, n, iterations, symmetric = shape
    logits = torch.randn(matrices, n, n, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    temperature = torch.tensor(0.5, dtype=logits.dtype)
    return logits.to(dtype).requires_grad_(), temperature, iterations, bool(symmetric)


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.sinkhorn import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: logits in, matrix out. Backward: logits and the gradient in, the gradient out; the duals out and in.

    A step takes a sum, a subtraction, an exponential and two reductions of each element, and about six on the way back.
    """
    matrices, n, iterations, _ = shape
    one, duals = matrices * n * n * dtype.itemsize, matrices * iterations * 2 * n * 4
    return Work(flops=22 * iterations * matrices * n * n, read=3 * one + duals, written=2 * one + duals)


OP = Op("log_sinkhorn", sinkhorn, reference.sinkhorn, _inputs, SHAPES, small=(2, 5, 4, 1), work=_work, specs=_specs)
