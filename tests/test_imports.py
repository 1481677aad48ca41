# SPDX-License-Identifier: Apache-2.0
"""Imports run downwards only, as docs/architecture.md draws it. Imports inside functions and under TYPE_CHECKING count."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a package may import of ours, besides itself. Nothing of ours may import what is not listed here: benchmarks, tools, tests.
MAY_IMPORT = {
    "kernels": set(),
    "recsys": {"kernels"},
    "feature_store": {"recsys.core"},
    "pipelines": {"recsys", "feature_store", "kernels"},
    "serving": {"recsys", "feature_store", "kernels"},
    "benchmarks": {"recsys", "feature_store", "kernels", "pipelines", "serving"},
    "tools": set(),
}

# Inside recsys, from the floor up: a package imports from the levels below its own.
LEVELS = (
    {"core"},
    {"data"},
    {"embedding", "layers"},
    {"efficiency"},
    {"ranking", "retrieval", "text"},
    {"training", "evaluation"},
    {"bundle", "scaling"},
    {"inference"},
    {"decisions"},
    {"registry"},
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
DATA_ONLY = {"recipes"}
NOT_IN_CORE = {"torch", "torchrec", "fbgemm_gpu", "triton", "faiss"}


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports; ``from a import b`` is ``a.b``, whether b is a module or not."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def violations(root: Path) -> list[str]:
    """Every import against the rules below ``root``, as ``file:line imports name: why``."""
    found = []
    for package, allowed in MAY_IMPORT.items():
        for file in sorted((root / package).rglob("*.py")):
            for line, name in imports(file, root):
                why = _why_not(package, file.relative_to(root).parts, allowed, name)
                if why:
                    found.append(f"{file.relative_to(root)}:{line} imports {name}: {why}")
    return found


def _why_not(package: str, parts: tuple[str, ...], allowed: set[str], name: str) -> str | None:
    target = name.split(".")
    if parts[:2] == ("recsys", "core") and target[0] in NOT_IN_CORE:
        return "recsys.core is free of it"
    if target[0] == "tests" or (target[0] in MAY_IMPORT and target[0] != package and not _within(target, allowed)):
        return f"{package} may import {', '.join(sorted(allowed)) or 'nothing of ours'}"
    if package == "recsys" and target[0] == "recsys" and len(parts) == 2:
        return "recsys/__init__.py imports nothing"
    own, other = (LEVEL.get(path[1]) if path[0] == "recsys" and len(path) > 1 else None for path in (parts, target))
    if own is not None and other is not None and parts[1] != target[1] and other >= own:
        return f"recsys.{target[1]} does not stand below recsys.{parts[1]}"
    return None


def _within(target: list[str], allowed: set[str]) -> bool:
    return any(target[: len(prefix)] == prefix for prefix in (name.split(".") for name in allowed))


def test_imports_run_downwards() -> None:
    assert violations(ROOT) == []


def test_every_package_of_recsys_has_its_level() -> None:
    packages = {file.parent.name for file in (ROOT / "recsys").glob("*/__init__.py")}
    assert packages - DATA_ONLY == set(LEVEL), "tests/test_imports.py and docs/architecture.md name the same packages"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = next(line for line in page.splitlines() if line.startswith("core → data"))
    drawn = [set(re.findall(r"\w+", step)) & set(LEVEL) for step in order.split("→")]
    assert drawn == list(LEVELS)


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("kernels/op.py", "def f():\n    from recsys.core import errors", "kernels may import nothing of ours"),
        ("recsys/data/x.py", "import feature_store.online", "recsys may import kernels"),
        ("recsys/data/x.py", "from importlib import import_module\nimport_module('pipelines.run')", "recsys may import kernels"),
        ("feature_store/x.py", "from recsys.data import spec", "feature_store may import recsys.core"),
        ("feature_store/x.py", "import recsys", "feature_store may import recsys.core"),
        ("serving/x.py", "import pipelines.run", "serving may import"),
        ("pipelines/x.py", "if TYPE_CHECKING:\n    from serving import app", "pipelines may import"),
        ("pipelines/x.py", "import benchmarks.frame", "pipelines may import"),
        ("recsys/core/x.py", "def f():\n    import torch.nn", "recsys.core is free of it"),
        ("recsys/core/x.py", "from ..data import spec", "recsys.data does not stand below recsys.core"),
        ("recsys/ranking/models/x.py", "from recsys import retrieval", "recsys.retrieval does not stand below recsys.ranking"),
        ("recsys/bundle/__init__.py", "import recsys.registry", "recsys.registry does not stand below recsys.bundle"),
        ("recsys/__init__.py", "from recsys.core import errors", "recsys/__init__.py imports nothing"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, source: str, why: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:{len(source.splitlines())} imports ") and why in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("feature_store/x.py", "from recsys.core.errors import DataError\nfrom recsys.core import errors\nimport polars"),
        ("recsys/training/x.py", "from recsys.ranking import model\nimport kernels.op\nfrom . import trainer\nfrom .trainer import T"),
        ("pipelines/cli/x.py", "from pipelines.run import run\nimport recsys.registry, feature_store.online"),
        ("kernels/rms_norm/x.py", "from .. import op\nimport torch, triton"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


def test_the_common_floor_loads_without_torch() -> None:
    """What an import of the floor brings in, by way of any library."""
    modules = ", ".join(f"recsys.core.{file.stem}" for file in (ROOT / "recsys" / "core").glob("[a-z]*.py"))
    check = f"import {modules}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & NOT_IN_CORE
