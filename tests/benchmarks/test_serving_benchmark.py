# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark: its generator beside servers of known delay, the arithmetic of goodput, the checks, and one tiny contest."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import peers
from benchmarks.serving.contest import Plan, compete
from benchmarks.serving.figures import Step, capacity, knee
from benchmarks.serving.load import NO_ANSWER, OpenLoop, Outcomes, as_json, closed_loop, encoded, poisson
from benchmarks.serving.prepared import Sizes
from benchmarks.serving.report import Base, Knees, Measured, Sweep, result
from benchmarks.serving.servers import PEERS, SAME, WHOLE, Contender, Route, marked, running
from benchmarks.serving.swaps import Swaps
from benchmarks.worker import Worker

TOLERANCE = 0.15
"""Seconds that a busy machine may add between an answer and its reading."""
REQUEST = encoded("/x", b"{}")


@asynccontextmanager
async def server(handle: Callable[[int, asyncio.StreamWriter], Awaitable[bool]]) -> AsyncIterator[int]:
    """The port of a server that gives its requests numbers; ``handle`` answers, and says whether the connection goes on."""
    numbers = iter(range(10**6))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            goes_on = True
            while goes_on:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                goes_on = await handle(next(numbers), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    started = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with started:
        yield started.sockets[0].getsockname()[1]


def answer(status: int = 200, content: bytes = b"ok") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def outcomes(
    handle: Callable[[int, asyncio.StreamWriter], Awaitable[bool]], due: list[float], *, give_up: float = 5.0, **options: Any
) -> Outcomes:
    async def ask() -> Outcomes:
        async with server(handle) as port:
            return await OpenLoop(port, [REQUEST], due, give_up=give_up, **options).run(1.0)

    return asyncio.run(ask())


# --- the generator


def test_poisson_times_are_drawn_beforehand_at_the_rate() -> None:
    times = poisson(200.0, 50.0, seed=3)
    gaps = np.diff([0.0, *times])
    assert times == poisson(200.0, 50.0, seed=3) != poisson(200.0, 50.0, seed=4)
    assert len(times) == pytest.approx(10_000, abs=4 * 100)  # four standard deviations
    assert gaps.min() > 0 and gaps.std() == pytest.approx(gaps.mean(), rel=0.05) and times[-1] < 50


def test_latencies_are_those_that_the_server_takes() -> None:
    delays, answered = [0.02, 0.1, 0.2], []

    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(delays[number % 3])
        writer.write(answer())
        answered.append(time.monotonic())
        return True

    due = [0.5 * place for place in range(6)]
    found = outcomes(handle, due)
    assert found.status == [200] * 6
    over = np.array(found.latency) - (np.array(answered) - found.began - due)
    assert over.min() > -0.002 and over.max() < TOLERANCE
    assert (np.array(found.latency) > np.tile(delays, 2) - 0.002).all()


def test_whatever_is_due_while_the_server_stalls_is_late() -> None:
    """With coordinated omission only the requests under way at the stall would be: one, or as many as there are connections."""
    stalled: list[float] = []
    answered: dict[int, float] = {}

    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        if number == 10:
            stalled.append(time.monotonic())
            time.sleep(0.5)  # the whole loop: server and client
        writer.write(answer())
        answered[number] = time.monotonic()
        return True

    due = [0.02 * place for place in range(50)]
    found = outcomes(handle, due, most=2)
    began = stalled[0] - found.began
    inside = [place for place, at in enumerate(due) if began < at < began + 0.5]
    assert len(inside) > 15
    last = max(answered.values()) - found.began
    for place in inside:
        assert began + 0.5 - due[place] - 0.002 <= found.latency[place] < last - due[place] + TOLERANCE


def test_requests_that_find_no_connection_are_late_by_their_wait() -> None:
    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0.1)
        writer.write(answer())
        return True

    found = outcomes(handle, [0.0] * 4, most=1)
    waits = np.sort(found.latency)  # those that are due at one moment come in any order
    assert (waits > np.array([0.1, 0.2, 0.3, 0.4]) - 0.002).all() and (np.diff(waits) > 0.098).all() and waits[-1] < 0.4 + 4 * TOLERANCE


def test_a_client_that_gave_up_has_no_answer_and_the_others_go_on() -> None:
    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        if number == 0:
            await asyncio.sleep(3.0)
        writer.write(answer())
        return True

    found = outcomes(handle, [0.0, 0.1, 0.2], give_up=1.5)
    assert found.status == [NO_ANSWER, 200, 200] and found.latency[0] == pytest.approx(1.5, abs=TOLERANCE)


