# SPDX-License-Identifier: Apache-2.0
"""The soak: its load is open, its arithmetic is right, and a short one goes all the way."""

import asyncio
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import serving_soak
from benchmarks.serving_soak import Course, Line, drift, result_of, slope
from benchmarks.serving_soak.load import Client, Seen, Windows, capacity
from tests.serving.faults.served import own_home

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Slow(asyncio.Protocol):
    """A server that takes a known time for an answer, and stands still for a while."""

    def __init__(self, delay: float, stall: tuple[float, float]) -> None:
        self._delay, (self._from, self._to) = delay, stall

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        wait = max(self._delay, self._to - now if self._from <= now < self._to else 0.0)
        asyncio.get_running_loop().call_later(wait, self._transport.write, ANSWER)


async def offered(rate: float, seconds: float, delay: float, stall: tuple[float, float] = (0.0, 0.0)) -> Seen:
    now = time.monotonic()
    during = (now + stall[0], now + stall[1]) if stall[1] else stall
    server = await asyncio.get_running_loop().create_server(lambda: Slow(delay, during), "127.0.0.1", 0)
    client, seen = Client(server.sockets[0].getsockname()[1]), Windows()
    await client.offer(itertools.repeat(b"GET / HTTP/1.1\r\n\r\n"), rate, 0, seen, now + seconds)
    await client.drain()
    server.close()
    return seen.now


def test_latencies_are_the_servers_and_arrivals_are_those_of_a_poisson_process() -> None:
    seen = asyncio.run(offered(rate=200, seconds=3, delay=0.05))
    assert not seen.errors and abs(len(seen.seconds) - 600) < 5 * math.sqrt(600)
    assert min(seen.seconds) >= 0.05 and 0.05 <= seen.percentile(50) < 0.12


def test_a_server_that_stalls_is_charged_for_every_request_that_was_due() -> None:
    """Of a closed loop, only as many requests as there are clients would see the stall."""
    seen = asyncio.run(offered(rate=200, seconds=3, delay=0.0, stall=(1.0, 2.0)))
    late = [each for each in seen.seconds if each > 0.1]
    assert 0.6 * 180 < len(late) < 1.6 * 180 and max(late) > 0.9


def test_the_capacity_is_the_clients_over_the_delay() -> None:
    async def measured() -> float:
        server = await asyncio.get_running_loop().create_server(lambda: Slow(0.05, (0.0, 0.0)), "127.0.0.1", 0)
        client = Client(server.sockets[0].getsockname()[1])
        found = await capacity(client, itertools.repeat(b"GET / HTTP/1.1\r\n\r\n"), 4, 1.5)
        await client.drain()
        server.close()
        return found

    assert 40 < asyncio.run(measured()) <= 80


def test_a_server_that_is_not_there_is_an_error_and_no_exception() -> None:
    async def asked() -> tuple[int, bytes]:
        return await Client(1).ask(b"GET / HTTP/1.1\r\n\r\n")

    assert asyncio.run(asked()) == (0, b"")


def course(megabytes: list[float], p99: list[float]) -> Course:
    lines = [Line(minute, int(1e6 * mb), 0.01, p, 100, 0, {}) for minute, (mb, p) in enumerate(zip(megabytes, p99, strict=True))]
    windows = [Seen([0.01] * 98 + [p] * 2) for p in p99]
    return Course(100.0, lines, windows, [])


def test_a_slope_is_a_share_of_the_median_and_no_outlier_moves_it() -> None:
    minutes = np.arange(120.0)
    values = 1000 + 0.5 * minutes
    assert slope(minutes, values) == pytest.approx(100 * 30 / np.median(values))
    values[[10, 50, 90]] = 5000
    assert slope(minutes, values) == pytest.approx(100 * 30 / 1030, rel=0.05)
    assert math.isnan(slope([1.0], [1.0]))


def test_the_drift_is_the_last_quarter_over_the_second() -> None:
    assert drift(course([1] * 8, [9, 9, 0.02, 0.02, 9, 9, 0.03, 0.03]).windows) == pytest.approx(50)


def test_checks_hold_for_what_stays_and_not_for_what_grows() -> None:
    calm = result_of(course([1000.0] * 60, [0.02] * 60), 1)
    assert [check.holds for check in calm.checks] == [True, True, True]
    grown = result_of(course([1000.0 + n for n in range(60)], [0.02 + n / 1000 for n in range(60)]), 1)
    assert [check.holds for check in grown.checks] == [False, False, True]
    warming = [500.0 + 40 * n for n in range(14)] + [1000.0] * 46
    assert result_of(course(warming, [0.02] * 60), 1).checks[0].holds, "what warms up is no leak"
    nothing = result_of(Course(0.0, [], [], []), 1)
    assert [check.holds for check in nothing.checks] == [False, False, True], "what was not measured does not hold"


@pytest.mark.slow
def test_a_soak_of_two_minutes_goes_all_the_way(tiny_run: Any, tmp_path: Path) -> None:
    (home := tmp_path / "home").mkdir()
    # On a machine that does other things as well, a request waits for a core.
    patient = ("--recommend-deadline-ms", "10000")
    result = serving_soak.soak(2.0, home=own_home(tiny_run.home, home), picture=tmp_path / "soak.svg", options=patient)
    found = json.loads(result.json_line())
    lines = found["details"]["lines"]
    assert len(lines) >= 11 and len(found["details"]["promotions"]) >= 10
    assert found["details"]["rate"] > 0 and sum(line["answered"] for line in lines) > 0.8 * 120 * found["details"]["rate"]
    assert {check["name"] for check in found["checks"]} == {"soak_memory_percent_an_hour", "soak_p99_drift_percent", "soak_errors"}
    assert next(check for check in found["checks"] if check["name"] == "soak_errors")["holds"], [line["errors"] for line in lines]
    assert lines[-1]["rss"] < 1.2 * lines[len(lines) // 4]["rss"]
    assert (tmp_path / "soak.svg").read_text().startswith("<svg")
