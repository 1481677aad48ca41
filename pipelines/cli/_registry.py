# SPDX-License-Identifier: Apache-2.0
"""What `recsys promote`, `rollback` and `history` share."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recsys.registry import Event, GateResult, Location, Registry, home

_DONE = {
    "register": "registered",
    "validate": "validated",
    "shadow": "shadows with",
    "canary": "tries as canary",
    "promote": "promoted",
    "rollback": "rolled back to",
    "withdraw": "withdrew",
    "retire": "retired",
    "remove": "removed",
    "refuse": "refused",
}


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The options that all three have."""
    result = argparse.ArgumentParser(prog=f"recsys {verb}", description=description)
    result.add_argument("--home", type=Path, default=home(), help="the folder of the registry (RECSYS_HOME)")
    result.add_argument("--name", default="recsys", help="the registered model")
    return result


def open_registry(folder: Path) -> Registry:
    """The registry under a folder."""
    return Registry(Location.under(folder))


def print_gates(console: Console, results: list[GateResult]) -> None:
    """What each gate found."""
    table = Table("gate", "value", "expected", "", box=None, header_style="dim")
    for gate in results:
        value = "–" if gate.value is None else f"{gate.value:.4f}"
        held = "[green]held[/]" if gate.passed else "[red]failed[/]"
        table.add_row(gate.gate, value, gate.expected, f"{held} [dim]{gate.note}[/]")
    console.print(table)


def describe(event: Event) -> str:
    """One event as a sentence, with markup escaped."""
    origin = "nothing" if event.from_version is None else f"version {event.from_version}"
    share = f", {event.details['percent']:g}% of the users" if "percent" in event.details else ""
    gates = f", in spite of {', '.join(event.details['override']['failed'])}" if "override" in event.details else ""
    done = f"{_DONE[event.action]} version {event.to_version} ({event.sha256[:12]}){share}{gates}"
    return escape(f"{done}, champion was {origin}: {event.reason}")
