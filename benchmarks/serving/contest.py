# SPDX-License-Identifier: Apache-2.0
"""The contest: answers compared, capacities by closed loops, sweeps over rates, then the knees of ours and of the best peer in turns."""

import copy
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.frame import MIN_PAIRS, Result, threads
from benchmarks.peers import python_of
from benchmarks.serving import prepared
from benchmarks.serving.clients import PATIENT_MS, Clients
from benchmarks.serving.figures import Step, capacity, knee
from benchmarks.serving.prepared import Sizes
from benchmarks.serving.report import Base, Knees, Measured, Sweep, result
from benchmarks.serving.servers import OURS, PEERS, ROWS, WHOLE, Contender, Running, running
from benchmarks.serving.swaps import Swaps, swaps
from benchmarks.worker import Worker
from pipelines.steps.demo import free_port

HERE = Path(__file__).parent
DEADLINES = (100, 50)
"""Milliseconds."""
CLIENTS = 8  # of a closed loop
OFFLINE_SIZES = (1, 2, 4, 8, 16)
TOLERANCE = 1e-3
"""Of scores: features that are ages go on while servers are asked one after another."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        peers: beside ours.
        rates: offered, over each server's own capacity.
        seconds: of each rate.
        pairs: of measurements at the knees.
        swaps: of bundles under load.
        questions: different requests.
        sizes: of the planted data.
    """

    peers: tuple[Contender, ...] = PEERS
    rates: tuple[float, ...] = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
    seconds: float = 4.0
    pairs: int = MIN_PAIRS
    swaps: int = 100
    questions: int = 200
    sizes: Sizes = field(default_factory=Sizes)


FULL = Plan()
QUICK = Plan(peers=PEERS[:1], rates=(0.8, 1.0, 3.0), seconds=1.5, swaps=10, questions=64)


@dataclass(frozen=True)
class Cores:
    """Which core has what."""

    server: int
    generator: int


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    return compete(QUICK if quick else FULL, Console(stderr=True))


def compete(plan: Plan, console: Console) -> Result:
    """Run a plan.

    Raises:
        RuntimeError: there are no two cores, or an environment is not there, or a server failed.
        ValueError: a server gives other scores than ours.
    """
    for contender in plan.peers:
        python_of(contender.environment)  # missed before anything is done
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that servers are ended
    with tempfile.TemporaryDirectory(prefix="serving") as name:
        contest = Contest(plan, Path(name), console)
        with threads(1):
            contest.prepare()
        with two_cores() as cores:
            return contest.run(cores)


