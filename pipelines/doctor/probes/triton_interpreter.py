# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, which runs kernels on CPU tensors. Needs TRITON_INTERPRET=1 in the environment."""

import torch
import triton

from pipelines.doctor.probes import Trial, expect
from pipelines.doctor.probes.triton_add import add


def probe() -> Trial:
    """Run one kernel on the CPU."""
    trial = Trial(triton.__version__)
    trial.attempt("interpreter", _run)
    return trial


def _run() -> None:
    x, y = torch.randn(100), torch.randn(100)
    out = torch.empty(100)
    add[(2,)](x, y, out, 100, BLOCK=64)
    expect(torch.equal(out, x + y), "a sum")
