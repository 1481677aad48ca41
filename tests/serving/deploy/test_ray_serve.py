# SPDX-License-Identifier: Apache-2.0
"""Replicas under Ray Serve: their settings and health here, and two of them on a real Ray, started by the command."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from mlflow import MlflowClient
from prometheus_client.parser import text_string_to_metric_families
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from pipelines.cli import serve as command
from pipelines.steps.demo import free_port
from recsys.core.errors import ConfigError
from recsys.registry import Evidence, Location, Registry
from serving.app import create_app
from serving.deploy.ray_serve import OnRay, Replica, application, built, for_replicas
from serving.engine import Engine, Hosting, Loaded, RegistrySource
from serving.settings import Settings
from tests.serving.support import Faulty, Switch, settings, wait_until

ROOT = Path(__file__).parents[3]
ASKED = [{"user_id": str(user), "k": 4, "request_time": "2030-01-01T00:00:00Z"} for user in range(8)]
BODY = {"user_id": "3", "k": 3, "deadline_ms": 10_000}
Load = Callable[..., Loaded]


# --- options and settings


def test_options_are_told_apart_from_the_servers() -> None:
    options, rest = OnRay.from_arguments(["--replicas", "2", "--max-batch-rows", "64", "--most-replicas", "5", "--port", "9000"])
    assert (options.replicas, options.most, rest) == (2, 5, ["--max-batch-rows", "64", "--port", "9000"])
    assert Settings.from_arguments(rest, {}).port == 9000
    assert not OnRay.model_fields.keys() & Settings.model_fields.keys(), "an option is of one kind"
    assert all(field.description for field in OnRay.model_fields.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--replicas", "0"], "replicas"),
        (["--replicas", "3", "--most-replicas", "2"], "most_replicas: expected at least replicas, 3, got 2"),
    ],
)
def test_options_that_do_not_fit_are_named(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnRay.from_arguments(given)


def test_a_replicas_settings_are_the_servers_but_for_what_replicas_cannot_have(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    given = Settings(home=Path("here"), access=Path("keys.json"), workers=1, max_batch_rows=77)
    own = for_replicas(given, OnRay(replicas=2))
    assert (own.home, own.access) == (tmp_path / "here", tmp_path / "keys.json"), "a replica starts in another folder"
    assert (own.ready_needs_store, own.events_go, own.max_batch_rows) == (False, "off", 77)
    assert for_replicas(given, OnRay()).events_go == "held", "one replica sees its own events"
    assert for_replicas(given.model_copy(update={"events": "store"}), OnRay(replicas=2)).events_go == "store"


def test_the_deployment_takes_its_bounds_from_options_and_settings() -> None:
    given = Settings(grace_seconds=2, drain_seconds=7, max_delay_ms=3)
    deployment = built(OnRay(replicas=2, most_replicas=6, target_requests=9, cpus=0.5, health_seconds=4), given)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 9)
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 9
    assert deployment._deployment_config.health_check_period_s == 4
    variables = deployment.ray_actor_options["runtime_env"]["env_vars"]
    assert Settings.from_environment(variables) == for_replicas(given, OnRay(replicas=2, most_replicas=6))
    fixed = built(OnRay(replicas=3), given)._bound_deployment
    assert fixed.num_replicas == 3 and fixed._deployment_config.autoscaling_config is None


def test_ray_builds_the_application_from_arguments_as_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_SERVE_MAX_BATCH_ROWS", "77")
    deployment = call_user_app_builder_with_args_if_necessary(application, {"replicas": "2", "cpus": "0.5"})._bound_deployment
    assert (deployment.num_replicas, deployment.ray_actor_options["num_cpus"]) == (2, 0.5)
    assert deployment.ray_actor_options["runtime_env"]["env_vars"]["RECSYS_SERVE_MAX_BATCH_ROWS"] == "77"


# --- health


class Direct(Replica):
    """A replica whose application was not made by `serve.ingress`."""

    def __init__(self, app: Any, start_seconds: float) -> None:
        super().__init__(start_seconds)
        self.app = app


def healthy(replica: Replica) -> bool:
    try:
        asyncio.run(replica.check_health())
    except RuntimeError:
        return False
    return True


def test_a_replica_is_healthy_when_it_is_ready_and_as_long(load: Load, faulty: Faulty) -> None:
    began = threading.Event()

    def slow() -> Loaded:
        began.wait(30)
        return load()

    engine = Engine(Switch(v1=slow), settings(ready_needs_store=False))
    app = create_app(engine, engine.settings)
    with TestClient(app):
        assert not healthy(Direct(app, 0.1)), "nothing is loaded, and its time to start is over"
        replica = Direct(app, 60)
        threading.Timer(0.3, began.set).start()
        assert healthy(replica), "the first check waits"
        engine.drain()
        started = time.monotonic()
        assert not healthy(replica) and time.monotonic() - started < 5, "later ones do not"


def test_a_store_that_is_gone_ends_no_replica(load: Load, faulty: Faulty) -> None:
    engine = Engine(
        Switch(v1=lambda: load(reader=faulty)), for_replicas(settings(breaker_failures=1, breaker_seconds=60), OnRay(replicas=2))
    )
    app = create_app(engine, engine.settings)
    with TestClient(app) as client:
        replica = Direct(app, 60)
        assert healthy(replica)
        faulty.error = ConnectionError("gone")
        wait_until(lambda: client.post("/v1/recommend", json=BODY).status_code == 200 and engine.breaker.open)
        assert client.get("/readyz").json()["store"] == "left alone"
        assert healthy(replica)


# --- the command


def test_the_command_becomes_the_program_of_its_engine(monkeypatch: Any) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: became.append(arguments[1:]))
    command.main(["--port", "1"])
    command.main(["--engine", "ray", "--port", "1", "--replicas", "2"])
    assert became == [["-m", "serving", "--port", "1"], ["-m", "serving.deploy", "--port", "1", "--replicas", "2"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "workers: expected 1 under Ray Serve"),
        (["--host", "0.0.0.0"], "reached from other machines"),
        (["--replicas", "none"], "replicas: .*'none'"),
    ],
)
def test_the_command_refuses_what_does_not_fit_before_ray_starts(options: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "serving.deploy", *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and re.search(message, done.stderr), done.stderr


# --- two replicas on a real Ray


@dataclass
class Cluster:
    """The command as a process of its own.

    Attributes:
        server: the process.
        address: where it answers.
        log: what it and its replicas have written.
    """

    server: subprocess.Popen[bytes]
    address: str
    log: Path

    def live(self) -> dict[int, list[int]]:
        """By process, the versions that it has put live."""
        found: dict[int, list[int]] = {}
        for line in re.findall(r"(\d+) serving INFO live: recsys version (\d+)", self.log.read_text()):
            found.setdefault(int(line[0]), []).append(int(line[1]))
        return found

    def ask(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.address + path, json=body, timeout=60, trust_env=False)

    def answered(self, route: str) -> float:
        """How many requests were answered, as one of the replicas has it."""
        families = text_string_to_metric_families(httpx.get(self.address + "/metrics", timeout=60, trust_env=False).text)
        samples = [sample for family in families for sample in family.samples if sample.name == "recsys_requests_total"]
        return sum(sample.value for sample in samples if sample.labels["route"] == route)

    def status(self) -> int:
        try:
            return httpx.get(self.address + "/readyz", timeout=30, trust_env=False).status_code
        except httpx.TransportError:
            return 0


@contextmanager
def cluster(home: Path, log: Path, *options: str) -> Iterator[Cluster]:
    port = free_port()
    arguments = ["serve", "--engine", "ray", "--port", str(port), "--home", str(home), "--recommend-deadline-ms", "10000", *options]
    environment = os.environ | {"RAY_DEDUP_LOGS": "0", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Cluster(server, f"http://127.0.0.1:{port}", log)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(90)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(30)


@dataclass
class Asking:
    """Two clients that ask one request after another, each on a connection of its own, until they are stopped.

    Attributes:
        asked: when each request began, and its status; 0 where the connection broke.
    """

    address: str
    asked: list[tuple[float, int]] = field(default_factory=list)

    def __enter__(self) -> "Asking":
        self._stopped = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(2)]
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for client in self._clients:
            client.join(60)

    def _ask(self) -> None:
        with httpx.Client(base_url=self.address, timeout=60, trust_env=False) as client:
            while not self._stopped.is_set():
                began = time.monotonic()
                try:
                    self.asked.append((began, client.post("/v1/recommend", json=BODY).status_code))
                except httpx.TransportError:
                    self.asked.append((began, 0))


@pytest.fixture(scope="module")
def copied_home(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose champion can be replaced without another test seeing it."""
    home = tmp_path_factory.mktemp("ray-home")
    shutil.copy(tiny_run.home / "mlflow.db", home)
    shutil.copytree(tiny_run.home / "online", home / "online")
    return home


