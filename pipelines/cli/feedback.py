# SPDX-License-Identifier: Apache-2.0
"""`recsys feedback`: decisions and what came of them become labelled impressions, each exactly once."""

import argparse
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys.core.errors import ConfigError, DataError
from recsys.core.files import write_json
from recsys.decisions.feedback import SCHEMA_FILE, FeedbackReport, join_decisions


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="recsys feedback", description="Join feedback with the decisions that it is of.")
    parser.add_argument("--decisions", type=Path, required=True, metavar="DIRECTORY", help="the parts that a decision log wrote")
    file = "events as Parquet, CSV or TSV: request_id, item_id, event_time, and kind or label"
    parser.add_argument("--feedback", type=Path, required=True, nargs="+", metavar="FILE", help=file)
    parser.add_argument("--window", type=int, required=True, metavar="SECONDS", help="how long after a request feedback counts")
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="the impressions; each run adds to them")
    complete = "feedback is complete up to here, as in 2024-03-01T00:00:00Z; by default the present"
    parser.add_argument("--until", metavar="TIME", help=complete)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was done there, too")
    arguments = parser.parse_args(argv)
    if not arguments.decisions.is_dir():
        raise DataError(f"--decisions {arguments.decisions}: no such folder")
    until = None if arguments.until is None else _time(arguments.until)
    report = join_decisions(arguments.decisions, arguments.feedback, arguments.out, window=arguments.window, until=until)
    if arguments.json is not None:
        write_json(arguments.json, report.as_json())
    print_report(Console(), arguments.out, report)
    return 0


def print_report(console: Console, out: Path, report: FeedbackReport) -> None:
    """Every count, and how to go on."""
    table = Table("what", "rows", box=None, header_style="dim")
    for name, count in report.counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}", style="" if count else "dim")
    console.print(table)
    if report.increment is None:
        console.print(f"nothing new up to {report.until:%Y-%m-%d %H:%M:%S} UTC")
        return
    console.print(Text(f"{report.increment}: up to {report.until:%Y-%m-%d %H:%M:%S} UTC"), soft_wrap=True)
    command = f"recsys ingest --interactions {out} --items ITEMS --schema {out / SCHEMA_FILE} --out DIRECTORY"
    console.print(Text(f"then: {command}"), soft_wrap=True)


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--until: expected a time such as 2024-03-01T00:00:00Z, got {text!r}") from None
    if time.tzinfo is None:
        raise ConfigError(f"--until: expected an offset from UTC, as in 2024-03-01T00:00:00Z, got {text!r}")
    return time
