# SPDX-License-Identifier: Apache-2.0
"""How far a long step has come: a bar in a terminal, one line for each epoch or step elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class TrainingProgress(Protocol):
    """What a trainer tells of its progress."""

    def start_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Epoch ``epoch`` (from 1) of ``epochs`` begins, or goes on after ``done`` of its ``batches``."""
        ...

    def advance(self, step: int, loss: float, samples: int) -> None:
        """Step ``step`` is done, with ``samples`` samples."""
        ...

    def end_epoch(self, values: Mapping[str, float]) -> None:
        """The epoch and its validation are over."""
        ...

    def close(self) -> None:
        """Nothing more comes, perhaps in the middle of an epoch."""
        ...


class NoProgress:
    """Tells nothing."""

    def start_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Nothing."""

    def advance(self, step: int, loss: float, samples: int) -> None:
        """Nothing."""

    def end_epoch(self, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RichProgress:
    """One line for each epoch, and in a terminal a bar with step, loss, samples per second and the time left.

    Args:
        name: of what is trained; begins the lines.
        console: where to write; standard error by default.
    """

    def __init__(self, name: str = "", console: Console | None = None) -> None:
        self._name = name
        self._console = console or _console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._title = ""
        self._samples = 0
        self._started = 0.0

    def start_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Show the bar."""
        self._title = f"{self._name} epoch {epoch}/{epochs}".strip()
        self._samples, self._started = 0, time.perf_counter()
        if self._console.is_terminal:
            self._bar = _bar(self._console, "step {task.fields[step]}  loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} samples/s")
            self._task = self._bar.add_task(self._title, total=batches, completed=done, step=0, loss=float("nan"), rate=0.0)
            self._bar.start()

    def advance(self, step: int, loss: float, samples: int) -> None:
        """Move the bar by one step."""
        self._samples += samples
        if self._bar:
            self._bar.update(self._task, advance=1, step=step, loss=loss, rate=self._rate())

    def end_epoch(self, values: Mapping[str, float]) -> None:
        """Take the bar away and write the epoch's line."""
        rate = self._rate()
        self.close()
        figures = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._console.print(f"{self._title}  {figures}  {rate:,.0f} samples/s", highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _rate(self) -> float:
        return self._samples / max(time.perf_counter() - self._started, 1e-9)


def track(iterable: Iterable[T], description: str, total: int | None = None, console: Console | None = None) -> Iterator[T]:
    """Yield the elements, and show how many have been taken: a bar in a terminal, elsewhere one line at the end.

    Args:
        iterable: of any elements.
        description: what is being done.
        total: how many elements there are; by default ``len(iterable)`` where it has one.
        console: where to write; standard error by default.
    """
    console = console or _console()
    if total is None:
        total = len(iterable) if isinstance(iterable, Sized) else None
    count, started = 0, time.perf_counter()
    if console.is_terminal:
        with _bar(console, "") as bar:
            yield from bar.track(iterable, total=total, description=description)
        return
    for element in iterable:
        yield element
        count += 1
    seconds = time.perf_counter() - started
    console.print(f"{description}: {count:,} in {seconds:.1f} s", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def counted(description: str, console: Console | None = None) -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """What a loop elsewhere may call with how much is done, of how much, and figures: a bar in a terminal, elsewhere one line at the end.

    Args:
        description: what is being done.
        console: where to write; standard error by default.
    """
    console = console or _console()
    started, last = time.perf_counter(), ""
    with _bar(console, "{task.fields[figures]}") if console.is_terminal else nullcontext() as bar:
        task = bar.add_task(description, total=None, figures="") if bar else TaskID(0)

        def tell(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal last
            last = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            if bar:
                bar.update(task, completed=done, total=total, figures=last)

        yield tell
    seconds = time.perf_counter() - started
    console.print(f"{description}: {seconds:.1f} s  {last}".rstrip(), highlight=False, soft_wrap=True, markup=False)


def _bar(console: Console, fields: str) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _console() -> Console:
    return Console(stderr=True)