@pytest.mark.slow
def test_two_replicas_answer_as_one_process_survive_a_loss_and_follow_a_promotion(copied_home: Path, tmp_path: Path) -> None:
    location = Location.under(copied_home)
    options = ("--replicas", "2", "--cpus", "0.5", "--health-seconds", "1", "--poll-seconds", "0.2")
    with cluster(copied_home, tmp_path / "log", *options) as ray:
        wait_until(lambda: ray.status() == 200 and len(ray.live()) == 2, 240)

        # The same bits as one process gives, whichever replica is asked: four times each, by turns of chance.
        engine = Engine(RegistrySource("models:/recsys@champion", location, Hosting(mmap=True)), settings())
        with TestClient(create_app(engine, engine.settings)) as alone:
            wait_until(lambda: alone.get("/readyz").status_code == 200)
            expected = [alone.post("/invocations", json={"inputs": [row]}).json() for row in ASKED]
        for _ in range(4):
            assert [ray.ask("/invocations", {"inputs": [row]}).json() for row in ASKED] == expected
        assert {ray.answered("/invocations") for _ in range(10)} == {4.0 * len(ASKED)}, "both count together"

        # One is killed while it is asked: what it had begun may be lost, nothing that comes later is, and another takes its place.
        before = ray.live()
        with Asking(ray.address) as load:
            wait_until(lambda: len(load.asked) > 20)
            killed = min(before)
            os.kill(killed, signal.SIGKILL)
            gone = time.monotonic()
            wait_until(lambda: len(ray.live()) == 3, 180)
            time.sleep(1)
        later = [status for began, status in load.asked if began > gone + 1]
        lost = [status for _, status in load.asked if status != 200]
        assert len(later) > 20 and set(later) == {200}
        assert len(lost) <= 2, "at most what the two clients had under way"

        # A promotion reaches both, and no request fails meanwhile.
        version = promoted(Registry(location))
        with Asking(ray.address) as load:
            running = set(ray.live()) - {killed}
            wait_until(lambda: all(ray.live()[process][-1] == version for process in running), 120)
        assert {status for _, status in load.asked} == {200} and len(running) == 2
        assert {ray.ask("/v1/recommend", BODY).json()["model"]["version"] for _ in range(20)} == {version}

        # The end: what is under way is answered, and the command's status is 0.
        ray.server.send_signal(signal.SIGTERM)
        assert ray.server.wait(90) == 0, ray.log.read_text()[-4000:]
        assert [process for process in running if alive(process)] == []


def promoted(registry: Registry) -> int:
    """A version of the champion's files, promoted."""
    champion = registry.log.champion("recsys")
    client = MlflowClient(registry.location.tracking_uri, registry.location.tracking_uri)
    first = client.get_model_version("recsys", str(champion.to_version))
    version = int(client.create_model_version("recsys", first.source, first.run_id, tags=first.tags).version)
    comparison = {"list.ndcg@10": {"estimate": 0.0, "low": 0.0, "high": 0.0}}
    evidence = Evidence.of(registry.download("recsys", version), comparison)
    registry.promote("recsys", version, gates=(), evidence=evidence, expected=champion.to_version)
    return version


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
