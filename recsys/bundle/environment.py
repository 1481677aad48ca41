# SPDX-License-Identifier: Apache-2.0
"""Where a bundle comes from: the commit of the code and the versions of the libraries."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "faiss-cpu", "faiss-gpu", "polars", "pyarrow", "mlflow", "numpy")


def code_commit() -> str:
    """The commit of the checkout this package runs from, with ``+dirty`` where tracked files changed; ``unknown`` without git."""
    root = Path(__file__).parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
