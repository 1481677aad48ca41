# SPDX-License-Identifier: Apache-2.0
"""Which results are there as everything is now, which are not, and which part of their key is to blame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipelines.graph.runner import Runner
from pipelines.graph.step import Step
from pipelines.graph.store import Result


class State(StrEnum):
    """How a step stands."""

    FRESH = "fresh"  # there: running it does nothing
    STALE = "stale"  # an earlier result is there, but something it was made of has changed
    MISSING = "missing"  # there is none


@dataclass(frozen=True)
class Status:
    """One step for one partition.

    Attributes:
        why: what has changed, or what has to be made first; empty where it is fresh.
        newest: the result that was finished last, of whatever key.
    """

    step: str
    partition: str | None
    state: State
    why: str
    newest: Result | None


def status(runner: Runner, targets: Sequence[str], partitions: Sequence[str] | None = None) -> list[Status]:
    """The targets and all that they need, in order; nothing is run."""
    return [_one(runner, step, partition) for step, partition in runner.graph.nodes(runner.recipe, targets, partitions)]


def _one(runner: Runner, step: Step, partition: str | None) -> Status:
    current = runner.current(step, partition)
    newest = current or runner.store.newest(step.name, partition)
    if current is not None:
        return Status(step.name, partition, State.FRESH, "", newest)
    why = [] if newest is None else _changes(runner, step, partition, newest)
    if runner.parts(step, partition) is None:
        missing = [name for name, found in runner.inputs(step, partition).items() if None in found.values()]
        why.append(f"after {', '.join(missing)}")
    return Status(step.name, partition, State.MISSING if newest is None else State.STALE, "; ".join(why), newest)


def _changes(runner: Runner, step: Step, partition: str | None, newest: Result) -> list[str]:
    """Which parts of the key differ from those of a result."""
    before = newest.record.parts
    now = runner.parts(step, partition) or runner.own_parts(step, partition)
    found = [name for name in ("code", "sources") if before.get(name) != now[name]]
    found += [f"recipe: {path}" for path in differences(before.get("recipe"), now["recipe"])]
    found += [f"input {path}" for path in differences(before.get("inputs"), now["inputs"])] if "inputs" in now else []
    if not found and "inputs" in now and (reason := runner.why_not(step, newest)):
        found.append(reason)
    return found


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """The dotted keys of two plain values at which they differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        absent = object()
        return [
            each for key in keys for each in differences(before.get(key, absent), now.get(key, absent), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [path]
