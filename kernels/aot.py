# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel ahead of time, without a GPU, and report what it takes: registers, shared memory, spills, occupancy.

    python -m kernels.aot [--arch sm_80,sm_90,sm_100] [--json]

The exit status is 1 if a kernel spills registers or does not fit the shared memory of its architecture.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.op import KernelSpec
from kernels.registry import OPS
from kernels.shapes import RECIPES

ARCHITECTURES = (80, 90, 100)
# NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": the most shared memory that one block can use, of
# which each takes a KiB more of its multiprocessor; and what a multiprocessor has.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_EACH, REGISTERS, WARPS, BLOCKS, LANES = 1024, 65536, 64, 32, 32
_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+).*?LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        kernel: its name.
        arch: 90 for sm_90.
        registers: of a thread.
        shared: bytes of a block.
        spilled: bytes of stack and local memory of a thread.
        warps: of a block.
    """

    kernel: str
    arch: int
    registers: int
    shared: int
    spilled: int
    warps: int

    @property
    def fits(self) -> bool:
        """Whether nothing spills and the shared memory suffices."""
        return self.spilled == 0 and self.shared <= SHARED_LIMIT[self.arch]

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds at once, by registers (given in units of 8 for each thread), shared memory and warps."""
        by_registers = REGISTERS // (max(-(-self.registers // 8) * 8, 8) * LANES * self.warps)
        by_shared = (SHARED_LIMIT[self.arch] + SHARED_EACH) // (self.shared + SHARED_EACH)
        return min(by_registers, by_shared, WARPS // self.warps, BLOCKS)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that are there, an estimate: at most, whatever waits."""
        return self.resident * self.warps / WARPS


def compile_spec(spec: KernelSpec, arch: int) -> Usage:
    """Compile one specialisation for ``sm_<arch>`` and read its resource usage from the cubins.

    At run time Triton compiles anew for addresses and sizes that 16 divides, which most are, and then loads more at once. So both are
    compiled here, and the larger figures count.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the compiler, or ``cuobjdump`` says nothing of the kernel.
    """
    plain, aligned = (_compiled(spec, arch, aligned) for aligned in (False, True))
    most = {name: max(getattr(plain, name), getattr(aligned, name)) for name in ("registers", "shared", "spilled")}
    return Usage(spec.name, arch, **most, warps=spec.num_warps)


def _compiled(spec: KernelSpec, arch: int, aligned: bool) -> Usage:
    """The usage where nothing is known of addresses and sizes, or where 16 divides all.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the compiler, or ``cuobjdump`` says nothing of the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(spec.kernel, JITFunction):
        raise RuntimeError(f"{spec.name}: kernels are interpreted in this process; unset TRITON_INTERPRET")
    attributes = {
        (spec.kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in spec.signature.items()
        if aligned and (kind.startswith("*") or kind in ("i32", "i64"))
    }
    source = ASTSource(fn=spec.kernel, signature=spec.signature, constexprs=spec.constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(printed)
    if found is None:
        raise RuntimeError(f"{spec.name}: cuobjdump printed no resource usage: {printed!r}")
    spilled = int(found["stack"]) + int(found["local"])
    return Usage(spec.name, arch, int(found["registers"]), int(compiled.metadata.shared), spilled, spec.num_warps)


def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump: neither inside the triton package nor on PATH")
    return found


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Usage]:
    """Compile all ops at the shapes of the recipes for all architectures."""
    specs = [spec for op in OPS for spec in op.specs(RECIPES[op.name])]
    return [compile_spec(spec, arch) for spec in specs for arch in architectures]


def architectures(names: str) -> tuple[int, ...]:
    """The numbers of architectures by their names, ``sm_90`` or ``90``, with commas between them.

    Raises:
        ArgumentTypeError: one is not known.
    """
    found = tuple(int(name.strip().removeprefix("sm_")) for name in names.split(","))
    if unknown := set(found) - set(SHARED_LIMIT):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(f'sm_{one}' for one in SHARED_LIMIT)}, got sm_{min(unknown)}")
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument(
        "--arch", type=architectures, default=ARCHITECTURES, metavar="SM,…", help="such as sm_80,sm_90 or 90; by default all"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line for each kernel")
    arguments = parser.parse_args()
    usages = compile_all(arguments.arch)
    for usage in usages:
        if arguments.json:
            print(json.dumps(asdict(usage) | {"occupancy": usage.occupancy}))
        else:
            taken = f"{usage.registers:4} registers {usage.shared:7} B shared {usage.spilled:4} B spilled {usage.occupancy:4.0%} occupancy"
            print(f"{usage.kernel:48} sm_{usage.arch:<4} {taken}{'' if usage.fits else '  <- does not fit'}")
    return 0 if all(usage.fits for usage in usages) else 1


if __name__ == "__main__":
    sys.exit(main())
