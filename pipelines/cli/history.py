# SPDX-License-Identifier: Apache-2.0
"""`recsys history`: who put which bundle where, when, and on what evidence; and what was live at a time."""

import json
from datetime import datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.cli._registry import parser
from recsys.core.errors import RegistryError
from recsys.registry import Event, State
from recsys.registry.history import PromotionLog
from recsys.registry.location import Location

_HEADS = ("time", "action", "version", "from", "bundle", "by", "why")


def main(argv: list[str]) -> int:
    """The command."""
    options = parser("history", "Print the promotion log, the oldest event first; or what was live at a time.")
    options.add_argument("--json", action="store_true", help="one JSON line for each event, with its gates")
    options.add_argument("--at", metavar="TIME", help="which versions were champion, previous, canary and shadow then (ISO 8601)")
    arguments = options.parse_args(argv)
    log = PromotionLog(Location.under(arguments.home).log)
    if arguments.at is not None:
        _show_roles(_roles(log, arguments.name, _time(arguments.at)), as_json=arguments.json)
    else:
        _show_events(log.events(arguments.name), arguments.name, as_json=arguments.json)
    return 0


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise RegistryError(f"--at: expected a time such as 2026-03-01T12:00:00+00:00, got {text!r}") from None


def _roles(log: PromotionLog, model: str, at: datetime) -> dict[str, Event | None]:
    """The event behind each role at a time."""
    standing = log.standing(model, at)
    crowned = {"champion": standing.champion, "previous": standing.previous}
    roles = {role: None if version is None else log.event(standing.crowned[version]) for role, version in crowned.items()}
    for state in (State.CANARY, State.SHADOW):
        version = standing.only(state)
        roles[state.value] = None if version is None else log.event(standing.since[version])
    return roles


def _show_roles(roles: dict[str, Event | None], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({role: event and event.model_dump(mode="json") for role, event in roles.items()}))
        return
    table = Table("role", *_HEADS, box=None, header_style="dim")
    for role, event in roles.items():
        table.add_row(role, *(["none"] if event is None else _cells(event)))
    Console().print(table)


def _show_events(events: list[Event], model: str, *, as_json: bool) -> None:
    if as_json:
        for event in events:
            print(event.model_dump_json())
        return
    table = Table(*_HEADS, box=None, header_style="dim")
    for event in events:
        table.add_row(*_cells(event))
    Console().print(table if events else f"no event of {model!r} yet")


def _cells(event: Event) -> list[str]:
    time, origin = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S"), "–" if event.from_version is None else str(event.from_version)
    action = f"{event.action} {event.details['percent']:g}%" if "percent" in event.details else event.action
    return [time, action, str(event.to_version), origin, event.sha256[:12], escape(event.actor), escape(event.reason)]
