# SPDX-License-Identifier: Apache-2.0
"""The states of a registered version, and which of them follow which.

::

    registered → validated → shadow → canary(p%) → champion → retired

``shadow`` and ``canary`` may be left out, and left by ``withdraw``, back to validated. At most one version is champion, one canary and one
shadow: another one that comes there sends the champion to retired, and the canary or the shadow back to validated. A retired version comes
back through the gates, or, if it was the champion before today's, by a rollback. What was removed by `recsys gc` never comes back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from recsys.core.errors import RegistryError
from recsys.registry.events import Action


class State(StrEnum):
    """Where a version stands."""

    REGISTERED = "registered"
    VALIDATED = "validated"
    SHADOW = "shadow"
    CANARY = "canary"
    CHAMPION = "champion"
    RETIRED = "retired"


REACHED: dict[Action, State] = {
    "register": State.REGISTERED,
    "validate": State.VALIDATED,
    "withdraw": State.VALIDATED,
    "shadow": State.SHADOW,
    "canary": State.CANARY,
    "promote": State.CHAMPION,
    "rollback": State.CHAMPION,
    "retire": State.RETIRED,
    "remove": State.RETIRED,
}
"""The state that an action leads to; ``refuse`` leads nowhere."""

_BEFORE: dict[Action, frozenset[State]] = {
    "register": frozenset(),
    "validate": frozenset({State.REGISTERED, State.VALIDATED, State.RETIRED}),
    "withdraw": frozenset({State.SHADOW, State.CANARY}),
    "shadow": frozenset({State.VALIDATED, State.CANARY}),
    "canary": frozenset({State.VALIDATED, State.SHADOW, State.CANARY}),
    "promote": frozenset({State.VALIDATED, State.SHADOW, State.CANARY}),
    "rollback": frozenset(State) - {State.CHAMPION},
    "retire": frozenset({State.REGISTERED, State.VALIDATED, State.SHADOW, State.CANARY}),
    "remove": frozenset({State.REGISTERED, State.VALIDATED, State.RETIRED}),
    "refuse": frozenset(State) - {State.CHAMPION},
}
"""The states in which an action is legal."""

_OVERRIDDEN = frozenset(State) - {State.CHAMPION}


@dataclass
class Standing:
    """Where all versions of one model stand after some of its events, told by their ids and versions.

    Attributes:
        states: of each version that the events name.
        since: the event that brought a version to its state.
        crowned: the last event that made a version the champion.
        removed: versions whose artifacts `recsys gc` removed.
        champion: the version, if there is one.
        previous: the champion before it, which a rollback restores.
        latest: the id of the last event; 0 if there is none.
    """

    states: dict[int, State] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    crowned: dict[int, int] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    champion: int | None = None
    previous: int | None = None
    latest: int = 0

    @classmethod
    def after(cls, steps: Iterable[tuple[int, Action, int]]) -> "Standing":
        """The standing after events, given as id, action and version, the oldest first."""
        standing = cls()
        for identity, action, version in steps:
            standing.apply(identity, action, version)
        return standing

    def apply(self, identity: int, action: Action, version: int) -> None:
        """Take one more event into account; whether it is legal is asked by `check`."""
        self.latest = identity
        reached = REACHED.get(action)
        if reached is None:
            return
        if reached is State.CHAMPION:
            self._crown(identity, version)
        elif reached in (State.SHADOW, State.CANARY):
            self._leave(self.only(reached), State.VALIDATED, identity)
        self._put(version, reached, identity)
        if action == "remove":
            self.removed.add(version)

    def only(self, state: State) -> int | None:
        """The version in a state that holds at most one."""
        return next((version for version, found in self.states.items() if found is state), None)

    def _crown(self, identity: int, version: int) -> None:
        if self.champion != version:
            self._leave(self.champion, State.RETIRED, identity)
            self.previous = self.champion
        self.champion = version
        self.crowned[version] = identity

    def _leave(self, version: int | None, state: State, identity: int) -> None:
        if version is not None:
            self._put(version, state, identity)

    def _put(self, version: int, state: State, identity: int) -> None:
        self.states[version] = state
        self.since[version] = identity


def check(model: str, standing: Standing, action: Action, version: int, *, override: bool = False) -> None:
    """Hold that an action is legal now.

    A version that the log does not know counts as registered: it may be older than the log's registrations.

    Args:
        model: for the message.
        standing: where the versions stand.
        action: what is asked for.
        version: of what.
        override: whether somebody answers for a promotion in spite of failed gates.

    Raises:
        RegistryError: names the state of the version and the one asked for.
    """
    if action == "register" and version not in standing.states:
        return
    state = standing.states.get(version, State.REGISTERED)
    if version in standing.removed:
        raise RegistryError(f"{model}: version {version} was removed by gc: {_arrow(state, action)} is not possible any more")
    if action == "rollback" and version != standing.previous:
        raise RegistryError(f"{model}: a rollback leads to the previous champion, {standing.previous or 'none'}, not to version {version}")
    if action == "remove" and version == standing.previous:
        arrow = _arrow(state, action)
        raise RegistryError(f"{model}: version {version} is the previous champion, which a rollback needs: {arrow} is not legal")
    legal = _OVERRIDDEN if action == "promote" and override else _BEFORE[action]
    if state not in legal:
        expected = ", ".join(sorted(legal)) or "a version that is not there yet"
        raise RegistryError(f"{model}: version {version} is {state}: {_arrow(state, action)} is not legal; expected {expected}")


def _arrow(state: State, action: Action) -> str:
    return f"{state} → {REACHED.get(action, 'refused')}"
