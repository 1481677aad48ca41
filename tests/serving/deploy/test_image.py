# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, read and not built: what it copies, calls and names exists, and what the builder is sent is no more than that."""

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from pipelines.cli import VERBS
from recsys.registry.location import HOME
from serving.app import create_app
from serving.engine import Engine
from serving.settings import PREFIX, Settings
from tests.serving.support import Switch

ROOT = Path(__file__).parents[3]
GENERATED = re.compile(r"__pycache__|\.egg-info|(^|/)\.")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its arguments, with continued lines put together."""
    lines = [line for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


def of(name: str) -> list[str]:
    return [arguments for each, arguments in instructions() if each == name]


def copied() -> list[str]:
    """What is copied from the project, and not from another stage."""
    return [source for arguments in of("COPY") if "--from" not in arguments for source in arguments.split()[:-1]]


def sent(path: str) -> bool:
    """Whether the builder is sent a file, by .dockerignore: the last pattern that fits a path, or a folder above it, decides."""
    found = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, ignored = line.removeprefix("!").rstrip("/"), not line.startswith("!")
        above = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        names = [Path(each).name if pattern.startswith("**/") else each for each in above]
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            found = not ignored
    return found


def variables() -> dict[str, str]:
    pairs = (shlex.split(arguments) for arguments in of("ENV"))
    return dict(pair.split("=", 1) for each in pairs for pair in each)


def test_there_are_two_stages_and_the_second_takes_the_environment_of_the_first() -> None:
    assert [arguments.split(" AS ")[1:] for arguments in of("FROM")] == [["build"], []]
    assert [arguments for arguments in of("COPY") if "--from" in arguments] == ["--from=build /opt/recsys /opt/recsys"]
    assert variables()["PATH"].startswith("/opt/recsys/bin:")


def test_what_is_copied_exists_and_is_sent() -> None:
    for source in copied():
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [each for each in path.rglob("*.*") if each.is_file() and "__pycache__" not in each.parts]
        files = [
            file for file in files if not any(part.startswith(".") or part.endswith(".egg-info") for part in file.parts[len(ROOT.parts) :])
        ]
        assert files and all(sent(str(file.relative_to(ROOT))) for file in files)


def test_every_package_is_copied() -> None:
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {f"{name}/" for name in packages} | {"pyproject.toml", PROJECT["project"]["readme"]} <= set(copied())


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".env",
        "runs/mlflow.db",
        "data/events.parquet",
        "tests/conftest.py",
        "access.json",
        "serving/.env",
        "notebooks/a.ipynb",
    ],
)
def test_nothing_else_is_sent(path: str) -> None:
    assert not sent(path)


def test_what_is_installed_is_pinned_and_named_by_the_project() -> None:
    (command,) = [arguments for arguments in of("RUN") if "constraints" in arguments]
    constraints, extras = re.search(r"-c (\S+)", command), re.search(r'"\.\[(.*?)\]"', command)
    assert constraints is not None and extras is not None
    for device in ("cpu", "gpu"):
        assert (ROOT / constraints[1].replace("${DEVICE}", device)).is_file()
        assert set(extras[1].replace("${DEVICE}", device).split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
    assert (ROOT / "vendor" / "fbgemm-gpu" / "pyproject.toml").is_file() and "./vendor/fbgemm-gpu" in command
    assert "DEVICE=cpu" in of("ARG")
    python = next(arguments.removeprefix("PYTHON=") for arguments in of("ARG") if arguments.startswith("PYTHON="))
    assert PROJECT["project"]["requires-python"] == f">={python}"


def test_it_runs_as_nobody_and_knows_no_secret() -> None:
    (user,) = of("USER")
    assert all(int(each) > 0 for each in user.split(":"))
    order = [name for name, _ in instructions()]
    assert "RUN" not in order[order.index("USER") :], "nothing is made after root was left"
    names = [*variables(), *(arguments.split("=")[0] for arguments in of("ARG"))]
    assert not [name for name in names if re.search(r"SECRET|PASSWORD|TOKEN|CREDENTIAL|_KEY", name)]


def test_what_it_sets_and_runs_exists() -> None:
    given = variables()
    settings = Settings.from_environment({name: value for name, value in given.items() if name.startswith(PREFIX)})
    assert of("EXPOSE") == [str(settings.port)] and of("VOLUME") == [given[HOME]] == of("WORKDIR")[-1:]
    assert Path(given["XDG_CACHE_HOME"]).is_relative_to(given[HOME])
    (command,) = map(json.loads, of("CMD"))
    assert command[0] in PROJECT["project"]["scripts"] and command[1] in VERBS


def test_its_health_is_a_route_of_the_server() -> None:
    (check,) = of("HEALTHCHECK")
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    assert url is not None
    settings = Settings.from_environment({name: value for name, value in variables().items() if name.startswith(PREFIX)})
    assert int(url[1]) == settings.port
    assert url[2] in create_app(Engine(Switch(), settings), Settings()).openapi()["paths"]
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
