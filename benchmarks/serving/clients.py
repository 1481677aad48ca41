# SPDX-License-Identifier: Apache-2.0
"""What the contest asks of the generator."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.serving.figures import Step
from benchmarks.serving.prepared import write_bodies
from benchmarks.serving.servers import DEADLINE_HEADER, Running, request
from benchmarks.worker import ROOT, Worker

GIVE_UP_SECONDS = 2.0
"""After which a client waits no longer, and disconnects."""
CONNECTIONS = 1024
PATIENT_MS = 5_000
"""The deadline of closed loops, which measure capacity, and while bundles are swapped."""
CEILING_REQUESTS = 20_000


class Clients:
    """Requests of every contender and row, encoded beforehand in the generator's process.

    Args:
        generator: its process.
        folder: for files of bodies.
        questions: what is asked, in turns.
        deadlines: milliseconds.
    """

    def __init__(self, generator: Worker, folder: Path, questions: Sequence[dict[str, Any]], deadlines: Sequence[int]) -> None:
        self._generator, self._folder, self._questions, self._deadlines = generator, folder, questions, deadlines
        self._made: set[str] = set()

    def closed(self, server: Running, row: str, clients: int, seconds: float) -> dict[str, Any]:
        """A closed loop of patient clients."""
        name = self._requests(server, row, PATIENT_MS)
        return self._generator.ask(do="closed", port=server.port, name=name, clients=clients, seconds=seconds)

    def open(self, server: Running, row: str, deadline_ms: int, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """An open loop of ``rate`` requests a second; gives `benchmarks.serving.load.Outcomes` as a dictionary."""
        return self._generator.ask(
            do="open",
            port=server.port,
            name=self._requests(server, row, deadline_ms),
            rate=rate,
            seconds=seconds,
            seed=seed,
            give_up=GIVE_UP_SECONDS,
            lesser=server.contender.routes[row].lesser,
            connections=CONNECTIONS,
        )

    def step(self, server: Running, row: str, deadline_ms: int, rate: float, seconds: float, seed: int) -> Step:
        """See `open`."""
        return Step.of(self.open(server, row, deadline_ms, rate, seconds, seed))

    def answer(self, server: Running, row: str, question: dict[str, Any]) -> bytes:
        """The content of an answer."""
        route = server.contender.routes[row]
        return request(server.port, "POST", route.path, json.dumps(route.body(question)).encode(), {DEADLINE_HEADER: str(PATIENT_MS)})[1]

    def ceiling(self, port: int) -> float:
        """Answers a second where all requests are due at once."""
        file = self._folder / "plain.jsonl"
        write_bodies(file, self._questions)
        self._generator.ask(do="requests", name="plain", file=str(file), path="/", headers={})
        due = [0.0] * CEILING_REQUESTS
        found = self._generator.ask(do="open", port=port, name="plain", due=due, seconds=1.0, give_up=60.0, lesser=[], connections=32)
        return float(CEILING_REQUESTS / max(found["latency"]))

    @contextmanager
    def empty_server(self, port: int, size: int, core: int) -> Iterator[int]:
        """A server that does nothing but answer with ``size`` bytes, on a core."""
        command = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.serving.peers.empty_server", str(port), str(size)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            for _ in range(200):
                with suppress(OSError):
                    request(port, "GET", "/")
                    break
                time.sleep(0.05)
            yield port
        finally:
            process.kill()
            process.wait(10)

    def _requests(self, server: Running, row: str, deadline_ms: int) -> str:
        """The name of encoded requests, which are made when they are first asked for."""
        contender = server.contender
        told = {DEADLINE_HEADER: str(deadline_ms)} if contender.told else {}
        name = f"{contender.name} {row} {deadline_ms if told else ''}".strip()
        if name not in self._made:
            route, file = contender.routes[row], self._folder / f"{name}.jsonl"
            write_bodies(file, [route.body(question) for question in self._questions])
            self._generator.ask(do="requests", name=name, file=str(file), path=route.path, headers=told)
            self._made.add(name)
        return name
