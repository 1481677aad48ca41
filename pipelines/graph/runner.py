# SPDX-License-Identifier: Apache-2.0
"""Running what is missing, in order. Killed anywhere and started again, it goes on with the first step that is not there."""

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.graph.code import Code
from pipelines.graph.parts import modules_of, plain
from pipelines.graph.plan import Graph
from pipelines.graph.step import Context, Step, StepError
from pipelines.graph.store import Result, Store, key_of
from recsys.core.engine import Engine
from recsys.training.tracking import NullTracker, Tracker


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Outcome:
    """What became of one step for one partition.

    Attributes:
        result: where it stands.
        ran: whether it was made now, rather than found.
    """

    step: str
    partition: str | None
    result: Result
    ran: bool


@dataclass
class Runner:
    """A graph over a recipe and a home.

    What the keys need is found once: what changes while a runner lives, except by its own steps, it does not see.

    Attributes:
        graph: the steps.
        recipe: of the run.
        home: the folder of all results.
        say: shows one line of progress.
        tracker: handed to the steps.
        engine: where trainings run, and in how many processes.
        code: says the versions of modules.
    """

    graph: Graph
    recipe: Any
    home: Path
    say: Callable[[str], None] = _silent
    tracker: Tracker = field(default_factory=NullTracker)
    code: Code = field(default_factory=Code)
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        self.store = Store(self.home)
        self.partitions = tuple(sorted(self.graph.partitions(self.recipe)))
        self._fixed: dict[tuple[str, str | None], dict[str, Any]] = {}
        self._known: dict[tuple[str, str | None], Result | None] = {}

    def run(
        self,
        targets: Sequence[str],
        partitions: Sequence[str] | None = None,
        *,
        only: bool = False,
        force: Collection[str] = (),
    ) -> list[Outcome]:
        """Make the targets and what they need, except what is there already.

        Args:
            targets: names of steps.
            partitions: of the targets, where they have any; None for all.
            only: make nothing but the targets.
            force: names of steps to be made again, whether they are there or not.

        Raises:
            StepError: with ``only``, something that a target needs is not there.
            ConfigError: a name is unknown, or a target has no partitions.
            DataError: a partition is not there.
        """
        outcomes = []
        for step, partition in self.graph.nodes(self.recipe, targets, partitions):
            found = None if step.name in force else self.current(step, partition)
            if found is None and only and step.name not in targets:
                raise StepError(f"{_called(step, partition)}: it is needed, but not there: run it first, or run without --only")
            outcomes.append(Outcome(step.name, partition, found, False) if found else self._make(step, partition, step.name in force))
        return outcomes

    def current(self, step: Step, partition: str | None) -> Result | None:
        """The result of a step as everything is now, or None; so too where something that it needs is not there."""
        node = (step.name, partition)
        if node not in self._known:
            parts = self.parts(step, partition)
            self._known[node] = None if parts is None else self._standing(step, partition, key_of(step.name, partition, parts))
        return self._known[node]

    def parts(self, step: Step, partition: str | None) -> dict[str, Any] | None:
        """What a result is made of, see `pipelines.graph.store.Record`; None where something that it needs is not there."""
        inputs: dict[str, Any] = {}
        for name, results in self.inputs(step, partition).items():
            if any(result is None for result in results.values()):
                return None
            contents = {each: result.record.content for each, result in results.items() if result is not None}
            inputs[name] = contents[partition] if None in contents or step.partitioned else contents
        return self.own_parts(step, partition) | {"inputs": inputs}

    def own_parts(self, step: Step, partition: str | None) -> dict[str, Any]:
        """The parts that do not depend on other steps: code, recipe and sources."""
        if (step.name, partition) not in self._fixed:
            read = step.reads(self.recipe)
            self._fixed[step.name, partition] = {
                "code": self.code.version({*step.modules, *modules_of(read)}),
                "recipe": plain(read),
                "sources": None if step.sources is None else plain(step.sources(self.recipe, partition)),
            }
        return self._fixed[step.name, partition]

    def why_not(self, step: Step, result: Result) -> str | None:
        """Why a result of the right key does not count."""
        return None if step.stands is None else step.stands(self.recipe, self.store.home, result.directory)

    def _standing(self, step: Step, partition: str | None, key: str) -> Result | None:
        found = self.store.find(step.name, partition, key)
        return found if found is not None and self.why_not(step, found) is None else None

    def inputs(self, step: Step, partition: str | None) -> dict[str, dict[str | None, Result | None]]:
        """For each needed step its results by partition, None for what is not there.

        One by the partition given, or those of all partitions where only the needed step has them.
        """
        found: dict[str, dict[str | None, Result | None]] = {}
        for name in step.needs:
            needed = self.graph.step(name)
            if not needed.partitioned:
                found[name] = {partition: self.current(needed, None)}
            elif step.partitioned:
                found[name] = {partition: self.current(needed, partition)}
            else:
                found[name] = {each: self.current(needed, each) for each in self.partitions}
        return found

    def _make(self, step: Step, partition: str | None, forced: bool) -> Outcome:
        parts = self.parts(step, partition)
        assert parts is not None, "what it needs was made before"
        key = key_of(step.name, partition, parts)
        called = _called(step, partition)
        with self.store.lock(step.name, partition, key, lambda: self.say(f"{called}: waiting for another process that makes it")):
            found = None if forced else self._standing(step, partition, key)
            made = found or self._run(step, partition, key, parts)
        behind = {each.name for each in self.graph.descendants(step.name)}
        kept = {node: result for node, result in self._known.items() if result is not None and node[0] not in behind}
        self._known = {**kept, (step.name, partition): made}
        return Outcome(step.name, partition, made, found is None)

    def _run(self, step: Step, partition: str | None, key: str, parts: dict[str, Any]) -> Result:
        called, started = _called(step, partition), time.perf_counter()
        self.say(called)
        work = self.store.work(step.name, partition, key)
        work.mkdir(parents=True, exist_ok=True)

        def fill(out: Path) -> None:
            step.run(self._context(step, partition, key, out, work))
            if step.sources is not None and plain(step.sources(self.recipe, partition)) != parts["sources"]:
                raise StepError(f"{called}: what it reads from outside changed while it ran: run it again")

        made = self.store.write(step.name, partition, key, parts, fill)
        shutil.rmtree(work, ignore_errors=True)
        self.say(f"{called}: done in {time.perf_counter() - started:.1f} s")
        return made

    def _context(self, step: Step, partition: str | None, key: str, out: Path, work: Path) -> Context:
        inputs: dict[str, Path] = {}
        parts: dict[str, dict[str, Path]] = {}
        for name, results in self.inputs(step, partition).items():
            directories = {each: result.directory for each, result in results.items() if result is not None}
            if self.graph.step(name).partitioned and not step.partitioned:
                parts[name] = {str(each): directory for each, directory in directories.items()}
            else:
                inputs[name] = directories[partition]
        return Context(
            recipe=self.recipe,
            out=out,
            work=work,
            inputs=inputs,
            parts=parts,
            partition=partition,
            before=self._before(step, partition),
            home=self.store.home,
            key=key,
            say=lambda message: self.say(f"{_called(step, partition)}: {message}"),
            tracker=self.tracker,
            engine=self.engine,
        )

    def _before(self, step: Step, partition: str | None) -> dict[str, dict[str, Path]]:
        """The last partitions before this one for which the step is done."""
        found: dict[str, dict[str, Path]] = {}
        earlier = [each for each in self.partitions if partition is not None and each < partition]
        for each in reversed(earlier):
            if len(found) == step.looks_back:
                break
            if self.current(step, each) is not None:
                results = {name: own[each] for name, own in self.inputs(step, each).items()}
                found[each] = {name: result.directory for name, result in results.items() if result is not None}
        return dict(reversed(found.items()))


def run(graph: Graph, recipe: Any, home: Path, targets: Sequence[str], partitions: Sequence[str] | None = None) -> list[Outcome]:
    """Make the targets and what they need, except what is there already; see `Runner`."""
    return Runner(graph, recipe, home).run(targets, partitions)


def _called(step: Step, partition: str | None) -> str:
    return step.name if partition is None else f"{step.name} {partition}"
