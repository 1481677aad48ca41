# SPDX-License-Identifier: Apache-2.0
"""Which steps there are, which of them a target needs, in which order, and for which partitions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.graph.step import Step
from recsys.core.errors import ConfigError, DataError, unknown


def _none(_: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Graph:
    """Steps that need each other.

    Args:
        steps: in any order.
        partitions: from a recipe to the partitions that there are, such as the days of its data.

    Raises:
        ConfigError: a name is there twice or unknown, or steps need each other in a circle.
    """

    steps: tuple[Step, ...]
    partitions: Callable[[Any], Sequence[str]] = _none

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"steps: {min(twice)!r} is there twice")
        for step in self.steps:
            for name in step.needs:
                if name not in names:
                    raise ConfigError(f"step {step.name!r} needs {name!r}: {unknown('step', name, names)}")
        assert self.order

    @cached_property
    def order(self) -> tuple[Step, ...]:
        """All steps, each after those that it needs, and otherwise as they were given."""
        done: dict[str, Step] = {}
        left = list(self.steps)
        while left:
            ready = next((step for step in left if all(name in done for name in step.needs)), None)
            if ready is None:
                raise ConfigError(f"steps: {_circle(left)} need each other in a circle")
            done[ready.name] = ready
            left.remove(ready)
        return tuple(done.values())

    def step(self, name: str) -> Step:
        """The step of a name; an unknown one is a `ConfigError` that proposes the nearest."""
        for step in self.steps:
            if step.name == name:
                return step
        raise ConfigError(unknown("step", name, [step.name for step in self.steps]))

    def needed(self, names: Iterable[str]) -> tuple[Step, ...]:
        """The steps of these names and all that they need, in order."""
        wanted: set[str] = set()
        waiting = list(names)
        while waiting:
            step = self.step(waiting.pop())
            if step.name not in wanted:
                wanted.add(step.name)
                waiting.extend(step.needs)
        return tuple(step for step in self.order if step.name in wanted)

    def descendants(self, name: str) -> tuple[Step, ...]:
        """The steps that need the named one, directly or not, in order."""
        behind = {name}
        for step in self.order:
            if behind.intersection(step.needs):
                behind.add(step.name)
        return tuple(step for step in self.order if step.name in behind - {name})

    def nodes(self, recipe: Any, targets: Sequence[str], partitions: Sequence[str] | None) -> list[tuple[Step, str | None]]:
        """What has to be there for the targets: each needed step, once for each of its partitions, in order.

        Args:
            recipe: says which partitions there are.
            targets: names of steps.
            partitions: which of them the targets are wanted for; None for all.

        Raises:
            ConfigError: partitions are asked for, but a target has none.
            DataError: a partition is not there.
        """
        known = tuple(sorted(self.partitions(recipe)))
        if partitions is not None:
            for name in targets:
                if not self.step(name).partitioned:
                    raise ConfigError(f"step {name!r} has no partitions: it reads all of them; got {', '.join(partitions)}")
            for each in partitions:
                if each not in known:
                    raise DataError(f"partition {each!r} is not there: {_shown(known)}")
        chosen = known if partitions is None else tuple(sorted(set(partitions)))
        return [(step, each) for step in self.needed(targets) for each in (chosen if step.partitioned else (None,))]


def _circle(left: Sequence[Step]) -> str:
    names = {step.name for step in left}
    place, seen = left[0], list[str]()
    while place.name not in seen:
        seen.append(place.name)
        place = next(step for step in left if step.name in names.intersection(place.needs))
    return ", ".join(seen[seen.index(place.name) :])


def _shown(known: Sequence[str]) -> str:
    if not known:
        return "there are none"
    return f"there are {len(known)}, {known[0]} to {known[-1]}" if len(known) > 1 else f"there is {known[0]}"
