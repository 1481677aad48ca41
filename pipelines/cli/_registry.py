# SPDX-License-Identifier: Apache-2.0
"""What `recsys promote`, `rollback` and `history` share."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recsys.registry import Event, GateResult, Location, Registry, home


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
    """One event as a sentence."""
    origin = "nothing" if event.from_version is None else f"version {event.from_version}"
    done = {"promote": "promoted", "rollback": "rolled back to", "refuse": "refused"}[event.action]
    return f"{done} version {event.to_version} ({event.sha256[:12]}), champion was {origin}: {event.reason}"
