# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs.

An op's folder has up to three beside its reference: ``triton_ops.py``, ``native.py`` (C++ on the CPU) and ``cpu.py`` (torch operations,
which run anywhere). By default CUDA takes Triton where it is installed, and the CPU what the committed table `kernels.paths` says for the
op, the dtype and the size, C++ where it says nothing; anything else takes ``cpu.py``. Nothing is timed at run time. Where an
implementation does not support what is given, ``cpu.py`` runs.

``RECSYS_KERNELS=reference|cpu|native|triton`` or `use` overrides it. With ``TRITON_INTERPRET=1`` (set before Triton is imported) the
override ``triton`` also runs on CPU tensors, which is how the kernels are tested without a GPU. ``RECSYS_KERNELS_LOG=1`` logs every choice
once, and `record` collects them.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from kernels import paths

Backend = Literal["reference", "cpu", "native", "triton"]
Asked = Literal["auto"] | Backend
ENV, LOG_ENV = "RECSYS_KERNELS", "RECSYS_KERNELS_LOG"
_BACKENDS = get_args(Backend)
_MODULES = {"cpu": "cpu", "native": "native", "triton": "triton_ops"}
_LOG = logging.getLogger(__name__)

_override: ContextVar[Backend | None] = ContextVar("recsys_kernels_backend", default=None)
_recorders: list[set["Choice"]] = []
_logged: set["Choice"] = set()


class Choice(NamedTuple):
    """What ran where: an op's folder, a device, a dtype, a `paths.bucket` of sizes, and the implementation."""

    op: str
    device: str
    dtype: str
    bucket: int
    backend: Backend


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run the ops called inside the block on ``backend``. Backward passes started inside are covered too."""
    token = _override.set(_checked(backend))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def record() -> Iterator[set[Choice]]:
    """The choices made inside the block, by any thread."""
    found: set[Choice] = set()
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders.remove(found)


@contextmanager
def session(asked: Asked) -> Iterator[set[Choice]]:
    """`record`, and `use` unless that is left to the table (``auto``)."""
    with record() as ran:
        if asked == "auto":
            yield ran
        else:
            with use(asked):
                yield ran


def implementation(op: str, x: Tensor, *more: Any) -> ModuleType | None:
    """The module of ``kernels.<op>`` that runs for its first tensor ``x``; None for the reference.

    Args:
        op: the folder's name.
        x: the op's first tensor.
        more: what else a module's ``supports`` wants to know.

    Raises:
        RuntimeError: the override asks for a backend that cannot run on this device.
    """
    chosen = choose(op, x)
    module = None if chosen == "reference" else _module(op, chosen)
    if chosen != "reference" and (module is None or (chosen != "cpu" and not module.supports(x, *more))):
        chosen, module = "cpu", _module(op, "cpu")
    if _recorders or LOG_ENV in os.environ:
        _note(Choice(op, x.device.type, str(x.dtype).removeprefix("torch."), paths.bucket(x.numel()), chosen))
    return module


def choose(op: str, x: Tensor) -> Backend:
    """What is wanted for ``kernels.<op>`` and its first tensor: the override, the table, or the device's own.

    Raises:
        RuntimeError: the override asks for a backend that cannot run on this device.
    """
    kind = x.device.type
    wanted = _override.get()
    if wanted is None and (named := os.environ.get(ENV)):
        wanted = _checked(named)
    if wanted is None:
        if kind == "cuda" and _has_triton():
            return "triton"
        return _checked(paths.look_up(kind, op, x.dtype, paths.bucket(x.numel())) or "native") if kind == "cpu" else "cpu"
    if wanted == "triton" and kind != "cuda" and not interpreting():
        raise RuntimeError(f"backend 'triton' was asked for on {x.device}: expected a CUDA tensor, or TRITON_INTERPRET=1")
    if wanted in ("cpu", "native") and kind != "cpu":
        raise RuntimeError(f"backend {wanted!r} was asked for on {x.device}: expected a CPU tensor")
    return wanted


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _module(op: str, backend: Backend) -> ModuleType | None:
    name = f"kernels.{op}.{_MODULES[backend]}"
    return import_module(name) if find_spec(name) is not None else None


def _note(choice: Choice) -> None:
    for recorder in _recorders:
        recorder.add(choice)
    if os.environ.get(LOG_ENV) == "1" and choice not in _logged:
        _logged.add(choice)
        _LOG.warning("%s of %s on %s, 4^%d elements: %s", choice.op, choice.dtype, choice.device, choice.bucket, choice.backend)


def _checked(name: str) -> Backend:
    if name not in _BACKENDS:
        raise RuntimeError(f"{ENV}: unknown backend {name!r}, expected one of {', '.join(_BACKENDS)}")
    return name  # type: ignore[return-value]
