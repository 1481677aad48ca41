# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that several processes write together and any number of processes can read.

A directory has what those of one process have (see `recsys.training.checkpoint`), and besides ``shards.json`` with the files of parts
(`recsys.training.shards`), and the random generators of each process, ``random-0.json`` and so on. The parts are copied at once and
written while training goes on; the manifest comes last, from the first process, and with it the name.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save

from recsys.core.errors import CheckpointError, RecsysError
from recsys.core.files import sha256_file
from recsys.data.world import World
from recsys.training.checkpoint import Checkpoint, Checkpoints, write_part
from recsys.training.shards import ShardWriter

T = TypeVar("T")


class SharedCheckpoints:
    """The checkpoints of a run of several processes. Every method is a collective call.

    Args:
        root: the directory below which they stand, seen by all processes.
        keep: see `Checkpoints`.
        run: see `Checkpoints`.
        world: the processes.
    """

    def __init__(self, root: Path, keep: int, run: Mapping[str, Any], world: World) -> None:
        self._own, self._world = Checkpoints(root, keep, run), world
        # Of its own, since it is used while training uses the other.
        self._group = dist.new_group(backend="gloo")
        self._writing: Future[Any] | None = None

    def save(self, step: int, state: Mapping[str, Any], own: Mapping[str, Any], shards: dict[str, Any], best: int | None = None) -> Path:
        """Begin to write a checkpoint; the one before has ended then. What is given may be changed as soon as the call returns.

        Args:
            step: see `Checkpoints.save`.
            state: parts that are the same in all processes, as of `Checkpoints.save`.
            own: parts of each process.
            shards: nested tensors, whole in all processes or in parts.
            best: see `Checkpoints.save`.

        Raises:
            CheckpointError: it cannot be written, or the one before could not be.
        """
        self.wait()
        self._step = step
        try:
            temporary = self._first(lambda: self._own.begin(step))
            self._all(lambda: _write(temporary, {f"{part}-{self._world.rank}": value for part, value in own.items()}))
            self._first(lambda: _write(temporary, state))
        except CheckpointError as error:
            raise self._failed(str(error)) from None

        def finished(parts: dict[str, str]) -> None:
            rest = {path.name: sha256_file(path) for path in sorted(temporary.iterdir()) if path.name not in parts}
            self._own.finish(step, best, parts | rest)

        writer = ShardWriter(temporary, self._world.rank, finished)
        self._writing = cast(
            Future[Any],
            async_save(
                shards,
                storage_writer=writer,
                process_group=self._group,
                async_stager=BlockingAsyncStager(),
            ),
        )
        return self._own.directory(step)

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            CheckpointError: it could not be.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except Exception as error:
            raise self._failed(_reasons(error)) from None

    def _failed(self, why: str) -> CheckpointError:
        """The error of a checkpoint of which nothing stays."""
        if self._world.rank == 0:
            shutil.rmtree(self._own.directory(self._step, ".tmp"), ignore_errors=True)
        return CheckpointError(f"checkpoint of step {self._step}: cannot be written: {why}")

    def latest(self) -> Checkpoint | None:
        """See `Checkpoints.latest`; the first process looks."""
        self.wait()
        return self._first(self._own.latest)

    def at(self, step: int) -> Checkpoint:
        """See `Checkpoints.at`; the first process looks."""
        self.wait()
        return self._first(lambda: self._own.at(step))

    def _first(self, work: Callable[[], T]) -> T:
        """What the first process finds, or the error that it meets, in all of them."""
        found: list[Any] = [None, None]
        if self._world.rank == 0:
            found = _tried(work)
        dist.broadcast_object_list(found, src=0, group=self._group)
        if found[1] is not None:
            raise CheckpointError(found[1])
        return cast(T, found[0])

    def _all(self, work: Callable[[], Any]) -> None:
        """Work of every process; the error of any is one in all of them."""
        errors: list[str | None] = [None] * self._world.size
        dist.all_gather_object(errors, _tried(work)[1], group=self._group)
        if met := [f"process {rank}: {error}" for rank, error in enumerate(errors) if error is not None]:
            raise CheckpointError("; ".join(met))


def _write(directory: Path, state: Mapping[str, Any]) -> None:
    for part, value in state.items():
        write_part(directory, part, value)


def _tried(work: Callable[[], Any]) -> list[Any]:
    """What came of it, and the error as text."""
    try:
        return [work(), None]
    except (RecsysError, OSError, SafetensorError) as error:
        return [None, str(error)]


def _reasons(error: Exception) -> str:
    """What went wrong, by process, of PyTorch's exception."""
    failures = getattr(error, "failures", None)
    if not failures:
        return str(error)
    return "; ".join(f"process {rank}: {failure[0] if isinstance(failure, tuple) else failure}" for rank, failure in failures.items())
