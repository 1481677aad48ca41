# SPDX-License-Identifier: Apache-2.0
"""Graphs of steps that join what they read, and count how often they ran."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.graph import Context, Graph, Step
from pipelines.graph.code import Code


@dataclass
class Toys:
    """Steps by name: each writes its part of the recipe and what its inputs hold; ``ran`` counts runs, by step and partition."""

    needs: Mapping[str, Sequence[str]]
    partitioned: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()  # steps that write the same, whatever they read
    days: tuple[str, ...] = ()
    sources: dict[str, Any] = field(default_factory=dict)
    ran: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    looks_back: int = 0
    seen_before: dict[tuple[str, str | None], list[str]] = field(default_factory=dict)

    def graph(self) -> Graph:
        return Graph(tuple(self._step(name) for name in self.needs), lambda _: self.days)

    def _step(self, name: str) -> Step:
        def reads(recipe: Mapping[str, Any]) -> dict[str, Any]:
            return {"value": recipe.get(name)}

        def run(context: Context) -> None:
            self.ran[name, context.partition] += 1
            self.seen_before[name, context.partition] = list(context.before)
            files = sorted(file for each in context.inputs.values() for file in each.glob("*.txt"))
            files += [file for each in context.parts.values() for own in each.values() for file in own.glob("*.txt")]
            read = "" if name in self.constant else "".join(file.read_text() for file in files)
            source = self.sources.get(f"{name} {context.partition}", "")
            (context.out / f"{name}.txt").write_text(f"({name} {reads(context.recipe)['value']} {source}{read})")

        def sources(_: Any, partition: str | None) -> Any:
            return self.sources.get(f"{name} {partition}")

        part = name in self.partitioned
        return Step(name, run, tuple(self.needs[name]), reads, (__name__,), part, sources, self.looks_back if part else 0)


class NoCode(Code):
    """Every module has the same version."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.lock = threading.Lock()

    def version(self, modules: Any) -> str:
        return ",".join(f"{name}={self.versions.get(name, '0')}" for name in sorted(modules))


def contents(home: Path) -> dict[str, str]:
    """Every file below ``steps``, but the records, which hold times."""
    root = home / "steps"
    return {file.relative_to(root).as_posix(): file.read_text() for file in root.rglob("*") if file.is_file() and file.name != "step.json"}
