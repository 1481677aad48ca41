# SPDX-License-Identifier: Apache-2.0
"""Which state follows which, and that what the log says of every moment agrees with itself."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import RegistryError
from recsys.registry import Entry, PromotionLog, State
from recsys.registry.states import REACHED, Standing, check

ROAD = ("register", "validate", "shadow", "canary", "promote")
ACTIONS = (*REACHED, "refuse")


def log_with(folder: Path, *steps: tuple[str, int]) -> PromotionLog:
    log = PromotionLog(f"sqlite:///{folder / 'log.db'}")
    for action, version in steps:
        log.append("m", Entry(action, version, f"sha{version}", "r"), actor="a")
    return log


def test_the_road_of_a_version_is_one_event_for_each_state(tmp_path: Path) -> None:
    log = PromotionLog(f"sqlite:///{tmp_path / 'log.db'}")
    reached = []
    for action in ROAD:
        log.append("m", Entry(action, 1, "sha1", "r"), actor="a")
        reached.append(log.state("m", 1))
    assert reached == [State.REGISTERED, State.VALIDATED, State.SHADOW, State.CANARY, State.CHAMPION]
    assert [event.action for event in log.events("m")] == list(ROAD)
    assert log.state("m", 2) is None


TO = {
    State.REGISTERED: ("register",),
    State.VALIDATED: ("validate",),
    State.SHADOW: ("validate", "shadow"),
    State.CANARY: ("validate", "canary"),
    State.CHAMPION: ("validate", "promote"),
    State.RETIRED: ("register", "retire"),
}
LEGAL = {
    State.REGISTERED: {"validate", "retire", "remove", "refuse"},
    State.VALIDATED: {"validate", "shadow", "canary", "promote", "retire", "remove", "refuse"},
    State.SHADOW: {"withdraw", "canary", "promote", "retire", "refuse"},
    State.CANARY: {"withdraw", "shadow", "canary", "promote", "retire", "refuse"},
    State.CHAMPION: set(),
    State.RETIRED: {"validate", "remove", "refuse"},
}


@pytest.mark.parametrize("state", State)
def test_what_is_not_legal_is_an_error_that_names_both_states(tmp_path: Path, state: State) -> None:
    log = log_with(tmp_path, *((action, 1) for action in TO[state]))
    assert log.state("m", 1) is state
    for action in ACTIONS:
        if action in LEGAL[state]:
            check("m", log.standing("m"), action, 1)
            continue
        with pytest.raises(RegistryError) as caught:
            log.append("m", Entry(action, 1, "sha1", "r"), actor="a")
        if action != "rollback":
            assert f"version 1 is {state}: {state} → {REACHED.get(action, 'refused')} is not legal" in str(caught.value)
    assert log.state("m", 1) is state


@pytest.mark.parametrize("state", sorted(set(State) - {State.CHAMPION}))
def test_an_override_leads_from_anywhere_to_champion(tmp_path: Path, state: State) -> None:
    log = log_with(tmp_path, *((action, 1) for action in TO[state]))
    log.append("m", Entry("promote", 1, "sha1", "r", details={"override": {"actor": "a", "reason": "r"}}), actor="a")
    assert log.champion("m").to_version == 1


def test_a_rollback_leads_to_the_previous_champion_alone(tmp_path: Path) -> None:
    log = log_with(tmp_path, *((action, version) for version in (1, 2, 3) for action in ("validate", "promote")))
    for version in (1, 3):
        with pytest.raises(RegistryError, match=f"a rollback leads to the previous champion, 2, not to version {version}"):
            log.append("m", Entry("rollback", version, "sha", "r"), actor="a")
    log.append("m", Entry("rollback", 2, "sha2", "r"), actor="a")
    assert (log.standing("m").champion, log.standing("m").previous) == (2, 3)


def test_a_newcomer_takes_the_place_and_the_one_before_goes_back(tmp_path: Path) -> None:
    log = log_with(
        tmp_path, *(("validate", version) for version in (1, 2, 3, 4)), ("shadow", 1), ("shadow", 2), ("canary", 3), ("canary", 4)
    )
    assert (log.shadow("m").to_version, log.canary("m").to_version, log.challenger("m").to_version) == (2, 4, 4)
    assert log.state("m", 1) is log.state("m", 3) is State.VALIDATED
    for version in (1, 2):
        log.append("m", *([Entry("promote", version, "sha", "r")]), actor="a")
    assert (log.state("m", 1), log.state("m", 2), log.shadow("m")) == (State.RETIRED, State.CHAMPION, None)


def test_what_was_removed_never_comes_back_and_what_is_needed_is_not_removed(tmp_path: Path) -> None:
    log = log_with(tmp_path, ("validate", 1), ("promote", 1), ("validate", 2), ("promote", 2), ("register", 3), ("remove", 3))
    for action in ACTIONS:
        with pytest.raises(RegistryError, match="version 3"):
            log.append("m", Entry(action, 3, "sha3", "r", details={"override": {}}), actor="a")
    with pytest.raises(RegistryError, match="version 1 is the previous champion, which a rollback needs: retired → retired is not legal"):
        log.append("m", Entry("remove", 1, "sha1", "r"), actor="a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(1, 4)), max_size=40))
def test_any_legal_course_leaves_one_champion_one_canary_and_one_shadow(course: list[tuple[str, int]]) -> None:
    standing, done = Standing(), []
    for action, version in course:
        try:
            check("m", standing, action, version)
        except RegistryError:
            continue
        done.append((len(done) + 1, action, version))
        standing.apply(*done[-1])
        found = list(standing.states.values())
        assert all(found.count(state) <= 1 for state in (State.CHAMPION, State.CANARY, State.SHADOW))
        assert standing.only(State.CHAMPION) == standing.champion
        assert standing.previous is None or standing.previous != standing.champion
        assert {standing.champion, standing.previous}.isdisjoint(standing.removed)
    assert Standing.after(done) == standing
    crowned = [version for _, action, version in done if REACHED.get(action) is State.CHAMPION]
    assert standing.champion == (crowned[-1] if crowned else None)


def test_the_log_tells_the_standing_after_any_event(tmp_path: Path) -> None:
    course = [
        ("register", 1),
        ("validate", 1),
        ("canary", 1),
        ("promote", 1),
        ("validate", 2),
        ("shadow", 2),
        ("promote", 2),
        ("rollback", 1),
    ]
    log = log_with(tmp_path, *course)
    events = log.events("m")
    for count, event in enumerate(events, 1):
        assert log.standing("m", event.time) == Standing.after((e.id, e.action, e.to_version) for e in events[:count])
    assert log.standing("m", datetime(2020, 1, 1, tzinfo=UTC)) == Standing()
