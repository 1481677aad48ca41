# SPDX-License-Identifier: Apache-2.0
"""The rules of this repository: headers, sizes, packages, commands that the README names, the Makefile, the list of allowed skips."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli import VERBS

ROOT = Path(__file__).parents[1]
PACKAGES = ("recsys", "kernels", "feature_store", "pipelines", "serving", "benchmarks")
GENERATED = {"build", "runs", "mlruns", "data", "__pycache__"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".j2", ".html", ".ipynb", ""}
MOST_LINES = 600

# What must not stand in a file: hosts of package registries, and folders of the machine that it was written on.
REGISTRY = re.compile(r"(?:pypi|pythonhosted|npmjs|anaconda|crates|debian)\.(?:org|io|com)\b|download\.pytorch\.org|data\.pyg\.org")
MACHINE = re.compile(r"(?<![\w.])/(?:work|root|farm|home/\w+|opt/(?:wheels|pypi)|Users/\w+)/")


def project_files() -> Iterator[Path]:
    """The files of the project, whether committed or not; nothing hidden or generated, except .ci."""
    for folder, folders, names in os.walk(ROOT):
        top = Path(folder) == ROOT
        hidden = {name for name in folders if name.startswith(".") and not (top and name == ".ci")}
        generated = {name for name in folders if (name in GENERATED and (top or name == "__pycache__")) or name.endswith(".egg-info")}
        folders[:] = sorted(set(folders) - hidden - generated)
        yield from (Path(folder, name) for name in sorted(names))


FILES = [file for file in project_files() if file.suffix in TEXT]
MODULES = [file for file in FILES if file.suffix == ".py"]


def short(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "DEVICE", "VENV", "TORCH_INDEX")
    clean = {key: value for key, value in os.environ.items() if key not in outer}
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)


def targets() -> set[str]:
    return {line.split()[1] for line in make("help").stdout.splitlines()}


# --- files


def test_the_walk_finds_the_project() -> None:
    assert {"recsys/core/config.py", "tests/test_house.py", ".ci/run", "Makefile", "README.md"} <= set(short(FILES))


def test_every_module_begins_with_its_licence() -> None:
    licence = "# SPDX-License-Identifier: Apache-2.0\n"
    assert short([file for file in MODULES if not file.read_text(encoding="utf-8").startswith(licence)]) == []


def test_no_module_is_longer_than_the_limit() -> None:
    assert short([file for file in MODULES if len(file.read_text(encoding="utf-8").splitlines()) > MOST_LINES]) == []


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for file in MODULES if file.relative_to(ROOT).parts[0] in PACKAGES}
    assert short(sorted(folder for folder in folders if not (folder / "__init__.py").is_file())) == []


@pytest.mark.parametrize("pattern", [REGISTRY, MACHINE], ids=["registry", "machine"])
def test_no_file_names_a_registry_or_a_folder_of_a_machine(pattern: re.Pattern[str]) -> None:
    found = []
    for file in FILES:
        lines = file.read_text(encoding="utf-8").splitlines()
        found += [f"{file.relative_to(ROOT)}:{number}: {m.group()}" for number, line in enumerate(lines, 1) if (m := pattern.search(line))]
    assert found == []


def test_the_patterns_can_find() -> None:
    host, folder = "files.pythonhosted" + ".org", "/wo" + "rk/main"
    assert REGISTRY.search(f"https://{host}/x") and MACHINE.search(f"see {folder}/README.md")
    assert not MACHINE.search("framework/main") and not MACHINE.search("docs/work/x")


# --- commands


def commands(page: Path) -> list[str]:
    """The lines of code in a Markdown page: fenced blocks and `spans`."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.strip() for block in blocks for line in block.splitlines()] + spans


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_pages_name_only_commands_that_exist(page: Path) -> None:
    asked = [(m.group(1), command) for command in commands(page) if (m := re.match(r"make (?:[A-Z_]+=\S+ )*([a-z][\w-]*)", command))]
    assert [command for target, command in asked if target not in targets()] == []
    verbs = [(m.group(1), command) for command in commands(page) if (m := re.match(r"recsys ([a-z]\w*)", command))]
    assert [command for verb, command in verbs if verb not in VERBS] == []


def test_the_table_of_verbs_and_the_modules_agree() -> None:
    modules = {file.stem for file in (ROOT / "pipelines" / "cli").glob("*.py") if not file.stem.startswith("_")}
    assert modules == set(VERBS)


def test_help_names_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony is not None and set(phony.group(1).split()) == targets()
    assert make().stdout == make("help").stdout


