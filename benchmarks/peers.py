# SPDX-License-Identifier: Apache-2.0
"""Environments of peers whose pins clash with ours: ``python -m benchmarks.peers`` (``make peers``) builds them below ``.peers/``."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / ".peers"
REQUIREMENTS = {
    "rechub": ("torch==2.13.0", "torch-rechub[bigdata]==0.9.0", "numpy>=1.26"),
    "fuxictr": ("torch==2.13.0", "fuxictr==2.3.10", "numpy>=2", "pandas<3", "aiohttp>=3"),
    "feast": ("feast[redis,duckdb]==0.67.*", "pandas<3", "polars==2.1.0", "pyyaml"),
}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, or our own for ``ours``.

    Raises:
        RuntimeError: the environment was not built.
    """
    if name == "ours":
        return Path(sys.executable)
    python = ROOT / name / "bin" / "python"
    if not python.exists():
        raise RuntimeError(f"the environment of {name} is not there; build it with: make peers")
    return python


def build(name: str) -> None:
    """Create an environment, or leave it as it is if it is complete."""
    folder = ROOT / name
    done = folder / "complete"
    wanted = "\n".join(REQUIREMENTS[name])
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        print(f"{name}: there already")
        return
    print(f"{name}: installing {', '.join(REQUIREMENTS[name])}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=True)
    done.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    for peer in REQUIREMENTS:
        build(peer)
