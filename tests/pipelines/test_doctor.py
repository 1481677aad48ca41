# SPDX-License-Identifier: Apache-2.0
"""`recsys doctor` beside libraries that are absent, broken, in a clash, or hang."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from pipelines.doctor import examine
from pipelines.doctor.child import run_probe
from pipelines.doctor.probes.torch import freed_memory
from pipelines.doctor.supported import ROOT, SUPPORTED, environment_device, install, reinstall

LIBRARIES = {library.name: library for library in SUPPORTED}
DEVICE = environment_device()
FAISS = LIBRARIES["faiss"].distribution(DEVICE)
START = "import sys; from pipelines.cli import main; sys.exit(main())"


def doctor(*arguments: str, path: Path | None = None, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, with ``path`` before everything else on the import path."""
    search = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    command = [python, "-c", START, "doctor", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": search, **environment}, capture_output=True, text=True, timeout=120)


def report(*arguments: str, **options: Any) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    done = doctor("--json", *arguments, **options)
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    return done.returncode, document, {row["name"]: row for row in document["rows"]}


def fake_module(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def fake_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_healthy_library_is_tried_and_the_status_is_0() -> None:
    status, document, rows = report("--only", "faiss", "python", "packages")
    assert (status, document["ok"]) == (0, True)
    assert {row["state"] for row in rows.values()} == {"ok"}
    assert rows["faiss"]["version"] == rows["faiss"]["supported"] == "1.15.1"
    assert rows["faiss"]["can"]["exact search"] == "works"


@pytest.mark.parametrize(("library", "asked", "expected"), [("glibc", "1", "kept"), ("glibc", "0", "not kept"), ("", "1", "not kept")])
def test_whether_freed_memory_is_kept_is_told(monkeypatch: pytest.MonkeyPatch, library: str, asked: str, expected: str) -> None:
    monkeypatch.setenv("RECSYS_KEEP_MEMORY", asked)
    monkeypatch.setattr("platform.libc_ver", lambda: (library, "2"))
    assert freed_memory().startswith(expected)


@pytest.mark.slow
def test_this_whole_environment_is_healthy() -> None:
    status, document, rows = report()
    assert (status, document["ok"]) == (0, True), document
    assert set(rows) == set(examine.PARTS)
    assert all(rows[name]["can"] for name in LIBRARIES)
    assert "interpreter" in rows["triton"]["can"] and any(what.startswith("compiler") for what in rows["triton"]["can"])


def test_a_person_reads_the_problem_and_the_command_on_lines_of_their_own(tmp_path: Path) -> None:
    fake_module(tmp_path, "faiss", "raise OSError('libfaiss.so: [no] such file')")
    done = doctor("--only", "faiss", "python", path=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    problem = lines.index("faiss: OSError: libfaiss.so: [no] such file")
    assert lines[problem + 1].strip() == reinstall(LIBRARIES["faiss"], DEVICE)
    assert lines[-1] == "something required is broken"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('Could not load this library: fbgemm_gpu_config.so')", "built for another torch"),
        ("import os; os.abort()", "died of SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("import os; os._exit(0)", "ended with status 0"),
        ("import sys; sys.exit('gone')", "gone"),
        ("print('outcome')\n__version__ = '1.15.1'", "exact search"),
        ("from numpy import *\n__version__ = '1.15.1'\nclass IndexFlatIP: __init__ = lambda self, d: 1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_broken_library_is_named_with_its_error_and_its_mend(tmp_path: Path, source: str, said: str) -> None:
    fake_module(tmp_path, "faiss", source)
    status, document, rows = report("--only", "faiss", path=tmp_path)
    assert (status, document["ok"], rows["faiss"]["state"]) == (1, False, "broken")
    (problem, *others) = rows["faiss"]["problems"]
    assert said in problem["what"] or any(said in other["what"] for other in others)
    assert problem["mend"].endswith(f"-m pip install --force-reinstall --no-deps {FAISS}==1.15.1")


def test_a_library_that_hangs_is_killed_at_the_timeout(tmp_path: Path) -> None:
    fake_module(tmp_path, "faiss", f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    status, _, rows = report("--only", "faiss", "--timeout", "3", path=tmp_path)
    assert status == 1
    assert rows["faiss"]["problems"][0]["what"] == "no answer within 3 s (--timeout)"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_wrong_version_is_told_from_metadata_and_the_set_is_the_mend(tmp_path: Path) -> None:
    fake_distribution(tmp_path, FAISS, "1.9.0")
    status, _, rows = report("--only", "faiss", path=tmp_path)
    assert status == 1
    (problem,) = rows["faiss"]["problems"]
    assert problem["what"] == f"{FAISS} 1.9.0: the set that fits together has 1.15.1"
    assert problem["mend"] == install(LIBRARIES["faiss"], DEVICE)
    folder, command = problem["mend"].split(" && ")
    assert Path(shlex.split(folder)[1]) == ROOT
    assert all((ROOT / part).is_file() for part in shlex.split(command) if part.startswith("requirements/"))


def test_metadata_that_disagrees_with_what_is_imported(tmp_path: Path) -> None:
    fake_module(tmp_path, "faiss", "__version__ = '1.7.0'\nomp_get_max_threads = lambda: 1")
    _, _, rows = report("--only", "faiss", path=tmp_path)
    assert "imports as 1.7.0: the set that fits together has 1.15.1" in [problem["what"] for problem in rows["faiss"]["problems"]]


def test_a_local_part_of_the_version_does_not_count() -> None:
    assert LIBRARIES["torch"].is_supported("2.13.0+cpu") and not LIBRARIES["torch"].is_supported("2.13.1")


@pytest.mark.parametrize(("version", "clash"), [("1.8.0+cpu.shim", False), ("1.8.0", True)])
def test_both_builds_of_fbgemm_clash_but_the_shim_does_not(tmp_path: Path, version: str, clash: bool) -> None:
    fake_distribution(tmp_path, "fbgemm-gpu-cpu", "1.8.0")
    fake_distribution(tmp_path, "fbgemm-gpu", version)
    fake_module(tmp_path, "fbgemm_gpu", "raise OSError('Could not load this library: fbgemm_gpu_config.so')")
    status, _, rows = report("--only", "fbgemm", path=tmp_path)
    first, *_ = rows["fbgemm"]["problems"]
    assert status == 1
    assert (first["what"] == "both fbgemm-gpu-cpu 1.8.0 and fbgemm-gpu 1.8.0: they share one import folder") is clash
    assert ("uninstall --yes fbgemm-gpu-cpu fbgemm-gpu && cd " in first["mend"]) is clash


def test_a_foreign_distribution_named_kernels(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "kernels", "0.11.0")
    status, _, rows = report("--only", "packages", path=tmp_path)
    assert status == 1
    (problem,) = rows["packages"]["problems"]
    assert "`kernels` 0.11.0 is not ours" in problem["what"] and problem["mend"].endswith("-m pip uninstall --yes kernels")


def test_without_a_compiler_it_notes_what_torch_compile_needs() -> None:
    status, document, rows = report("--only", "compiler", CXX="no-such-compiler")
    assert (status, document["ok"], rows["compiler"]["state"]) == (0, True, "note")
    assert rows["compiler"]["problems"][0]["mend"] == "apt-get install --yes g++"


def test_a_compiler_that_fails_is_noted(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal: no omp.h' >&2; exit 1\n")
    broken.chmod(0o755)
    _, _, rows = report("--only", "compiler", CXX=str(broken))
    assert rows["compiler"]["problems"][0]["what"].startswith("fatal: no omp.h")


def test_an_empty_environment_gets_an_answer_with_the_command_for_each_library(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    status, document, rows = report(python=python)
    assert (status, document["ok"]) == (1, False)
    for name, library in LIBRARIES.items():
        (problem,) = rows[name]["problems"]
        assert problem["what"] == "not installed"
        needed = document["device"] in library.needed_on
        assert problem["required"] is needed
        assert problem["mend"].startswith(f"cd {ROOT} && {python} -m pip" if needed else f"{python} -m pip install {library.name}==")
    plain = doctor("--only", "torch", "python", python=python)
    assert plain.returncode == 1 and "torch: not installed" in plain.stdout  # not even rich is there


def test_the_calling_process_imports_none_of_what_it_probes() -> None:
    check = "import json, sys; from pipelines.cli import main; main(['doctor', '--only', 'faiss']); print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "pipelines.doctor.examine" in modules
    assert not modules & {"numpy", *(library.module for library in SUPPORTED)}


def test_an_unknown_part_is_refused() -> None:
    done = doctor("--only", "keras")
    assert done.returncode == 2 and "keras" in done.stderr


def test_a_probe_reads_no_module_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(tmp_path, "faiss", "raise OSError('a stray folder')")
    monkeypatch.chdir(tmp_path)
    assert run_probe("faiss", timeout=60).error is None


def test_the_table_is_what_the_requirements_pin() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for device in ("cpu", "gpu"):
        pins = dict(requirement.split("==") for requirement in extras[device])
        expected = {library.distribution(device): library.version for library in SUPPORTED if device in library.needed_on}
        assert pins == expected
        lines = (ROOT / "requirements" / f"constraints-{device}.txt").read_text().splitlines()
        constraints = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        assert {name: constraints[name] for name in expected} == expected
