# SPDX-License-Identifier: Apache-2.0
"""The command line: what it imports, which errors it prints, which status it returns."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pipelines import cli
from recsys.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A verb named ``probe``, whose ``main`` a test sets."""
    module = types.ModuleType("pipelines.cli.probe")
    monkeypatch.setitem(sys.modules, "pipelines.cli.probe", module)
    monkeypatch.setitem(cli.VERBS, "probe", "a verb of this test")
    monkeypatch.delenv("RECSYS_DEBUG", raising=False)
    return module


def test_help_lists_every_verb_and_imports_none() -> None:
    code = "import json, sys; from pipelines.cli import main; s = main(['--help']); print(json.dumps([s, *sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    status, *modules = json.loads(last)
    assert status == 0
    assert all(any(line.split()[:1] == [verb] and text in line for line in lines) for verb, text in cli.VERBS.items())
    assert not [module for module in modules if module.startswith("pipelines.cli.")]
    assert not {"torch", "numpy", "pydantic", "rich", "typer", "pyarrow", "yaml", "mlflow"} & set(modules)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_help_is_what_no_verb_gets(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("usage: recsys VERB")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["histroy"], 2)])
def test_the_package_runs_as_the_command_does(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, cli.main(arguments)) == (status, status)
    assert (done.stdout, done.stderr) == capsys.readouterr()


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["histroy"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("recsys: unknown verb 'histroy'; did you mean 'history'?")


def test_a_verb_gets_the_rest_of_the_line_and_gives_the_status(verb: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    verb.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "argv", ["recsys", "probe", "--x", "1"])
    assert cli.main() == 7
    assert seen == [["--x", "1"]]


def test_an_error_of_ours_is_one_line_and_status_2(verb: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> int:
        raise ConfigError("quickstart.yaml: blocks:\n  expected a number")

    verb.main = fail  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "recsys: quickstart.yaml: blocks: expected a number\n"


def test_the_line_is_red_on_a_terminal_only(
    verb: types.ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["nonsense"])
    assert capsys.readouterr().err.startswith("\033[31mrecsys: unknown verb 'nonsense'")
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["nonsense"])
    assert capsys.readouterr().err.startswith("recsys: ")


@pytest.mark.parametrize("error", [ConfigError("wrong"), KeyboardInterrupt()])
def test_debugging_shows_the_traceback(verb: types.ModuleType, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> int:
        raise error

    verb.main = fail  # type: ignore[attr-defined]
    monkeypatch.setenv("RECSYS_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_an_interrupt_has_its_own_status(verb: types.ModuleType) -> None:
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    verb.main = interrupt  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 130


def test_an_error_that_is_not_ours_is_not_hidden(verb: types.ModuleType) -> None:
    verb.main = lambda _: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_a_verb_whose_libraries_do_not_load_points_at_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('Could not load this library: fbgemm.so')")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.VERBS, "broken", "")
    assert cli.main(["broken"]) == 2
    assert capsys.readouterr().err == "recsys: broken: OSError: Could not load this library: fbgemm.so: recsys doctor says what is wrong\n"
