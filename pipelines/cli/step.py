# SPDX-License-Identifier: Apache-2.0
"""`recsys step NAME`: one step of a run and what it needs, for some days or all; what is there already is not made again."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys.core.config import load_recipe, recipe_names
from recsys.core.engine import Engine
from recsys.core.errors import ConfigError, DataError
from recsys.registry.location import home

if TYPE_CHECKING:
    from pipelines.graph import Outcome, Status

_COLOURS = {"fresh": "green", "stale": "yellow", "missing": "red"}


def main(argv: list[str]) -> int:
    """The command; the status is 1 where a bundle was to be promoted and was refused."""
    parser = options("recsys step", "Run one step of a recipe and what it needs, except what is there.")
    parser.add_argument("name", nargs="?", help="the step; recsys step --list names them")
    arguments = parser.parse_args(argv)
    return run(arguments, arguments.name)


def run(arguments: argparse.Namespace, name: str | None) -> int:
    """What the `options` ask for, of a step or, where only that is asked, of all of them; returns the command's status."""
    from pipelines.graph import Runner, status
    from pipelines.pipeline import GRAPH, NAMES
    from pipelines.recipe import Recipe

    console = Console()
    if arguments.list:
        for step in GRAPH.order:
            needs = f" after {', '.join(step.needs)}" if step.needs else ""
            console.print(f"{step.name:14}[dim]{'each day' if step.partitioned else 'once':10}{needs}[/]", highlight=False, soft_wrap=True)
        return 0
    if name is None and not arguments.status:
        raise ConfigError(f"step: expected the name of a step, one of {', '.join(NAMES)}")
    engine = _engine(arguments)
    targets = NAMES if name is None else (GRAPH.step(name).name,)
    recipe = load_recipe(Recipe, arguments.recipe, arguments.overrides)
    runner = Runner(GRAPH, recipe, arguments.home, lambda message: console.print(Text(message), soft_wrap=True), engine=engine)
    chosen = _chosen(arguments, runner.partitions)
    if arguments.status:
        print_status(console, status(runner, targets, chosen))
        return 0
    outcomes = runner.run(targets, chosen, only=arguments.only, force=targets if arguments.force else ())
    print_outcomes(console, outcomes)
    return _refused(outcomes)


def options(prog: str, description: str) -> argparse.ArgumentParser:
    """What a command that runs a step may be told, besides the step's name."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--recipe", default="quickstart", help=f"one of {', '.join(recipe_names())}, or a YAML file (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the recipe")
    days = parser.add_mutually_exclusive_group()
    days.add_argument("--partition", metavar="DAY", help="one day, as in 2024-03-01")
    days.add_argument("--partitions", metavar="FIRST:LAST", help="the days of a range, both ends included; either may be left out")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="train in so many processes (default %(default)s)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="what starts them: torchrun or Ray (%(default)s)")
    parser.add_argument("--address", metavar="ADDRESS", help="of a running Ray cluster, such as auto; by default a local one is started")
    parser.add_argument("--only", action="store_true", help="make nothing but the step itself: what it needs has to be there")
    parser.add_argument("--force", action="store_true", help="make the step again, even if it is there")
    parser.add_argument("--status", action="store_true", help="say what is there, and why the rest is not; run nothing")
    parser.add_argument("--list", action="store_true", help="list the steps")
    parser.add_argument("--home", type=Path, default=home(), help="the folder of results, registry and online stores (RECSYS_HOME)")
    return parser


def _engine(arguments: argparse.Namespace) -> Engine:
    """Where trainings run, and in how many processes."""
    if arguments.nproc < 1:
        raise ConfigError(f"--nproc: expected at least 1, got {arguments.nproc}")
    if arguments.address is not None and arguments.engine != "ray":
        raise ConfigError(f"--address: expected it with --engine ray only, got {arguments.address!r} with --engine {arguments.engine}")
    return Engine(name=arguments.engine, workers=arguments.nproc, address=arguments.address)


def _chosen(arguments: argparse.Namespace, known: Sequence[str]) -> tuple[str, ...] | None:
    """The partitions asked for; None for all."""
    if arguments.partition is not None:
        return (arguments.partition,)
    if arguments.partitions is None:
        return None
    first, separator, last = arguments.partitions.partition(":")
    if not separator:
        raise ConfigError(f"--partitions: expected FIRST:LAST, got {arguments.partitions!r}")
    chosen = tuple(day for day in known if first <= day and (not last or day <= last))
    if not chosen:
        raise DataError(f"--partitions {arguments.partitions}: none of the {len(known)} there are ({known[0]} to {known[-1]})")
    return chosen


def print_status(console: Console, found: Sequence["Status"]) -> None:
    """One line for each step, or for each run of days that stand alike."""
    table = Table("step", "days", "state", "why", "finished", "seconds", box=None, header_style="dim")
    for (step, state, why), group in groupby(found, key=lambda each: (each.step, each.state, each.why)):
        alike = list(group)
        newest = alike[-1].newest
        when = f"{newest.record.time.astimezone():%Y-%m-%d %H:%M}" if newest else "–"
        seconds = f"{sum(each.newest.record.seconds for each in alike if each.newest):,.1f}" if newest else "–"
        table.add_row(step, _span([each.partition for each in alike]), f"[{_COLOURS[state]}]{state}[/]", Text(why), when, seconds)
    console.print(table)


def print_outcomes(console: Console, outcomes: Sequence["Outcome"]) -> None:
    """What was made and what was there, and where the last one stands."""
    made = sum(outcome.ran for outcome in outcomes)
    console.print(f"{made} made, {len(outcomes) - made} there already", highlight=False)
    for line in _places(outcomes):
        console.print(Text(line), soft_wrap=True)


def _places(outcomes: Sequence["Outcome"]) -> Iterator[str]:
    last = [outcome for outcome in outcomes if outcome.step == outcomes[-1].step]
    for outcome in last:
        yield f"{outcome.step}{'' if outcome.partition is None else f' {outcome.partition}'}: {outcome.result.directory}"


def _span(days: Sequence[str | None]) -> str:
    if days[0] is None:
        return ""
    return str(days[0]) if len(days) == 1 else f"{days[0]} to {days[-1]} ({len(days)})"


def _refused(outcomes: Sequence["Outcome"]) -> int:
    from pipelines.steps.promote import load_release

    last = outcomes[-1]
    return int(last.step == "promote" and not load_release(last.result.directory)["promoted"])
