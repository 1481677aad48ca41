# SPDX-License-Identifier: Apache-2.0
"""From metadata and probes to a report: a row for each part, and a problem with its mend for whatever is wrong."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from pipelines.doctor.child import Outcome, run_probe
from pipelines.doctor.supported import (
    PYTHON,
    ROOT,
    SUPPORTED,
    Device,
    Library,
    environment_device,
    install,
    installed_version,
    nvidia_driver,
    reinstall,
    uninstall,
)

# What can be examined.
PARTS = ("python", "packages", "compiler", *(library.name for library in SUPPORTED))


@dataclass(frozen=True)
class Problem:
    """What is wrong, the exact command that mends it, and whether the product needs it."""

    what: str
    mend: str
    required: bool = True


@dataclass
class Row:
    """One part of the environment: its version, the supported one, what it can do here, and what is wrong with it."""

    name: str
    version: str | None = None
    supported: str | None = None
    can: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def state(self) -> str:
        """``ok``; ``broken`` where something required is wrong; ``note`` where something else is."""
        if not self.problems:
            return "ok"
        return "broken" if any(problem.required for problem in self.problems) else "note"


@dataclass
class Report:
    """The whole examination."""

    device: Device
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether everything required works."""
        return all(row.state != "broken" for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": self.ok, "device": self.device, "rows": [asdict(row) | {"state": row.state} for row in self.rows]}


def examine(only: Collection[str] = (), *, timeout: float) -> Report:
    """Examine this environment.

    Args:
        only: the parts to look at, all by default.
        timeout: seconds that each probe has.
    """
    device = environment_device()
    checks: dict[str, Callable[[], Row]] = {"python": python, "packages": packages, "compiler": partial(compiler, timeout)}
    for library in SUPPORTED:
        checks[library.name] = partial(examine_library, library, device, timeout)
    chosen = [check for name, check in checks.items() if not only or name in only]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return Report(device, list(pool.map(lambda check: check(), chosen)))


def python() -> Row:
    """The interpreter and the cores."""
    lowest, highest = (".".join(map(str, version)) for version in PYTHON)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    cores = f"{os.cpu_count()}, of which {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 'all'} usable"
    row = Row("python", platform.python_version(), f"{lowest} to {highest}", {"cores": cores, "OMP_NUM_THREADS": threads})
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        mend = f"make -C {shlex.quote(str(ROOT))} clean setup PYTHON=python{lowest}"
        row.problems.append(Problem(f"Python {row.version}: expected {row.supported}", mend))
    return row


def packages() -> Row:
    """Our top-level packages, whose names other distributions may claim."""
    row = Row("packages", installed_version("recsys-scaling"))
    foreign = installed_version("kernels")
    if foreign is not None:
        what = f"the distribution `kernels` {foreign} is not ours, and lands on the import name of our folder kernels/"
        row.problems.append(Problem(what, uninstall("kernels")))
    return row


def compiler(timeout: float) -> Row:
    """The C++ compiler, which only torch.compile needs: with OpenMP, and Python's headers."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    row = Row("compiler", can={} if found is None else {"C++ compiler": found})
    without = "torch.compile cannot build CPU kernels"
    if found is None:
        row.problems.append(Problem(f"no C++ compiler {name!r}: {without}", "apt-get install --yes g++", required=False))
        return row
    command = [found, "-x", "c++", "-fopenmp", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    try:
        done = subprocess.run(command, input="#include <omp.h>\n#include <Python.h>\n", capture_output=True, text=True, timeout=timeout)
        error = next(iter(done.stderr.splitlines()), "failed") if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as failure:
        error = str(failure)
    if error is not None:
        row.problems.append(Problem(f"{error}: {without}", "apt-get install --yes g++ python3-dev", required=False))
    return row


def examine_library(library: Library, device: Device, timeout: float) -> Row:
    """One library: its metadata, then its probes."""
    installed = library.installed()
    required = device in library.needed_on
    row = Row(library.name, next(iter(installed.values()), None), library.version)
    if not installed and find_spec(library.module) is None:
        row.problems.append(Problem("not installed", install(library, device), required))
        return row
    row.problems += [Problem(what, mend, required) for what, mend in _metadata_problems(library, installed, device)]
    for outcome in _triton(timeout) if library.name == "triton" else [run_probe(library.name, timeout=timeout)]:
        row.version = row.version or outcome.version
        row.can.update(outcome.can)
        row.problems += [Problem(what, mend, required) for what, mend in _probe_problems(library, outcome, installed, device)]
    if library.name == "torch" and nvidia_driver() and device == "cpu":
        mend = f"make -C {shlex.quote(str(ROOT))} setup DEVICE=gpu VENV=.venv-gpu"
        row.problems.append(Problem("this machine has an NVIDIA GPU, and this environment was made for a CPU", mend, required=False))
    return row


def _triton(timeout: float) -> Sequence[Outcome]:
    """Interpreter and compiler exclude each other in one process. A fresh cache, so that the compiler has to work."""
    with tempfile.TemporaryDirectory() as cache:
        return [
            run_probe("triton_interpreter", timeout=timeout, environment={"TRITON_INTERPRET": "1"}),
            run_probe("triton_compiler", timeout=timeout, environment={"TRITON_CACHE_DIR": cache}),
        ]


def _metadata_problems(library: Library, installed: dict[str, str], device: Device) -> list[tuple[str, str]]:
    if len(installed) > 1:
        both = " and ".join(f"{name} {version}" for name, version in installed.items())
        return [(f"both {both}: they share one import folder", f"{uninstall(*installed)} && {install(library, device)}")]
    wrong = [(name, version) for name, version in installed.items() if not library.is_supported(version)]
    return [(f"{name} {version}: the set that fits together has {library.version}", install(library, device)) for name, version in wrong]


def _probe_problems(library: Library, outcome: Outcome, installed: dict[str, str], device: Device) -> list[tuple[str, str]]:
    if outcome.missing is not None:
        return [(str(outcome.error), install(library, device))]
    errors = [f"cannot {what}: {reason}" for what, reason in outcome.cannot.items()]
    if outcome.error is not None:
        foreign_abi = "Could not load this library" in outcome.error
        errors.append(f"{outcome.error}{' (it was built for another torch)' if foreign_abi else ''}")
    if outcome.version is not None and not library.is_supported(outcome.version) and all(map(library.is_supported, installed.values())):
        errors.append(f"imports as {outcome.version}: the set that fits together has {library.version}")
    return [(error, reinstall(library, device)) for error in errors]
