# SPDX-License-Identifier: Apache-2.0
"""Where results stand: one immutable directory for each step, partition and key, which appears whole or not at all.

::

    steps/<step>[/<partition>]/<first 16 digits of the key>/    the files of the result, and step.json, its `Record`
    work/<step>[/<partition>]/<first 16 digits of the key>/     what an unfinished step goes on from
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.graph.step import StepError
from recsys.bundle.environment import code_commit
from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError
from recsys.core.files import new_directory, read_json, sha256_file, sha256_json, write_json

RECORD = "step.json"
_DIGITS = 16


class Record(Config):
    """What a result says of itself.

    Attributes:
        step: its step.
        partition: None for a step without partitions.
        key: the hash of ``parts``.
        parts: what the result is made of: ``code`` (a hash), ``recipe`` (plain values), ``inputs`` (the contents of the results that
            were read), ``sources``.
        content: a hash over the names and hashes of all files.
        seconds: how long it took.
        commit: of the code.
        time: when it was finished, UTC.
    """

    step: str
    partition: str | None
    key: str
    parts: dict[str, Any]
    content: str
    seconds: float
    commit: str
    time: datetime


@dataclass(frozen=True)
class Result:
    """A finished step."""

    directory: Path
    record: Record


def key_of(step: str, partition: str | None, parts: Mapping[str, Any]) -> str:
    """The hexadecimal SHA-256 of all that decides a result."""
    return sha256_json({"step": step, "partition": partition, **parts})


def content_of(directory: Path) -> str:
    """The hexadecimal SHA-256 over the relative names and the hashes of all files, but the record."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    named = {file.relative_to(directory).as_posix(): file for file in files}
    return sha256_json({name: sha256_file(file) for name, file in named.items() if name != RECORD})


class Store:
    """The results below a home."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()

    def place(self, step: str, partition: str | None, key: str) -> Path:
        """Where the result of a key stands, or will."""
        return self._folder("steps", step, partition) / key[:_DIGITS]

    def work(self, step: str, partition: str | None, key: str) -> Path:
        """The working directory of a key."""
        return self._folder("work", step, partition) / key[:_DIGITS]

    def find(self, step: str, partition: str | None, key: str) -> Result | None:
        """The result of a key, where there is one.

        Raises:
            StepError: the directory holds a result of another key, or its record cannot be read.
        """
        result = _read(self.place(step, partition, key))
        if result is not None and result.record.key != key:
            raise StepError(f"{result.directory}: the key is {result.record.key}, expected {key}")
        return result

    def newest(self, step: str, partition: str | None) -> Result | None:
        """The result that was finished last, of whatever key."""
        folder = self._folder("steps", step, partition)
        directories = [each for each in folder.iterdir() if not each.name.startswith(".")] if folder.is_dir() else []
        results = [result for each in directories if (result := _read(each)) is not None]
        return max(results, key=lambda result: result.record.time, default=None)

    def write(self, step: str, partition: str | None, key: str, parts: Mapping[str, Any], fill: Callable[[Path], None]) -> Result:
        """Let ``fill`` fill a directory, and make it the result of the key; one that was there before is replaced.

        If another process finished the same result meanwhile, its result counts.
        """
        place = self.place(step, partition, key)
        started = time.perf_counter()
        for left in place.parent.glob(f".*{place.name}.*"):  # by a process that was killed: whoever holds the lock is alone here
            shutil.rmtree(left, ignore_errors=True)
        aside = place.with_name(f".{place.name}.{os.getpid()}.new")
        with new_directory(aside) as directory:
            fill(directory)
            if (directory / RECORD).exists():
                raise StepError(f"{step}: the file {RECORD} is the record's, but the step wrote one")
            record = Record(
                step=step,
                partition=partition,
                key=key,
                parts=dict(parts),
                content=content_of(directory),
                seconds=time.perf_counter() - started,
                commit=code_commit(),
                time=datetime.now(UTC),
            )
            write_json(directory / RECORD, record.model_dump(mode="json"))
        self._publish(aside, place)
        found = self.find(step, partition, key)
        assert found is not None
        return found

    @contextmanager
    def lock(self, step: str, partition: str | None, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold that nobody else makes the result of this key meanwhile; the lock of a process that died is gone.

        Args:
            step: the step.
            partition: its partition.
            key: of the result.
            waiting: called once where somebody else has the lock.
        """
        path = self.work(step, partition, key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _publish(self, aside: Path, place: Path) -> None:
        """Give a whole directory its name; what has that name is put away first."""
        old = place.with_name(f".{place.name}.{os.getpid()}.old")
        with suppress(FileNotFoundError):
            place.rename(old)
        try:
            aside.rename(place)
        except OSError:
            if not (place / RECORD).is_file():
                raise
            shutil.rmtree(aside, ignore_errors=True)  # somebody who does not see our locks was faster
        shutil.rmtree(old, ignore_errors=True)

    def _folder(self, kind: str, step: str, partition: str | None) -> Path:
        folder = self.home / kind / step
        return folder if partition is None else folder / partition


def _read(directory: Path) -> Result | None:
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        return Result(directory, parse(Record, read_json(path), source=str(path)))
    except (ValueError, ConfigError) as error:
        raise StepError(f"{path}: not a record: {error}") from None
