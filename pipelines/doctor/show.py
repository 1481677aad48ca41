# SPDX-License-Identifier: Apache-2.0
"""Prints a report for a person. Falls back to plain lines where rich itself is missing."""

from pipelines.doctor.examine import Report, Row

STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}


def show(report: Report) -> None:
    """Print the rows, then every problem with the command that mends it, on lines that can be copied."""
    try:
        _table(report)
    except ImportError:
        for row in report.rows:
            print(f"{row.state:<7} {row.name:<9} {row.version or '-':<14} {_abilities(row, ', ')}")
    for row in report.rows:
        for problem in row.problems:
            print(f"\n{row.name}: {problem.what}{'' if problem.required else ' (not required)'}\n  {problem.mend}")
    print("\neverything required works" if report.ok else "\nsomething required is broken")


def _table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "installed", "supported", "", f"what it can do here ({report.device})", box=None, header_style="dim")
    for row in report.rows:
        state = Text(row.state, style=STYLES[row.state])
        table.add_row(Text(row.name), row.version or "–", row.supported or "", state, Text(_abilities(row, "\n")))
    Console(soft_wrap=False).print(table)


def _abilities(row: Row, separator: str) -> str:
    return separator.join(f"{what}: {how}" for what, how in row.can.items())
