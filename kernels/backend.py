# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs.

By default the tensor's device decides: CUDA takes Triton where it is installed, the CPU takes ``cpu.py``, anything else the reference.
``RECSYS_KERNELS=reference|cpu|triton`` or `use` overrides it. With ``TRITON_INTERPRET=1`` (set before Triton is imported) the override
``triton`` also runs on CPU tensors, which is how the kernels are tested without a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["reference", "cpu", "triton"]
ENV = "RECSYS_KERNELS"

_override: ContextVar[Backend | None] = ContextVar("recsys_kernels_backend", default=None)


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


def choose(device: torch.device) -> Backend:
    """The implementation for tensors on ``device``.

    Raises:
        RuntimeError: the override asks for a backend that cannot run on this device.
    """
    wanted = _override.get() or (_checked(os.environ[ENV]) if os.environ.get(ENV) else None)
    if wanted is None:
        if device.type == "cuda" and find_spec("triton") is not None:
            return "triton"
        return "cpu" if device.type == "cpu" else "reference"
    if wanted == "triton" and device.type != "cuda" and not interpreting():
        raise RuntimeError(f"backend 'triton' was asked for on {device}: expected a CUDA tensor, or TRITON_INTERPRET=1")
    if wanted == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for on {device}: expected a CPU tensor")
    return wanted


def _checked(name: str) -> Backend:
    if name not in get_args(Backend):
        raise RuntimeError(f"{ENV}: unknown backend {name!r}, expected one of {', '.join(get_args(Backend))}")
    return name  # type: ignore[return-value]
