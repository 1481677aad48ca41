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
    "bentoml": ("bentoml==1.4.40",),
    "litserve": ("litserve==0.2.19",),
}
OVER_OURS = frozenset({"bentoml", "litserve"})
"""Environments that hold what differs and find the rest in ours: servers behind which our models run."""


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
    if name in OVER_OURS:
        (Path(_site(folder / "bin" / "python")) / "ours.pth").write_text(_site(sys.executable) + "\n", encoding="utf-8")
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=True)
    done.write_text(wanted, encoding="utf-8")


def _site(python: Path | str) -> str:
    """Where an interpreter's libraries are."""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    for peer in REQUIREMENTS:
        build(peer)
