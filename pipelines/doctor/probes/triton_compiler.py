# SPDX-License-Identifier: Apache-2.0
"""Triton's compiler: a binary for sm_80, for which no GPU is needed; and a run on the GPU, where there is one."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipelines.doctor.probes import Trial, expect
from pipelines.doctor.probes.triton_add import add


def probe() -> Trial:
    """Compile one kernel, and run it on a GPU."""
    trial = Trial(triton.__version__)
    trial.attempt("compiler (sm_80)", _compile)
    trial.attempt("GPU", _run)
    return trial


def _compile() -> None:
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=add, signature=signature, constexprs={"BLOCK": 64})
    binary = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
    expect(binary[:4] == b"\x7fELF", "a compiled kernel")


def _run() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "none here"
    x, y = torch.randn(100, device="cuda"), torch.randn(100, device="cuda")
    out = torch.empty_like(x)
    add[(2,)](x, y, out, 100, BLOCK=64)
    expect(torch.equal(out, x + y), "a sum on the GPU")
    return None