def test_answers_in_pieces_in_chunks_and_before_the_end_of_a_connection_are_read() -> None:
    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        match number % 3:
            case 0:
                for byte in answer(429, b"no"):
                    writer.write(bytes([byte]))
                    await writer.drain()
                return True
            case 1:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
                await asyncio.sleep(0.05)
                writer.write(b"0\r\n\r\n")
                return True
        writer.write(b"HTTP/1.1 503 X\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        return False

    found = outcomes(handle, [0.15 * place for place in range(6)])
    assert found.status == [429, 200, 503] * 2


def test_lost_connections_are_no_answers() -> None:
    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer(content=b"x" * 10)[:-5] if number % 2 else answer())
        return number % 2 == 0

    found = outcomes(handle, [0.1 * place for place in range(4)])
    assert found.status == [200, NO_ANSWER, 200, NO_ANSWER]
    assert outcomes_of_nobody() == [NO_ANSWER]


def outcomes_of_nobody() -> list[int]:
    async def ask() -> Outcomes:
        async with server(lambda number, writer: asyncio.sleep(0, True)) as port:
            free = port
        return await OpenLoop(free, [REQUEST], [0.0], give_up=5.0).run(1.0)

    return asyncio.run(ask()).status


def test_lists_without_the_ranker_are_told_apart() -> None:
    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        flags = [[], ["popular"], ["new_user"]][number]
        writer.write(answer(content=json.dumps({"title": '"popular"', "flags": flags}).encode()))
        return True

    found = outcomes(handle, [0.0, 0.1, 0.2], lesser=[b'"popular"'])
    assert found.lesser == [False, True, False]


