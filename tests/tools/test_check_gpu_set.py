# SPDX-License-Identifier: Apache-2.0
"""The check of the GPU requirements, with a pip that answers from a table instead of an index."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

WHEELS = {
    "torch": ("2.13.0", ["triton==3.7.1; platform_system == 'Linux'", "cuda-toolkit[cublas]==13.0.3; platform_system == 'Linux'", "sympy"]),
    "fbgemm_gpu": ("1.8.0", ["numpy"]),
    "torchrec": ("1.8.0", ["fbgemm-gpu", "iopath; extra == 'datasets'"]),
    "faiss-gpu": ("1.15.1", ["nvidia-cublas-cu12<13,>=12.6"]),
    "triton": ("3.7.1", []),
    "cuda-toolkit": ("13.0.3.0", []),
    "nvidia-cublas-cu12": ("12.9.3", []),
}
FAKE_PIP = """
import json, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2:]))
report = pathlib.Path(sys.argv[sys.argv.index("--report") + 1])
report.write_text({report!r})
sys.exit({status})
"""


@pytest.fixture
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "check_gpu_set.py"))


def pip(folder: Path, status: int = 0) -> list[str]:
    """The beginning of a command that notes its arguments in ``arguments.json`` and reports `WHEELS`."""
    install = [
        {
            "metadata": {"name": name, "version": version, "requires_dist": requires},
            "download_info": {"url": f"index/{name}-{version}-cp311-cp311-manylinux_2_28_x86_64.whl"},
        }
        for name, (version, requires) in WHEELS.items()
    ]
    own = {"metadata": {"name": "recsys-scaling", "version": "0.1.0"}, "download_info": {"url": "here"}, "is_direct": True}
    script = folder / "pip.py"
    script.write_text(FAKE_PIP.format(report=json.dumps({"install": [*install, own]}), status=status))
    return [sys.executable, str(script), str(folder / "arguments.json")]


def test_a_set_that_fits_is_described_and_pinned(tool: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = tool["resolve"](pip(tmp_path))
    tool["describe"](resolved)
    said = capsys.readouterr().out
    assert "fbgemm-gpu 1.8.0\n  wheel  fbgemm_gpu-1.8.0-cp311-cp311-manylinux_2_28_x86_64.whl\n" in said
    assert "torchrec 1.8.0" in said and "asks   fbgemm-gpu\n" in said
    assert "CUDA   13" in said and "CUDA   12" in said and "CUDA   not declared" in said
    assert "CUDA 12 and 13 side by side" in said

    tool["write_constraints"](resolved, tmp_path / "constraints.txt")
    header, *pins = (tmp_path / "constraints.txt").read_text().splitlines()
    assert header.startswith("#") and "fbgemm-gpu==1.8.0" in pins and len(pins) == len(WHEELS)


def test_nothing_is_downloaded_and_no_cpu_build_is_taken(tool: dict[str, Any], tmp_path: Path) -> None:
    tool["resolve"](pip(tmp_path))
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert {"--dry-run", "--ignore-installed", "--only-binary=:all:", "--use-feature=fast-deps"} <= set(arguments)
    assert (ROOT / arguments[arguments.index("-r") + 1]).is_file() and arguments.count("-c") == 2


def test_a_set_that_does_not_fit(tool: dict[str, Any], tmp_path: Path) -> None:
    assert tool["resolve"](pip(tmp_path, status=1)) is None


@pytest.mark.parametrize(
    ("requirement", "majors"),
    [
        ("nvidia-cuda-runtime-cu12<13,>=12.6", {"12"}),
        ("nvidia-cudnn-cu13==9.20.0.48; platform_system == 'Linux'", {"13"}),
        ("cuda-toolkit[cublas,cudart]==13.0.3; platform_system == 'Linux'", {"13"}),
        ("cuda-toolkit==12.*; extra == 'all'", set()),
        ("nvidia-cublas", set()),
        ("numpy", set()),
    ],
)
def test_cuda_majors(tool: dict[str, Any], requirement: str, majors: set[str]) -> None:
    assert tool["cuda_majors"]([requirement]) == majors
