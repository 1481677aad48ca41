# SPDX-License-Identifier: Apache-2.0
"""`recsys promote`: move a registered version on: to champion, canary or shadow, or back."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from pipelines.cli._registry import describe, open_registry, parser, print_gates
from recsys.core.errors import RegistryError
from recsys.registry import Event, GateResult, Override, Registry, State
from recsys.registry.recorded import recorded_evidence, recorded_gates, with_parity

FAILED = 1
_TARGETS = "champion, canary=PERCENT, shadow, validated or retired"
_UNJUDGED = (None, State.REGISTERED, State.RETIRED)


@dataclass(frozen=True)
class _Asked:
    """What is to be moved, and who wants it."""

    registry: Registry
    model: str
    version: int
    actor: str | None
    reason: str
    console: Console
    decisions: Path | None


def main(argv: list[str]) -> int:
    """The command; the status is 1 where a gate failed."""
    options = parser("promote", "Move a registered version on. The gates are those of the recipe that the bundle was made by.")
    options.add_argument("version", metavar="MODEL_VERSION|ALIAS", help="the number of a version, or an alias such as challenger")
    options.add_argument("--to", default="champion", metavar="STATE", help=f"{_TARGETS} (default: champion)")
    options.add_argument("--reason", help="why, for the log")
    options.add_argument("--actor", help="who, for the log (default: the user of this process)")
    decisions = "a decision log: what the version itself decided there is computed again, for the parity gate"
    options.add_argument("--decisions", type=Path, metavar="FOLDER", help=decisions)
    options.add_argument("--override", action="store_true", help="promote in spite of failed gates; needs --actor and --reason")
    arguments = options.parse_args(argv)
    state, percent = _target(arguments.to)
    if arguments.override and state is not State.CHAMPION:
        raise RegistryError(f"--override: expected --to champion, got {arguments.to!r}")
    override = Override(arguments.actor or "", arguments.reason or "") if arguments.override else None
    registry, console = open_registry(arguments.home), Console()
    _, version, _ = registry.resolve(_address(arguments.name, arguments.version))
    reason = arguments.reason or f"recsys promote --to {arguments.to}"
    asked = _Asked(registry, arguments.name, version, arguments.actor, reason, console, arguments.decisions)
    event = _judged(asked, partial(registry.promote, override=override)) if state is State.CHAMPION else _move(asked, state, percent)
    console.print(describe(event))
    return FAILED if event.action == "refuse" else 0


def _target(text: str) -> tuple[State, float | None]:
    """The state and the percent of a canary."""
    name, _, share = text.partition("=")
    try:
        state, percent = State(name), float(share) if share else None
    except ValueError:
        raise RegistryError(f"--to: expected {_TARGETS}, got {text!r}") from None
    if state is State.REGISTERED or (state is State.CANARY) != (percent is not None):
        raise RegistryError(f"--to: expected {_TARGETS}, got {text!r}")
    return state, percent


def _address(model: str, version: str) -> str:
    return f"models:/{model}/{version}" if version.isdigit() else f"models:/{model}@{version}"


def _judged(asked: _Asked, move: Callable[..., tuple[Event, list[GateResult]]]) -> Event:
    """What came of a move that runs the gates, which are printed: `Registry.promote` or `Registry.validate`."""
    champion = asked.registry.log.standing(asked.model).champion
    gates = recorded_gates(asked.registry, asked.model, asked.version)
    evidence = recorded_evidence(asked.registry, asked.model, asked.version, champion)
    event, results = move(
        asked.model,
        asked.version,
        gates=gates,
        evidence=with_parity(evidence, gates, asked.decisions),
        expected=champion,
        actor=asked.actor,
        reason=asked.reason,
    )
    print_gates(asked.console, results)
    return event


def _move(asked: _Asked, state: State, percent: float | None) -> Event:
    """To any state but champion; what was not judged yet is judged on the way to shadow and canary."""
    registry, model, version = asked.registry, asked.model, asked.version
    found = registry.log.state(model, version)
    if state is State.RETIRED:
        return registry.retire(model, version, actor=asked.actor, reason=asked.reason)
    if state is State.VALIDATED and found in (State.SHADOW, State.CANARY):
        return registry.withdraw(model, version, actor=asked.actor, reason=asked.reason)
    if state is State.VALIDATED:
        return _judged(asked, registry.validate)
    if found in _UNJUDGED and (event := _judged(asked, registry.validate)).action == "refuse":
        return event
    to: Literal["canary", "shadow"] = "canary" if state is State.CANARY else "shadow"
    return registry.stage(model, version, to, percent=percent, actor=asked.actor, reason=asked.reason)
