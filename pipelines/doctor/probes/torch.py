# SPDX-License-Identifier: Apache-2.0
"""torch: matrix products forward and backward, bf16, CUDA, threads, memory that trainings keep."""

from pathlib import Path

import torch

from pipelines.doctor.probes import Trial, expect
from recsys.core.memory import ENV, keep_freed_memory


def probe() -> Trial:
    """Try what every model needs."""
    trial = Trial(torch.__version__)
    trial.attempt("forward and backward", _forward_and_backward)
    trial.attempt("bf16 matmul", _bf16)
    trial.attempt("CUDA", _cuda)
    trial.attempt("threads", lambda: str(torch.get_num_threads()))
    trial.attempt("freed memory", freed_memory)
    return trial


def _forward_and_backward() -> None:
    a_mk, b_kn = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4)
    (a_mk @ b_kn).sum().backward()
    expect(a_mk.grad is not None and torch.allclose(a_mk.grad, b_kn.sum(1).expand(8, 16), atol=1e-5), "the gradient of a matrix product")


def _bf16() -> str:
    a_mk, b_kn = torch.randn(32, 64), torch.randn(64, 32)
    product = (a_mk.bfloat16() @ b_kn.bfloat16()).float()
    expect(torch.allclose(product, a_mk @ b_kn, atol=0.5), "a bf16 matrix product")
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "bf16") if unit in words]  # the last is ARM's
    return f"in hardware ({', '.join(units)})" if units else "emulated: this CPU has no bf16 units"


def freed_memory() -> str:
    """Whether a training keeps the memory of freed tensors for the next ones."""
    return "kept by trainings" if keep_freed_memory() else f"not kept: not glibc, or {ENV}=0; large tensors cost page faults"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "not in this build"
    if not torch.cuda.is_available():
        return f"built for {torch.version.cuda}; no device here"
    x = torch.randn(16, 16, device="cuda")
    expect(torch.allclose((x @ x).cpu(), x.cpu() @ x.cpu(), atol=1e-2), "a matrix product on the GPU")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}; " + ", ".join(f"{d.name} (sm_{d.major}{d.minor})" for d in devices)
