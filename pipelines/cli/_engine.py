# SPDX-License-Identifier: Apache-2.0
"""What the commands that work in parts share: where the work is done, and how far it has come."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from recsys.core.config import parse
from recsys.core.engine import Engine, Progress
from recsys.core.errors import ConfigError
from recsys.core.scatter import MAX_PARTS


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The options that `engine_of` reads."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where parts are worked on (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="how many parts at once; memory is needed for each (%(default)s)"
    )
    parser.add_argument("--address", metavar="ADDRESS", help="of a running Ray cluster, such as auto; by default a local one is started")


def engine_of(options: argparse.Namespace) -> Engine:
    """The engine that was asked for."""
    chosen = {"name": options.engine, "workers": options.workers, "address": options.address}
    return parse(Engine, chosen, source="engine")


def check_partitions(count: int) -> int:
    """The number of parts, or a `ConfigError`."""
    if not 1 <= count <= MAX_PARTS:
        raise ConfigError(f"--partitions: expected 1 to {MAX_PARTS}, got {count}")
    return count


@contextmanager
def progress_lines(console: Console) -> Iterator[Progress]:
    """A bar for each stage in a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
            bars.update(shown[what], completed=done)

        yield progress