def test_a_closed_loop_asks_when_it_is_answered() -> None:
    async def handle(number: int, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(0.05)
        writer.write(answer())
        return True

    async def ask() -> Outcomes:
        async with server(handle) as port:
            return await closed_loop(port, [REQUEST], clients=4, seconds=1.0)

    found = capacity(as_json(asyncio.run(ask())))
    assert 0.25 * 4 / 0.05 < found <= 4 / 0.05 + 4


# --- the arithmetic


def step(*requests: tuple[float, int, bool], seconds: float = 2.0) -> Step:
    latency, status, lesser = zip(*requests, strict=True)
    return Step(seconds, np.array(latency), np.array(status), np.array(lesser))


def test_goodput_counts_whole_answers_in_time() -> None:
    found = step((0.04, 200, False), (0.09, 200, False), (0.11, 200, False), (0.01, 429, False), (2.0, NO_ANSWER, False), (0.03, 200, True))
    assert (found.goodput(100), found.goodput(50), found.goodput(100, lesser=True)) == (1.0, 0.5, 1.5)
    assert found.offered == 3.0
    assert (found.rejected, found.unanswered, found.lessened) == (1 / 6, 1 / 6, 1 / 6)
    assert found.percentile(50) == pytest.approx(65) and found.percentile(100) == pytest.approx(110)
    assert step((0.1, 503, False)).percentile(99) == float("inf")
    assert knee([step((0.01, 200, False)), found, step((0.2, 200, False))], 100) == 1


def test_capacity_is_what_is_answered_before_the_end() -> None:
    times = {"due": [0.0, 1.0, 1.0, 3.5], "latency": [1.0, 1.0, 1.0, 1.0], "seconds": 4.0}
    assert capacity({**times, "status": [200, 429, 200, 200]}) == 0.5
    with pytest.raises(RuntimeError, match=r"no answer with status 200, but \[500\]"):
        capacity({**times, "status": [500] * 4})


def test_the_checks_have_their_names_bounds_and_directions() -> None:
    def good(count: int, seconds: float = 0.04) -> Step:
        return step(*[(seconds, 200, False)] * count, seconds=1.0)

    def sweeps(row: str) -> list[Sweep]:
        ours = Sweep(row, "ours", True, 100.0, {100: [good(80), good(100), good(95)], 50: [good(80), good(90), good(60)]})
        return [ours, Sweep(row, "FastAPI", False, 50.0, {100: [good(40), good(50, 0.08), good(30, 0.3)]})]

    knees = [
        Knees(row, {100: "FastAPI", 50: "FastAPI"}, {100: [90.0] * 5, 50: [60.0] * 5}, {100: [50.0] * 5, 50: [40.0] * 5})
        for row in (SAME, WHOLE)
    ]
    swaps = Swaps(20, [1.0] * 20, [10] * 10 + [12] * 10, [200] * 99 + [429], [0.02] * 99 + [0.001], [False] * 100, [0.02] * 50)
    base = Base(300_000, 2_000.0, {"1": {"path": 50_000.0, "ranker": 90_000.0}, "4": {"path": 100_000.0, "ranker": 80_000.0}}, 60.0)
    found = result(Measured(base, sweeps(SAME) + sweeps(WHOLE), knees, swaps, (0.8, 1.0, 3.0), (100, 50)))
    checks = {check.name: check for check in found.checks}
    assert {name: (check.at_least, check.at_most) for name, check in checks.items()} == {
        "same_ranker_over_best_peer": (1, None),
        "goodput_over_best_peer": (2, None),
        "of_offline_batch_rate": (0.7, None),
        "overload_goodput": (0.9, None),
        "overload_p99_over_deadline": (None, 1),
        "swap_failures": (None, 0),
        "swap_p99_over_steady": (None, 1.2),
        "swap_memory_growth": (None, 1.05),
        "generator_ceiling": (3, None),
    }
    assert {name: check.value for name, check in checks.items()} == {
        "same_ranker_over_best_peer": 1.5,
        "goodput_over_best_peer": 1.5,
        "of_offline_batch_rate": 0.5,
        "overload_goodput": 0.667,
        "overload_p99_over_deadline": 0.8,
        "swap_failures": 1,
        "swap_p99_over_steady": 1.0,
        "swap_memory_growth": 1.2,
        "generator_ceiling": 20,
    }
    assert "100 ms, FastAPI: 1.80" in checks["goodput_over_best_peer"].note and len({tuple(row) for row in found.rows}) == 1
    assert len(found.rows) == 2 * (6 + 3) and '"benchmark": "serving"' in found.json_line()


# --- servers


def stub(code: str) -> Contender:
    route = Route("/", lambda question: question, lambda content, question: content["scores"])
    return Contender("stub", "ours", lambda port, home: ["-c", code, str(port)], "/", {SAME: route, WHOLE: route})


CHILD = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_server_has_one_core_and_ends_with_all_that_it_started(tmp_path: Path) -> None:
    core, marks = max(os.sched_getaffinity(0)), []
    with pytest.raises(KeyError, match="an error meanwhile"), running(stub(CHILD), tmp_path, SAME, core, tmp_path / "log") as server:
        processes = marked(server._mark)
        marks.append(server._mark)
        assert len(processes) == 2 and all(process.cpu_affinity() == [core] for process in processes)
        assert server.resident() > 1 << 20
        raise KeyError("an error meanwhile")
    assert marked(marks[0]) == [] and not any(process.is_running() for process in processes)


def test_a_server_that_ends_at_once_shows_its_output(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with (
        pytest.raises(RuntimeError, match=r"(?s)stub did not become ready.*exit status 3.*no model here"),
        running(stub("print('no model here'); raise SystemExit(3)"), tmp_path, SAME, core, tmp_path / "log"),
    ):
        raise AssertionError("it was ready")


def test_a_peer_without_its_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="the environment of litserve is not there; build it with: make peers"):
        compete(Plan(peers=tuple(peer for peer in PEERS if peer.name == "LitServe")), Console(quiet=True))


def test_the_generator_needs_no_library_and_has_its_core() -> None:
    core = min(os.sched_getaffinity(0))
    script = "import sys, benchmarks.serving.generator; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    with Worker("generator", sys.executable, root / "benchmarks/serving/generator.py", str(core), threads=1) as worker:
        worker.ask(do="requests", name="x", file="/dev/null", path="/", headers={})
        assert os.sched_getaffinity(worker.pid) == {core}


@pytest.mark.slow
def test_a_tiny_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI and ours, from training to checks: everything is measured, and both give the same scores."""
    plan = Plan(PEERS[:1], rates=(0.8, 3.0), seconds=2.0, swaps=2, questions=8, sizes=Sizes(users=150, items=600, events_per_user=30))
    found = compete(plan, Console(quiet=True))
    assert len(found.checks) == 9 and all(np.isfinite(check.value) for check in found.checks)
    assert {row["server"] for row in found.rows} == {"ours, 100 ms", "ours, 50 ms", "FastAPI"}
    assert all(value > 0 for value in found.details["capacity"].values()) and len(found.details["swaps"]["seconds"]) == 2
    by_name = {check.name: check for check in found.checks}
    assert by_name["generator_ceiling"].holds and by_name["swap_failures"].value >= 0
