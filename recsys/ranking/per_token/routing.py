# SPDX-License-Identifier: Apache-2.0
"""What per-token mixtures of experts share: the router's logits, the choice, and the product of the chosen rows with their experts.

Every token position has experts of its own, so rows are sorted within a token: of B rows at token t, those that chose expert e make the
group (t, e). A group is one small dense problem, and the groups differ in size. As these sizes are data, the whole computation is one
``torch.library`` op with a fake implementation and a gradient of its own: ``torch.compile`` and ``torch.export`` see one node.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from recsys.ranking.per_token.base import per_token_linear

Activation = Literal["swiglu", "gelu"]


def router_logits(x_tbd: Tensor, weight_tde: Tensor, bias_t1e: Tensor | None = None) -> Tensor:
    """The logits ``[T, B, E]`` of each token's router, in float32 or better whatever the dtype of the input, under autocast too."""
    dtype = torch.promote_types(x_tbd.dtype, torch.float32)
    with torch.autocast(x_tbd.device.type, enabled=False):
        return per_token_linear(x_tbd.to(dtype), weight_tde.to(dtype), None if bias_t1e is None else bias_t1e.to(dtype))


def choose(logits_tbe: Tensor, count: int) -> Tensor:
    """The ``count`` experts with the highest logits, int64 ``[T, B, count]``, best first; of equal logits the one with the lower index."""
    return torch.sort(logits_tbe, dim=-1, descending=True, stable=True).indices[..., :count]


def routed_experts(
    x_tbd: Tensor,
    weight_in_tedf: Tensor,
    weight_out_tehd: Tensor,
    chosen_tbk: Tensor,
    gates_tbk: Tensor,
    *,
    activation: Activation,
    bias_in_tef: Tensor | None = None,
    onto_tbd: Tensor | None = None,
) -> Tensor:
    """``y[t, b] = Σ_j gates[t, b, j] · expert[t, chosen[t, b, j]](x[t, b])``, computing nothing that was not chosen.

    An expert is ``act(x W_in + b_in) W_out``, with ``act`` the exact GELU, or for ``swiglu`` ``silu(first half) ⊙ second half``.

    Args:
        x_tbd: ``[T, B, D]``.
        weight_in_tedf: ``[T, E, D, F]``; F is h, and for ``swiglu`` 2 h. Any strides.
        weight_out_tehd: ``[T, E, h, D]``.
        chosen_tbk: int64 ``[T, B, k]``, the experts of each row, all different; a negative one is none.
        gates_tbk: ``[T, B, k]``, of the dtype of ``x``. A gate of zero does not spare the work, only a negative choice does.
        activation: see above.
        bias_in_tef: ``[T, E, F]``, or None.
        onto_tbd: what the sum starts from, ``[T, B, D]``; zero if None. Cheaper than an addition afterwards.

    Returns:
        ``[T, B, D]``.
    """
    save = torch.is_grad_enabled()
    y_tbd, _, _, _ = torch.ops.recsys.routed_experts(
        x_tbd, weight_in_tedf, weight_out_tehd, bias_in_tef, onto_tbd, chosen_tbk, gates_tbk, activation, save
    )
    return cast(Tensor, y_tbd)