def test_setup_installs_once(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    first = make("-n", "setup", f"VENV={venv}").stdout
    assert f"-m venv {venv}" in first and "-c requirements/constraints-cpu.txt" in first and "-r requirements/cpu.txt" in first
    assert "index-url" not in first
    assert "--extra-index-url somewhere" in make("-n", "setup", f"VENV={venv}", "TORCH_INDEX=somewhere").stdout
    assert "constraints-gpu.txt" in make("-n", "setup", f"VENV={venv}", "DEVICE=gpu").stdout

    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / ".stamp-cpu").touch()
    assert "pip install" not in make("-n", "setup", f"VENV={venv}").stdout
    assert "-r requirements/dev-cpu.txt" in make("-n", "dev", f"VENV={venv}").stdout

    other = make("setup", f"VENV={venv}", "DEVICE=gpu")
    assert other.returncode != 0 and "was made for another device" in other.stderr
    assert make("setup", "DEVICE=tpu").stderr.count("expected cpu or gpu") == 1


def test_a_change_of_the_requirements_makes_setup_work_again(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / ".stamp-cpu").touch()
    os.utime(tmp_path / ".stamp-cpu", (0, 0))
    assert "pip install" in make("-n", "setup", f"VENV={tmp_path}").stdout


def test_ci_runs_the_tests_from_anywhere() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "set -euo pipefail" in script.read_text() and "make test" in script.read_text()


# --- skips

SUITE = """
import pytest

@pytest.mark.skip(reason="needs a GPU")
@pytest.mark.parametrize("x", [1, 2])
def test_gpu(x): ...

@pytest.mark.xfail(reason="not a skip")
def test_wrong(): assert False

def test_right(): ...
"""


def run_pytest(folder: Path, *arguments: str, workers: int = 0, **environment: str) -> tuple[int, str]:
    """Status and output of a session of its own; only the plugins that it needs are loaded."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    plugins = ["-p", "xdist", "-n", str(workers)] if workers else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", *plugins, *arguments, str(folder)]
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A small suite under this repository's conftest, with an empty list."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "allowed_skips.txt").write_text("")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_only_listed_skips_pass(suite: Path, workers: int) -> None:
    (suite / "test_file.py").write_text("import pytest\npytest.importorskip('no_such_library')\ndef test(): ...")
    status, output = run_pytest(suite, workers=workers)
    assert status == 1
    assert "test_suite.py::test_gpu[1] | needs a GPU" in output and "test_suite.py::test_gpu[2] | needs a GPU" in output
    assert "test_file.py | could not import 'no_such_library'" in output
    assert "test_wrong |" not in output
    assert "1 passed, 3 skipped, 1 xfailed" in output

    (suite / "allowed_skips.txt").write_text("# a comment\n\ntest_suite.py::test_gpu | a GPU\ntest_file.py | 'no_such_library'\n")
    status, output = run_pytest(suite, workers=workers)
    assert status == 0 and "1 passed, 3 skipped, 1 xfailed" in output and "does not list" not in output


def test_an_entry_allows_its_own_test_and_reason_only(suite: Path) -> None:
    entries = ["test_suite.py::test_gpu[1] | a GPU", "test_suite.py::test_gpu | no network", "test_suite.py | a GPU"]
    (suite / "allowed_skips.txt").write_text("\n".join(entries))
    status, output = run_pytest(suite)
    assert status == 1
    assert "test_gpu[2] | needs a GPU" in output and "test_gpu[1] | needs a GPU" not in output


def test_a_malformed_entry_is_refused(suite: Path) -> None:
    (suite / "allowed_skips.txt").write_text("test_suite.py::test_gpu\n")
    status, output = run_pytest(suite)
    assert status == 4 and "allowed_skips.txt:1: expected `node id | part of the reason`" in output


def test_interpreted_kernels_have_a_process_of_their_own(suite: Path) -> None:
    folder = suite / "kernels" / "interpreter"
    folder.mkdir(parents=True)
    (folder / "test_kernel.py").write_text("import os\ndef test_on(): assert os.environ['TRITON_INTERPRET'] == '1'")
    (suite / "kernels" / "test_other.py").write_text("import os\ndef test_off(): assert 'TRITON_INTERPRET' not in os.environ")
    (suite / "test_suite.py").unlink()
    status, output = run_pytest(suite, "-v")
    assert status == 0 and "test_off PASSED" in output and "test_on" not in output
    for where in (suite, folder):
        status, output = run_pytest(where, "-v", f"--rootdir={suite}", TRITON_INTERPRET="1")
        assert status == 0 and "test_on PASSED" in output and "test_off" not in output


def test_tests_run_on_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    assert os.environ["POLARS_MAX_THREADS"]
