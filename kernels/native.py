# SPDX-License-Identifier: Apache-2.0
"""C++ beside the ops that need a loop of their own on the CPU: compiled on the machine that runs it, kept by content, called by ctypes.

The sources have a plain C interface and no dependency, so that g++ is done within a second or two and the result is of no torch version.
Where there is no compiler, or ``RECSYS_NATIVE=0`` says so, the callers have another way; nothing here raises.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

ENV = "RECSYS_NATIVE"
_SHARED = Path(__file__).with_name("native.h")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where compiled libraries stand: ``$XDG_CACHE_HOME/recsys/native``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recsys" / "native"


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C++ source; None where there cannot be one, which is logged once."""
    if os.environ.get(ENV) == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # a process may have no home to keep it in
        _LOG.warning("%s: not compiled, a slower way is taken: %s", source.name, _why(error))
        return None


def call(source: Path, name: str, *arguments: Tensor | int | float | None) -> int:
    """Call a function of a compiled source, which there must be: tensors, contiguous ones, go as their addresses, None as a null pointer.

    Returns:
        The function's int64, where it returns one.
    """
    found: int = _function(source, name, tuple(map(_kind, arguments)))(
        *[given.data_ptr() if isinstance(given, Tensor) else given for given in arguments]
    )
    return found


def _kind(given: Tensor | int | float | None) -> type[ctypes.c_int64] | type[ctypes.c_double] | type[ctypes.c_void_p]:
    if isinstance(given, float):
        return ctypes.c_double
    return ctypes.c_int64 if isinstance(given, int) else ctypes.c_void_p


@cache
def _function(source: Path, name: str, kinds: tuple[Any, ...]) -> Callable[..., int]:
    library = load(source)
    assert library is not None
    function = library[name]  # an object of its own at each look-up, so that another caller's types do not change
    function.argtypes, function.restype = kinds, ctypes.c_int64
    return function


def _compiled(source: Path) -> Path:
    """The library's file, compiled where it is not there yet."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: expected g++ or clang++ on PATH, or CXX")
    text = source.read_bytes()
    key = hashlib.sha256(
        b"\0".join((text, _SHARED.read_bytes(), compiler.encode(), " ".join(_FLAGS).encode(), _machine().encode()))
    ).hexdigest()[:24]
    target = cache_folder() / f"{source.parent.name}-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *_FLAGS, "-I", str(_SHARED.parent), str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(target)
    return target


def _machine() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _why(error: Exception) -> str:
    return str(error.stderr).strip()[-500:] if isinstance(error, subprocess.CalledProcessError) else str(error)
