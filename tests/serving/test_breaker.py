# SPDX-License-Identifier: Apache-2.0
"""The circuit breaker on a clock of the test's own, and the bounded map."""

from serving.engine.breaker import Breaker
from serving.engine.cache import LRU


def test_a_breaker_opens_after_failures_in_a_row_and_closes_after_one_success() -> None:
    now = [0.0]
    breaker = Breaker(3, 10.0, clock=lambda: now[0])
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(2):
        breaker.failed()
    assert breaker.allow() and not breaker.open
    breaker.failed()
    assert breaker.open and not breaker.allow() and not breaker.due
    now[0] = 10.0
    assert breaker.due
    assert breaker.allow(), "one attempt"
    assert not breaker.allow(), "and no second one while it runs"
    breaker.failed()
    assert breaker.open and not breaker.allow()
    now[0] = 25.0
    assert breaker.allow()
    breaker.succeeded()
    assert not breaker.open and breaker.allow() and breaker.allow()


def test_an_attempt_that_is_never_told_of_is_followed_by_another() -> None:
    now = [0.0]
    breaker = Breaker(1, 10.0, clock=lambda: now[0])
    breaker.failed()
    now[0] = 10.0
    assert breaker.allow() and not breaker.allow()
    now[0] = 20.0
    assert breaker.allow()


def test_the_oldest_entry_makes_room() -> None:
    cache: LRU[str, int] = LRU(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert cache.get("b") is None and cache.get("a") == 1 and cache.get("c") == 3 and len(cache) == 2
    assert cache.newest(5) == ["c", "a"] and cache.newest(1) == ["c"]
