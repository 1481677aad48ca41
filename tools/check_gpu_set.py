# SPDX-License-Identifier: Apache-2.0
"""Do the GPU requirements fit together? Asked of pip's resolver, from metadata alone: no wheel is downloaded.

pip reads a wheel's metadata through range requests or metadata files (``--use-feature=fast-deps``), and since 23.3 a dry run fetches
nothing else. A pip that can is put into an environment of its own, below ``.cache``. Runs on Linux only, for the Python that runs it.

The exit status is 0 where every requirement is met by one set of wheels. CUDA versions are reported as far as metadata tells them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = "requirements/dev-gpu.txt"  # requirements/gpu.txt, and the pins for developers with it
# Pins of the CPU set hold on a GPU as well, so that both run the same pure-Python packages.
CONSTRAINTS = "requirements/constraints-cpu.txt"
PIP = "pip>=24"
SET = ("torch", "fbgemm-gpu", "torchrec", "faiss-gpu", "triton")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the resolved versions as constraints")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error(f"the GPU wheels are made for Linux, this is {sys.platform}")
    resolved = resolve(new_pip(ROOT / ".cache" / "check-gpu-set"))
    if resolved is None:
        print("\nthe GPU requirements do NOT fit together", file=sys.stderr)
        return 1
    describe(resolved)
    if arguments.write:
        write_constraints(resolved, arguments.write)
    return 0


def new_pip(folder: Path) -> list[str]:
    """A pip that can resolve without downloading, as the beginning of a command."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-qq", PIP], check=True)
    return [str(python), "-m", "pip"]


def resolve(pip: list[str]) -> dict[str, dict[str, Any]] | None:
    """What would be installed, by normalised name: pip's report on each distribution. None where pip finds no set that fits."""
    with tempfile.TemporaryDirectory() as folder:
        report, exact = Path(folder, "report.json"), Path(folder, "exact.txt")
        # `===` compares text: a local CPU build, 2.13.0+cpu, is not taken for the GPU build that the index holds.
        exact.write_text(f"torch==={_pinned('torch')}\n")
        options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--use-feature=fast-deps", "-qq", "--report", str(report)]
        command = [*pip, "install", *options, "-c", CONSTRAINTS, "-c", str(exact), "-r", REQUIREMENTS]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            return None
        return {normalised(item["metadata"]["name"]): item for item in json.loads(report.read_text())["install"]}


def describe(resolved: dict[str, dict[str, Any]]) -> None:
    """Print the wheel of each member of the set, what it asks of the others, and its CUDA."""
    for name in SET:
        metadata = resolved[name]["metadata"]
        wheel = resolved[name]["download_info"]["url"].rsplit("/", 1)[-1]
        asks = [r for r in metadata.get("requires_dist", ()) if normalised(r) in SET and "extra ==" not in r]
        majors = cuda_majors(metadata.get("requires_dist", ()))
        print(f"{name} {metadata['version']}\n  wheel  {wheel}")
        print(f"  asks   {'; '.join(asks) or 'nothing of the others'}")
        print(f"  CUDA   {', '.join(sorted(majors)) or 'not declared'}")
    majors = cuda_majors([f"{name}=={item['metadata']['version']}" for name, item in resolved.items()])
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"\nthe GPU requirements fit together: {len(resolved)} distributions for Python {python}")
    if len(majors) > 1:
        print(f"they bring the runtimes of CUDA {' and '.join(sorted(majors))} side by side, under different names")


def cuda_majors(requirements: list[str]) -> set[str]:
    """The major versions of CUDA that requirements name: ``nvidia-...-cu12``, ``cuda-toolkit==13.0.3``."""
    found = set()
    for requirement in requirements:
        by_name = re.match(r"nvidia-[a-z-]+-cu(\d+)\b", requirement)
        by_version = re.match(r"cuda-toolkit(?:\[[^]]*\])?==(\d+)", requirement)
        found |= {match.group(1) for match in (by_name, by_version) if match and "extra ==" not in requirement}
    return found


def normalised(requirement: str) -> str:
    """The name that a requirement begins with, as indexes spell it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def write_constraints(resolved: dict[str, dict[str, Any]], file: Path) -> None:
    """Pin everything that was resolved, except this project itself."""
    pins = sorted(f"{name}=={item['metadata']['version']}" for name, item in resolved.items() if not item.get("is_direct"))
    header = "# Resolved by `make check-gpu-set` from metadata; not installed on a machine with a GPU yet."
    temporary = file.with_suffix(".tmp")
    temporary.write_text("\n".join([header, *pins]) + "\n")
    temporary.replace(file)


def _pinned(name: str) -> str:
    lines = (ROOT / CONSTRAINTS).read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{name}=="))


if __name__ == "__main__":
    sys.exit(main())
