# SPDX-License-Identifier: Apache-2.0
"""Ops of ``torch.library``, called without its dispatcher where nothing looks on.

``torch.library.custom_op`` makes an op that compilers, exporters and counters see as one node; that costs some 80 microseconds a call, and
again for its gradient, more than many an op of ours takes. `define` makes the same op, and a call in plain eager mode goes straight to
the implementation, differentiated by a ``torch.autograd.Function`` of the same gradient. Whatever wants to see the op still does:
compilation and export, tracing, a dispatch mode (fake tensors, counters of FLOPs), a transform of functorch, a profiler, tensors of another
class.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
Save = Callable[[Any, Any, Any], None]


class Defined:
    """An op: call it, and register a fake implementation and a gradient as with ``torch.library.custom_op``."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._op = torch.library.custom_op(name, function, mutates_args=())
        self._function = function
        self._overload = getattr(torch.ops.recsys, name.removeprefix("recsys::")).default
        self._casts = False
        self._direct: type[torch.autograd.Function] | None = None

    def __call__(self, *given: Any) -> Any:
        """The op's results."""
        if torch.compiler.is_compiling() or _watched(given) or (self._casts and torch._C._is_any_autocast_enabled()):
            return self._overload(*given)
        if not torch.is_grad_enabled() or not any(isinstance(one, Tensor) and one.requires_grad for one in given):
            return self._function(*given)
        return self._overload(*given) if self._direct is None else self._direct.apply(*given)  # type: ignore[no-untyped-call]

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """What is known of the results from shapes alone."""
        self._op.register_fake(fake)

    def register_autocast(self, device: str, dtype: torch.dtype) -> None:
        """To what its floating tensors are cast under autocast; see ``CustomOpDef.register_autocast``."""
        self._op.register_autocast(device, dtype)
        self._casts = True

    def register_autograd(self, gradient: Callable[..., Any], *, setup_context: Save) -> None:
        """The gradient by the op's first result, and what it keeps; other results have none.

        Args:
            gradient: ``gradient(ctx, upstream) ->`` one for each input.
            setup_context: ``setup_context(ctx, inputs, output)``.
        """
        function, arguments = self._function, len(self._overload._schema.arguments)

        def keep(ctx: Any, inputs: Any, output: Any) -> None:
            setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(False)  # zeros for what only the gradient needs would be as large as that
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[1:])

        def pull(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
            return (None,) * arguments if upstream is None else gradient(ctx, upstream)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                output = function(*given)
                keep(ctx, given, output)
                return output

            @staticmethod
            def backward(ctx: Any, *upstream: Any) -> Any:
                return pull(ctx, *upstream)

        self._direct = Direct
        self._op.register_autograd(pull, setup_context=keep)


def define(name: str) -> Callable[[Callable[..., Any]], Defined]:
    """``@define("recsys::name")`` over the implementation, whose annotations give the op's schema; it changes none of its inputs."""
    return lambda function: Defined(name, function)


def _watched(given: tuple[Any, ...]) -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(one, Tensor) and type(one) not in _PLAIN for one in given)
    )
