# SPDX-License-Identifier: Apache-2.0
"""The version of a piece of code: a hash over its modules and all modules of this project that they import, found without importing any.

Comments, docstrings and layout do not count, nor do imports under ``TYPE_CHECKING``, which never run. Modules that are only named by a
string (components) count where a recipe names the component, see `pipelines.graph.parts.modules_of`.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipelines.graph.step import StepError
from recsys.core.files import sha256_json

PACKAGES = ("recsys", "kernels", "feature_store", "pipelines")


@dataclass(frozen=True)
class Parsed:
    """What counts of a source file: a hash of its syntax tree, and the dotted names that it may import."""

    digest: str
    imports: frozenset[str]


class Code:
    """Versions of modules, as their sources are when they are first looked at.

    Args:
        roots: top-level packages, each with the directory that holds it (or its file, for a module); by default those of this project.
    """

    def __init__(self, roots: Mapping[str, Path] | None = None) -> None:
        self._roots = dict(roots) if roots is not None else {name: _locate(name) for name in PACKAGES}
        self._files: dict[str, Path | None] = {}
        self._versions: dict[frozenset[str], str] = {}

    def version(self, modules: Iterable[str]) -> str:
        """The hexadecimal SHA-256 of the modules and of all that they import.

        Raises:
            StepError: a module has no source, or is not valid Python.
        """
        wanted = frozenset(modules)
        if wanted not in self._versions:
            self._versions[wanted] = sha256_json({name: self._parsed(name).digest for name in self.closure(wanted)})
        return self._versions[wanted]

    def closure(self, modules: Iterable[str]) -> list[str]:
        """The modules and all modules of the project that they import, sorted."""
        found: set[str] = set()
        waiting = list(modules)
        for name in waiting:
            self._know(name)
            if self._file(name) is None:
                raise StepError(f"code: there is no source of the module {name!r}")
        while waiting:
            name = waiting.pop()
            for module in self._with_parents(name):
                if module not in found:
                    found.add(module)
                    waiting.extend(self._parsed(module).imports)
        return sorted(found)

    def _with_parents(self, name: str) -> Iterator[str]:
        """The module that a dotted name means (itself, or the one that holds the attribute), and the packages above it."""
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            if parts[0] not in self._roots or self._file(module) is None:
                return
            yield module

    def _know(self, name: str) -> None:
        """A package outside the project whose module was named, such as a plugin's, counts from now on."""
        top = name.split(".")[0]
        if top not in self._roots:
            self._roots[top] = _locate(top)

    def _file(self, module: str) -> Path | None:
        if module not in self._files:
            self._files[module] = self._look_for(module)
        return self._files[module]

    def _look_for(self, module: str) -> Path | None:
        top, *rest = module.split(".")
        root = self._roots[top]
        if root.is_file():
            return None if rest else root
        place = root.joinpath(*rest)
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return file
        return None

    def _parsed(self, module: str) -> Parsed:
        file = self._file(module)
        assert file is not None
        about = file.stat()
        return _parse(file, about.st_mtime_ns, about.st_size, module if file.name == "__init__.py" else module.rpartition(".")[0])


@cache
def _parse(file: Path, _changed: int, _size: int, package: str) -> Parsed:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise StepError(f"code: {file}: {error}") from None
    imports = frozenset(_imports(tree, package))
    return Parsed(hashlib.sha256(ast.dump(_Plain().visit(tree)).encode()).hexdigest(), imports)


class _Plain(ast.NodeTransformer):
    """Takes out texts that stand alone: docstrings, and comments in that form."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names: ``from a import b`` is ``a.b``, whether b is a module or not."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"


def _locate(top: str) -> Path:
    """Where a top-level package or module stands."""
    spec = importlib.util.find_spec(top)
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise StepError(f"code: there is no module {top!r}")
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(str(spec.origin))
