# SPDX-License-Identifier: Apache-2.0
"""What a step is, and what it is given when it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.core.engine import Engine
from recsys.core.errors import RecsysError
from recsys.training.tracking import NullTracker, Tracker


class StepError(RecsysError):
    """A step cannot run, or a result is not what its record says."""


@dataclass(frozen=True)
class Context:
    """What a step is given.

    Attributes:
        recipe: the whole recipe; a step looks at no more of it than its `Step.reads` names.
        out: an empty directory, which becomes the step's result when it returns.
        work: a directory for what an interrupted step goes on from, such as checkpoints. It is there again when the same step runs again,
            and is deleted once the step has finished.
        inputs: the results of the steps that it needs. For a step without partitions that needs one with them, see `parts`.
        parts: the results of needed steps that have partitions while this one has none: name → partition → directory, in order.
        partition: which one; None for a step without partitions.
        before: up to `Step.looks_back` earlier partitions for which this step has been done, the oldest first: partition → name of a
            needed step → directory. They do not enter the key.
        home: the folder of all results, of the registry and of the online stores.
        key: of the result to be.
        say: shows one line of progress.
        tracker: records parameters and metrics.
        engine: where a training runs, and in how many processes. It is no part of the key: a training comes to the same in any number.
    """

    recipe: Any
    out: Path
    work: Path
    inputs: Mapping[str, Path]
    parts: Mapping[str, Mapping[str, Path]]
    partition: str | None
    before: Mapping[str, Mapping[str, Path]]
    home: Path
    key: str
    say: Callable[[str], None]
    tracker: Tracker = field(default_factory=NullTracker)
    engine: Engine = field(default_factory=Engine)


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: unique in its graph; its results stand below a folder of this name.
        run: fills `Context.out`.
        needs: the names of the steps whose results it reads.
        reads: the part of the recipe on which it depends: a mapping of plain values and pydantic models. Only this enters the key, and
            the modules that define the models count as the step's code.
        code: the modules whose source is the step's code version, with all that they import; by default the module of ``run``.
        partitioned: whether there is one result for each partition.
        sources: a plain value, fit for JSON, that changes whenever what the step reads from outside changes, such as the hashes of files.
        looks_back: how many earlier partitions are at hand in `Context.before`.
        stands: called with the recipe, the home and the directory of a result that has the right key; why it does not count nonetheless,
            or None. For what a step leaves outside its directory.
    """

    name: str
    run: Callable[[Context], None]
    needs: tuple[str, ...] = ()
    reads: Callable[[Any], Mapping[str, Any]] = _nothing
    code: tuple[str, ...] = ()
    partitioned: bool = False
    sources: Callable[[Any, str | None], Any] | None = None
    looks_back: int = 0
    stands: Callable[[Any, Path, Path], str | None] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that its code version begins with."""
        return self.code or (self.run.__module__,)
