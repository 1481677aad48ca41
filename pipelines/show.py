# SPDX-License-Identifier: Apache-2.0
"""The end of a run on the terminal: the lists with titles, the verdicts, the gates."""

from collections.abc import Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from pipelines.cli._registry import print_gates
from recsys.registry import GateResult


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print what a run ends with."""
    console.print(Columns([_list("a known user", results["served"]["known_user"]), _list("a new user", results["served"]["new_user"])]))
    table = Table("difference", "estimate", "95% interval over users", box=None, header_style="dim")
    for row in results["verdicts"]:
        colour = "green" if row["low"] > 0 else "yellow"
        table.add_row(row["name"].replace("_", " "), f"{row['estimate']:+.4f}", f"[{colour}]{row['low']:+.4f} to {row['high']:+.4f}[/]")
    console.print(table)
    print_gates(console, [GateResult(**gate) for gate in results["champion"]["gates"]])
    champion = results["champion"]
    verb = "[green]promoted[/]" if champion["promoted"] else "[red]refused[/]"
    console.print(f"version {champion['version']} ({champion['sha256'][:12]}) was {verb}")


def _list(who: str, served: Mapping[str, Any]) -> Panel:
    lines = []
    for place, item in enumerate(served["items"], start=1):
        because = ", ".join(reason["title"] or reason["item_id"] for reason in item["reasons"][:2])
        lines.append(f"{place:2} {item['title']}" + (f"\n   [dim]because of {because}[/]" if because else ""))
    return Panel("\n".join(lines), title=f"{who}: {served['user_id']}", title_align="left", width=62)
