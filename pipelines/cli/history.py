# SPDX-License-Identifier: Apache-2.0
"""`recsys history`: who put which bundle live, when, and on what evidence."""

from rich.console import Console
from rich.table import Table

from pipelines.cli._registry import parser
from recsys.registry.history import PromotionLog
from recsys.registry.location import Location


def main(argv: list[str]) -> int:
    """The command."""
    options = parser("history", "Print the promotion log, the oldest event first.")
    options.add_argument("--json", action="store_true", help="one JSON line for each event, with its gates")
    arguments = options.parse_args(argv)
    events = PromotionLog(Location.under(arguments.home).log).events(arguments.name)
    if arguments.json:
        for event in events:
            print(event.model_dump_json())
        return 0
    table = Table("time", "action", "version", "from", "bundle", "by", "why", box=None, header_style="dim")
    for event in events:
        time, origin = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"), "–" if event.from_version is None else str(event.from_version)
        table.add_row(time, event.action, str(event.to_version), origin, event.sha256[:12], event.actor, event.reason)
    Console().print(table if events else f"no promotion of {arguments.name!r} yet")
    return 0