@torch.library.custom_op("recsys::routed_experts", mutates_args=())
def _forward(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias_in: Tensor | None,
    onto: Tensor | None,
    chosen: Tensor,
    gates: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and what the gradient needs: the experts' hidden layers before the activation, the order of the pairs, the group sizes."""
    _, experts, dim, width = weight_in.shape
    order, counts = _sort(chosen, experts)
    rows, gates_n1 = order // chosen.shape[-1], gates.flatten()[order].unsqueeze(1)
    x_nd = x.reshape(-1, dim)
    y_nd = torch.zeros_like(x_nd) if onto is None else onto.reshape(-1, dim).clone(memory_format=torch.contiguous_format)
    inner = x.new_empty(order.numel() if save else 0, width)
    for token, expert, group in _groups(counts, experts):
        in_group = rows[group]
        product = torch.mm(x_nd.index_select(0, in_group), weight_in[token, expert], out=inner[group] if save else None)
        if bias_in is not None:
            product += bias_in[token, expert]
        y_nd.index_add_(0, in_group, torch.mm(_activate(product, activation).mul_(gates_n1[group]), weight_out[token, expert]))
    return y_nd.view(x.shape), inner, order, counts


@torch.library.custom_op("recsys::routed_experts_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    inner: Tensor,
    order: Tensor,
    counts: Tensor,
    activation: str,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, W_in, W_out, b_in and the gates. A gate's is ``⟨dy W_outᵀ, act⟩``, so that no expert's output is kept."""
    tokens, experts, dim, width = weight_in.shape
    rows, gates_n1 = order // gates.shape[-1], gates.flatten()[order].unsqueeze(1)
    x_nd, dy_nd = x.reshape(-1, dim), dy.reshape(-1, dim)
    dx_nd, dgates = torch.zeros_like(x_nd), gates.new_zeros(gates.numel())
    dweight_in, dweight_out, dbias_in = (
        x.new_zeros(weight_in.shape),
        x.new_zeros(weight_out.shape),
        x.new_zeros(tokens, experts, width if has_bias else 0),
    )
    for token, expert, group in _groups(counts, experts):
        in_group, gates_m1 = rows[group], gates_n1[group]
        dy_md = dy_nd.index_select(0, in_group)
        dhidden = torch.mm(dy_md, weight_out[token, expert].T)
        hidden, pull_back = _activate_with_gradient(inner[group], activation)
        dgates[order[group]] = (dhidden * hidden).sum(1)
        torch.mm(hidden.mul_(gates_m1).T, dy_md, out=dweight_out[token, expert])
        dinner = pull_back(dhidden.mul_(gates_m1))
        torch.mm(x_nd.index_select(0, in_group).T, dinner, out=dweight_in[token, expert])
        if has_bias:
            torch.sum(dinner, 0, out=dbias_in[token, expert])
        dx_nd.index_add_(0, in_group, torch.mm(dinner, weight_in[token, expert].T))
    return dx_nd.view(x.shape), dweight_in, dweight_out, dbias_in, dgates.view(gates.shape)


def _sort(chosen_tbk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The pairs (row, choice) by token and expert, those without an expert last; and how many each (token, expert) has, ``[T * E]``."""
    tokens = chosen_tbk.shape[0]
    first = torch.arange(0, tokens * experts, experts, device=chosen_tbk.device)[:, None, None]
    keys = (first + chosen_tbk).where(chosen_tbk >= 0, tokens * experts).flatten()
    return torch.sort(keys, stable=True).indices, torch.bincount(keys, minlength=tokens * experts + 1)[:-1]


def _groups(counts: Tensor, experts: int) -> Iterator[tuple[int, int, slice]]:
    """Token, expert and place among the sorted pairs of each group that is not empty."""
    start = 0
    for number, count in enumerate(counts.tolist()):
        if count:
            yield number // experts, number % experts, slice(start, start + count)
        start += count


def _activate(inner: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return functional.gelu(inner)
    gate, up = inner.chunk(2, dim=1)
    return functional.silu(gate).mul_(up)


def _activate_with_gradient(inner: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The hidden layer, and from its gradient that of ``inner``."""
    if activation == "gelu":
        return functional.gelu(inner), lambda dhidden: torch.ops.aten.gelu_backward(dhidden, inner)
    gate, up = inner.chunk(2, dim=1)
    opened = functional.silu(gate)
    return opened * up, lambda dhidden: torch.cat([torch.ops.aten.silu_backward(dhidden * up, gate), opened * dhidden], dim=1)


@_forward.register_fake
def _(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias_in: Tensor | None,
    onto: Tensor | None,
    chosen: Tensor,
    gates: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inner = x.new_empty(chosen.numel() if save else 0, weight_in.shape[-1])
    order, counts = chosen.new_empty(chosen.numel()), chosen.new_empty(weight_in.shape[0] * weight_in.shape[1])
    return x.new_empty(x.shape), inner, order, counts


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    inner: Tensor,
    order: Tensor,
    counts: Tensor,
    activation: str,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts, _, width = weight_in.shape
    dweights = x.new_empty(weight_in.shape), x.new_empty(weight_out.shape), x.new_empty(tokens, experts, width if has_bias else 0)
    return x.new_empty(x.shape), *dweights, gates.new_empty(gates.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight_in, weight_out, bias_in, onto, _, gates, activation, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros for what was kept would be as large as the hidden layers
    ctx.save_for_backward(x, weight_in, weight_out, gates, *kept)
    ctx.has_bias, ctx.is_onto, ctx.activation = bias_in is not None, onto is not None, activation


def _gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    results = torch.ops.recsys.routed_experts_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.has_bias)
    dx, dweight_in, dweight_out, dbias_in, dgates = results
    return dx, dweight_in, dweight_out, dbias_in if ctx.has_bias else None, dy if ctx.is_onto else None, None, dgates, None, None


_forward.register_autograd(_gradient, setup_context=_save)
for _device in ("cpu", "cuda"):
    _forward.register_autocast(_device, torch.bfloat16)


def _pair_flops(weight_in: Tensor, weight_out: Tensor) -> int:
    """Operations of one row through one expert."""
    return 2 * (weight_in.shape[2] * weight_in.shape[3] + weight_out.shape[2] * weight_out.shape[3])


@register_flop_formula(torch.ops.recsys.routed_experts, get_raw=True)
def _forward_flops(x: Tensor, weight_in: Tensor, weight_out: Tensor, bias_in: Any, onto: Any, chosen: Tensor, *_: Any, **__: Any) -> int:
    """Where only shapes are known, every choice counts as one that was made."""
    pairs = chosen.numel() if isinstance(chosen, FakeTensor) or chosen.is_meta else int((chosen >= 0).sum())
    return pairs * _pair_flops(weight_in, weight_out)


@register_flop_formula(torch.ops.recsys.routed_experts_backward, get_raw=True)
def _backward_flops(dy: Tensor, x: Tensor, weight_in: Tensor, weight_out: Tensor, gates: Tensor, *rest: Any, **__: Any) -> int:
    counts = rest[2]
    pairs = gates.numel() if isinstance(counts, FakeTensor) or counts.is_meta else int(counts.sum())
    return 2 * pairs * _pair_flops(weight_in, weight_out)