@contextmanager
def two_cores() -> Iterator[Cores]:
    """One for the server, and one for the generator and for this process, which does little while the generator runs.

    Raises:
        RuntimeError: this process may use one only.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise RuntimeError("cores: expected two, one for the server and one for the generator, got 1")
    os.sched_setaffinity(0, {allowed[-1]})
    try:
        yield Cores(allowed[0], allowed[-1])
    finally:
        os.sched_setaffinity(0, set(allowed))


class Contest:
    """See the module.

    Args:
        plan: how much.
        folder: for all files.
        console: told of progress.
    """

    def __init__(self, plan: Plan, folder: Path, console: Console) -> None:
        self._plan, self._folder, self._console = plan, folder, console
        self._began = time.monotonic()
        self._servers = 0

    def prepare(self) -> None:
        """Make what is served."""
        self._served = prepared.prepare(self._folder / "home", self._plan.sizes, self._say)
        self._questions = prepared.questions(self._served, self._plan.questions)

    def run(self, cores: Cores) -> Result:
        """All that is measured, on these cores."""
        plan, self._cores = self._plan, cores
        offline = self._offline()
        with Worker("generator", python_of("ours"), HERE / "generator.py", str(self._cores.generator), threads=1) as worker:
            self._clients = Clients(worker, self._folder, self._questions, DEADLINES)
            with self._running(OURS, ROWS[0]) as ours:
                size = len(self._answer(ours))
                self._expected = {row: [ours.ask(row, question) for question in self._questions[:3]] for row in ROWS}
                sweeps = [self._sweep(ours, row) for row in ROWS]  # before all others
            sweeps += [self._sweep_of(contender, row) for contender in plan.peers for row in ROWS]
            with self._running(OURS, ROWS[0]) as ours:
                knees = [self._knees(ours, row, [sweep for sweep in sweeps if sweep.row == row]) for row in ROWS]
                moved = self._swaps(ours, sweeps[1].capacity / 2)
            ceiling = self._ceiling(size)
        base = Base(self._served.parameters, ceiling, offline, time.monotonic() - self._began)
        return result(Measured(base, sweeps, knees, moved, plan.rates, DEADLINES))

    def _offline(self) -> dict[str, dict[str, float]]:
        """Rows a second without a server, by the size of a batch; compiles the ranker, which all servers find then."""
        self._say("compiling, and the same work without a server")
        arguments = (str(self._cores.server), str(self._served.home))
        with Worker("offline", python_of("ours"), HERE / "offline.py", *arguments, threads=1) as worker:
            found: dict[str, dict[str, float]] = worker.ask(
                do="rates", bodies=self._questions[:16], sizes=OFFLINE_SIZES, seconds=self._plan.seconds / 4
            )
        return found

    def _ceiling(self, size: int) -> float:
        """Requests a second that the generator can send, and read answers as long as ours of, where the server does nothing."""
        self._say("the generator's ceiling")
        with self._clients.empty_server(free_port(), size, self._cores.server) as port:
            return self._clients.ceiling(port)

    def _sweep_of(self, contender: Contender, row: str) -> Sweep:
        with self._running(contender, row) as server:
            return self._sweep(server, row)

    def _sweep(self, server: Running, row: str) -> Sweep:
        """Its capacity, and every rate; of ours for each deadline, since it is told."""
        contender, plan = server.contender, self._plan
        self._check(server, row)
        self._clients.closed(server, row, CLIENTS, plan.seconds / 2)
        most = capacity(self._clients.closed(server, row, CLIENTS, plan.seconds))
        self._say(f"{contender.name}, {row}: capacity {most:.1f} requests a second")
        sweep = Sweep(row, contender.name, contender.told, most, {})
        for deadline in DEADLINES if contender.told else DEADLINES[:1]:
            steps = []
            for place, rate in enumerate(plan.rates):
                self._settle(server, row)
                steps.append(self._clients.step(server, row, deadline, rate * most, plan.seconds, seed=place))
            sweep.steps[deadline] = steps
        return sweep

    def _knees(self, ours: Running, row: str, sweeps: Sequence[Sweep]) -> Knees:
        """Ours beside the best peer, each at its own knee, in turns: by deadline."""
        own, peers = sweeps[0], sweeps[1:]
        best = {deadline: max(peers, key=lambda sweep: sweep.peak(deadline)) for deadline in DEADLINES}
        none: dict[int, list[float]] = {deadline: [] for deadline in DEADLINES}
        found = Knees(row, {deadline: sweep.name for deadline, sweep in best.items()}, none, copy.deepcopy(none))
        for contender in self._plan.peers:
            deadlines = [deadline for deadline in DEADLINES if best[deadline].name == contender.name]
            if not deadlines:
                continue
            with self._running(contender, row) as peer:
                self._say(f"{row}, {' and '.join(map(str, deadlines))} ms: ours and {contender.name} in turns")
                for server in (ours, peer):
                    self._clients.closed(server, row, CLIENTS, self._plan.seconds / 2)
                for pair in range(self._plan.pairs):
                    self._pair((ours, own), (peer, best[deadlines[0]]), deadlines, pair, found)
        return found

    def _pair(self, ours: tuple[Running, Sweep], peer: tuple[Running, Sweep], deadlines: Sequence[int], pair: int, found: Knees) -> None:
        """Each at the rates of its knees: ours for every deadline, since it is told; the peer once where they are one rate."""
        for server, sweep, goodput in ((*ours, found.ours), (*peer, found.peer)):
            steps: dict[tuple[int, float], Step] = {}
            for deadline in deadlines:
                rate = self._plan.rates[knee(sweep.of(deadline), deadline)] * sweep.capacity
                key = (deadline if sweep.told else 0, rate)
                if key not in steps:
                    steps[key] = self._clients.step(server, sweep.row, deadline, rate, self._plan.seconds, seed=1000 + pair)
                    self._settle(server, sweep.row)
                goodput[deadline].append(steps[key].goodput(deadline))

    def _swaps(self, ours: Running, rate: float) -> Swaps:
        plan = self._plan
        self._say(f"{plan.swaps} swaps at half of the capacity")
        return swaps(ours, WHOLE, self._clients, self._served.home, rate, plan.swaps, PATIENT_MS, plan.seconds)

    def _check(self, server: Running, row: str) -> None:
        """Hold that its scores are ours."""
        for question, expected in zip(self._questions, self._expected[row], strict=False):
            found = server.ask(row, question)
            if not np.allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE):
                worst = float(np.abs(np.subtract(found, expected)).max())
                raise ValueError(f"{server.contender.name}, {row}: scores differ from ours by up to {worst}")

    def _settle(self, server: Running, row: str, seconds: float = 20.0) -> None:
        """Wait until nothing is left of the requests before: until two in a row take no more than twice the shortest."""
        until, taken = time.monotonic() + seconds, [float("inf")]
        while time.monotonic() < until:
            began = time.monotonic()
            with suppress(OSError, RuntimeError):
                server.ask(row, self._questions[0])
                taken.append(time.monotonic() - began)
                if len(taken) > 2 and max(taken[-2:]) < 2 * min(taken):
                    return

    @contextmanager
    def _running(self, contender: Contender, row: str) -> Iterator[Running]:
        self._servers += 1
        log = self._folder / f"{self._servers}.log"
        with running(contender, self._served.home, row, self._cores.server, log) as server:
            yield server

    def _answer(self, server: Running) -> bytes:
        return self._clients.answer(server, ROWS[1], self._questions[0])

    def _say(self, message: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._began:6.1f} s[/]  {message}")
