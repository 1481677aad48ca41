# SPDX-License-Identifier: Apache-2.0
"""The servers of the contest: how each is started, asked and read; all of its processes on one core, and all ended at the end."""

import http.client
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import python_of
from benchmarks.serving.behind import CHAMPION, HOME, MODEL, PORT, WAY
from benchmarks.worker import ROOT
from pipelines.steps.demo import free_port

ROWS = SAME, WHOLE = "same_ranker", "full_path"
WAYS = {SAME: "same", WHOLE: "rows"}
"""What stands behind a peer in each row, see `benchmarks.serving.behind`."""
DEADLINE_HEADER = "x-deadline-ms"
START_SECONDS, END_SECONDS = 240.0, 15.0
_MARK = "RECSYS_BENCHMARK_SERVER"


@dataclass(frozen=True)
class Route:
    """How a contender is asked in one row.

    Attributes:
        path: of the URL.
        body: the JSON of a question ``{"user_id", "item_ids"}``.
        scores: from the JSON of an answer and its question to a score for each item, in the question's order.
        lesser: what in an answer's flags says that it was made without the ranker.
    """

    path: str
    body: Callable[[dict[str, Any]], dict[str, Any]]
    scores: Callable[[dict[str, Any], dict[str, Any]], list[float]]
    lesser: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contender:
    """A server.

    Attributes:
        name: in the table.
        environment: whose interpreter runs it, see `benchmarks.peers`.
        command: behind the interpreter, given port and home.
        health: a path that answers 200 once it is ready.
        routes: by row.
        told: whether requests tell it their deadline.
        variables: further ones of its environment.
    """

    name: str
    environment: str
    command: Callable[[int, Path], list[str]]
    health: str
    routes: dict[str, Route]
    told: bool = False
    variables: dict[str, str] = field(default_factory=dict)


def _infer_body(question: dict[str, Any]) -> dict[str, Any]:
    inputs = {"user_id": [question["user_id"]], "item_id": question["item_ids"]}
    tensors = [{"name": name, "shape": [len(data)], "datatype": "BYTES", "data": data} for name, data in inputs.items()]
    return {"inputs": tensors, "outputs": [{"name": "score"}]}


def _listed(answer: dict[str, Any], question: dict[str, Any]) -> list[float]:
    found = {item["item_id"]: item["probability"] for item in answer["items"]}
    return [found[item] for item in question["item_ids"]]


def _ours_command(port: int, home: Path) -> list[str]:
    # The defaults, but for the ranker, which is compiled, and that no former champion is kept, so that every swap loads.
    fixed = {"port": port, "home": home, "model": CHAMPION, "compile": "true", "keep-previous-seconds": 0}
    return ["-m", "serving", *(part for name, value in fixed.items() for part in (f"--{name}", str(value)))]


def _peer(name: str, environment: str, command: Callable[[int], list[str]], **other: Any) -> Contender:
    plain = Route("/predict", lambda question: question, lambda answer, _: answer["scores"])
    return Contender(
        name, environment, lambda port, _: command(port), **{"health": "/health", "routes": dict.fromkeys(ROWS, plain), **other}
    )


_PEERS = "benchmarks.serving.peers"
_BENTOML = Route("/predict", lambda question: {"asked": [question]}, lambda answer, _: answer[0])  # type: ignore[index]
OURS = Contender(
    "ours",
    "ours",
    _ours_command,
    "/readyz",
    {
        SAME: Route(f"/v2/models/{MODEL}/infer", _infer_body, lambda answer, _: answer["outputs"][0]["data"]),
        WHOLE: Route("/v1/rank", lambda question: question, _listed, ('"retriever_only"', '"popular"')),
    },
    told=True,
)
PEERS = (
    _peer("FastAPI", "ours", lambda _: ["-m", f"{_PEERS}.fastapi_server"]),
    _peer("LitServe", "litserve", lambda _: ["-m", f"{_PEERS}.litserve_server"]),
    _peer(
        "BentoML",
        "bentoml",
        lambda port: ["-m", "bentoml", "serve", f"{_PEERS}.bentoml_server:Scorer", "--host", "127.0.0.1", "--port", str(port)],
        health="/readyz",
        routes=dict.fromkeys(ROWS, _BENTOML),
        variables={"BENTOML_DO_NOT_TRACK": "True"},
    ),
    _peer("Ray Serve", "ours", lambda _: ["-m", f"{_PEERS}.ray_server"], health="/predict", variables={"RAY_USAGE_STATS_ENABLED": "0"}),
)


class Running:
    """A server that is ready.

    Attributes:
        contender: which.
        port: where it listens.
        row: of the contest that it was started for.
    """

    def __init__(self, contender: Contender, port: int, mark: str, row: str) -> None:
        self.contender, self.port, self.row, self._mark = contender, port, row, mark

    def resident(self) -> int:
        """Bytes of memory of all of its processes."""
        return sum(process.memory_info().rss for process in marked(self._mark))

    def ask(self, row: str, question: dict[str, Any]) -> list[float]:
        """The scores of one request, in its items' order.

        Raises:
            RuntimeError: the status is not 200.
        """
        route = self.contender.routes[row]
        headers = {DEADLINE_HEADER: "5000"} if self.contender.told else {}
        status, content = request(self.port, "POST", route.path, json.dumps(route.body(question)).encode(), headers)
        if status != 200:
            raise RuntimeError(f"{self.contender.name}: {route.path} answered {status}: {content[:500]!r}")
        return route.scores(json.loads(content), question)


@contextmanager
def running(contender: Contender, home: Path, row: str, core: int, log: Path) -> Iterator[Running]:
    """A server on a free port whose processes have one core; whatever it started is ended at the end.

    Args:
        contender: which.
        home: the folder of the registry.
        row: of the contest.
        core: where its processes run.
        log: where its output goes.

    Raises:
        RuntimeError: its environment is not there, or it did not become ready; names the log's end.
    """
    port, mark = free_port(), uuid.uuid4().hex
    command = ["taskset", "-c", str(core), str(python_of(contender.environment)), *contender.command(port, home)]
    told = {HOME: str(home), WAY: WAYS[row], PORT: str(port), _MARK: mark, "PYTHONPATH": str(ROOT)}
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    with log.open("wb") as output:
        variables = {**os.environ, **quiet, **contender.variables, **told}
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait(contender, process, port, log)
        yield Running(contender, port, mark, row)
    finally:
        _end(process, mark)


def marked(mark: str) -> list[psutil.Process]:
    """The processes that a server started, whatever their parents are by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def request(port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and content of one request on a connection of its own.

    Raises:
        OSError: there is no answer.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise OSError(f"{method} {path}: {type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _wait(contender: Contender, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with suppress(OSError):
            if request(port, "GET", contender.health)[0] == 200:
                return
        time.sleep(0.2)
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(
        f"{contender.name} did not become ready in {START_SECONDS:.0f} s, exit status {process.poll()}; its output ends:\n{tail}"
    )


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End it as it wants to be ended, and then whatever is left of it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    left = marked(mark)
    for each in left:
        with suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(left, END_SECONDS)
    process.wait(END_SECONDS)
