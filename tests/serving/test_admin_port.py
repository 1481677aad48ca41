# SPDX-License-Identifier: Apache-2.0
"""``/admin`` on a port of its own: by sockets, what each port offers, to whom, and until when."""

import hashlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from pipelines.steps.demo import free_port
from recsys.core.errors import ConfigError
from serving.app import create_app
from serving.engine import Engine, Loaded
from serving.live import ChangeLog, LiveCatalogue
from serving.routes import admin
from serving.security.exposure import check_exposure
from serving.settings import Settings
from tests.serving.support import KNOWN, Switch, settings, wait_until
from tests.serving.test_process import process, status

Load = Callable[..., Loaded]
CATALOGUE = "/admin/catalogue"


@contextmanager
def listening(source: Any, folder: Path, **changed: Any) -> Iterator[str]:
    """A real server with its admin routes, as settings offer them."""
    live = LiveCatalogue(ChangeLog(folder / "catalogue.sqlite"))
    engine = Engine(source, settings(**changed), keep_up=live.kept_up)
    app = create_app(engine, engine.settings, admin_routes=admin.routes_of(live))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and engine.loaded is not None)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def ask(address: str, path: str, method: str = "GET", **more: Any) -> int:
    return httpx.request(method, address + path, timeout=60, trust_env=False, **more).status_code


def open_at(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_by_default_there_is_no_admin_and_where_it_is_wanted_it_stands_beside_the_rest(load: Load, tmp_path: Path) -> None:
    for wanted, expected in ((False, 404), (True, 200)):
        with listening(Switch(v1=load), tmp_path, admin=wanted) as address:
            assert ask(address, CATALOGUE) == expected


def test_on_its_own_port_it_is_not_on_the_public_one(load: Load, tmp_path: Path) -> None:
    port = free_port()
    change = {"changes": [{"action": "block", "item_id": "5"}], "actor": "ann", "reason": "test"}
    with listening(Switch(v1=load), tmp_path, admin=True, admin_port=port, body_bytes=2000) as address:
        own = f"http://127.0.0.1:{port}"
        assert (ask(address, CATALOGUE), ask(own, CATALOGUE)) == (404, 200)
        assert (ask(address, CATALOGUE, "POST", json=change), ask(own, CATALOGUE, "POST", json=change)) == (404, 200)
        assert ask(address, "/v1/recommend", "POST", json={"user_id": KNOWN[0]}) == 200
        assert ask(own, "/v1/recommend", "POST", json={"user_id": KNOWN[0]}) == 404
        assert ask(own, "/livez") == 200
        assert ask(own, CATALOGUE, "POST", content=b"x" * 3000) == 413, "the same limits"
        assert open_at("127.0.0.1", port) and not open_at("127.0.0.2", port), "on loopback's first address alone"
        counted = httpx.get(f"{address}/metrics", trust_env=False).text
        assert 'recsys_requests_total{route="/admin/catalogue",status="200"} 2.0' in counted
    assert not open_at("127.0.0.1", port)


def test_keys_count_there_too(load: Load, tmp_path: Path) -> None:
    scopes = ("admin", "events")
    keys = [{"name": each, "sha256": hashlib.sha256(f"key of {each}".encode()).hexdigest(), "scopes": [each]} for each in scopes]
    (tmp_path / "access.json").write_text(json.dumps({"keys": keys}))
    port = free_port()
    with listening(Switch(v1=load), tmp_path, admin_port=port, access=tmp_path / "access.json"):
        own = f"http://127.0.0.1:{port}"
        codes = [ask(own, CATALOGUE, headers=headers) for headers in ({}, {"x-api-key": "key of events"}, {"x-api-key": "key of admin"})]
        assert codes == [401, 403, 200]


def test_a_port_that_is_taken_ends_the_start(load: Load, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        engine = Engine(Switch(v1=load), settings(admin_port=port))
        routes = admin.routes_of(LiveCatalogue(ChangeLog(tmp_path / "catalogue.sqlite")))
        with (
            pytest.raises(ConfigError, match=f"admin_port: cannot listen on 127.0.0.1, port {port}"),
            TestClient(create_app(engine, engine.settings, admin_routes=routes)),
        ):
            pass
        assert not engine.alive


def test_it_is_neither_the_public_port_nor_open_to_others_by_accident() -> None:
    with pytest.raises(ConfigError, match="admin_port: expected another port than 8123"):
        Settings.from_environment({"RECSYS_SERVE_PORT": "8123", "RECSYS_SERVE_ADMIN_PORT": "8123"})
    check_exposure(settings(admin_port=9000))
    check_exposure(settings(admin_port=9000, admin_host="0.0.0.0", insecure=True))
    check_exposure(settings(admin_host="0.0.0.0"))
    with pytest.raises(ConfigError, match=r"admin_host: 0\.0\.0\.0 is reached from other machines"):
        check_exposure(settings(admin_port=9000, admin_host="0.0.0.0"))


@pytest.mark.slow  # processes of their own
def test_workers_share_it_and_sigterm_still_ends_them(tiny_run: Any, tmp_path: Path) -> None:
    port = free_port()
    options = ("--admin-port", str(port), "--workers", "2", "--grace-seconds", "0")
    with process(tiny_run.home, tmp_path / "log", *options) as (server, address):
        own = f"http://127.0.0.1:{port}"
        wait_until(lambda: status(address) == status(own) == 200, 240)
        assert (ask(address, CATALOGUE), ask(own, CATALOGUE)) == (404, 200)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "log").read_text()
        assert not open_at("127.0.0.1", port)
