# SPDX-License-Identifier: Apache-2.0
"""A registry that is down, or that names a bundle that is not whole: what is loaded goes on answering, and swaps resume later."""

import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from recsys.registry import Registry
from recsys.registry.artifacts import local_path
from recsys.registry.events import Entry
from recsys.training.tracking import start_run
from serving.engine import RegistrySource
from tests.recsys.registry.servers import postgres_server
from tests.serving.faults.served import POOLS, Server, another_version, own_home, registry_of, served
from tests.serving.support import wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tiny_run: Any, tmp_path: Path) -> Path:
    return own_home(tiny_run.home, tmp_path)


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    with served(RegistrySource("models:/recsys@champion", registry_of(home).location)) as server:
        yield server


def goes_on(server: Server) -> None:
    """Ready, with a message, and answering in full."""
    wait_until(lambda: server.engine.problem is not None)
    ready = server.get("/readyz")
    assert ready.status_code == 200 and ready.json()["message"]
    assert all(server.is_whole() for _ in range(5))


def resumes(server: Server, home: Path) -> None:
    """The next promotion is followed, and all is well again."""
    wait_until(lambda: server.engine.problem is None)
    version = another_version(registry_of(home))
    wait_until(lambda: server.engine.loaded.version == version)
    assert server.get("/readyz").json()["message"] is None


def test_a_database_that_is_removed_and_comes_back(server: Server, home: Path) -> None:
    with server.loses_nothing(POOLS):
        (home / "mlflow.db").rename(home / "aside")
        goes_on(server)
        (home / "aside").replace(home / "mlflow.db")
        resumes(server, home)


@pytest.mark.parametrize("content", [b"", b"no database" * 1000], ids=["nothing", "noise"])
def test_a_database_that_is_another_file(server: Server, home: Path, content: bytes) -> None:
    with server.loses_nothing(POOLS):
        (home / "mlflow.db").rename(home / "aside")
        (home / "new").write_bytes(content)
        (home / "new").replace(home / "mlflow.db")
        goes_on(server)
        (home / "aside").replace(home / "mlflow.db")
        resumes(server, home)


def test_the_same_fault_again_and_again_adds_nothing(server: Server, home: Path) -> None:
    def once() -> None:
        (home / "mlflow.db").rename(home / "aside")
        goes_on(server)
        (home / "aside").replace(home / "mlflow.db")
        wait_until(lambda: server.engine.problem is None)

    once()
    with server.loses_nothing():
        for _ in range(3):
            once()


PROMOTE = """
import sys
from pathlib import Path
from tests.serving.faults.served import another_version, registry_of
print(another_version(registry_of(Path(sys.argv[1]))))
"""


def test_a_database_that_is_restored_from_a_copy_is_followed(server: Server, home: Path) -> None:
    """It is another file then, under connections that may still hold the old one; whoever promotes is another process."""
    with server.loses_nothing(POOLS):
        shutil.copy(home / "mlflow.db", home / "copy")
        (home / "mlflow.db").unlink()
        goes_on(server)
        (home / "copy").replace(home / "mlflow.db")
        wait_until(lambda: server.engine.problem is None)
        done = subprocess.run([sys.executable, "-c", PROMOTE, str(home)], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: server.engine.loaded.version == int(done.stdout.split()[-1]), 30)


MISSING = ("index", "ranker", "manifest.json", "features.json")


@pytest.mark.parametrize("part", MISSING)
def test_a_bundle_that_lacks_a_part_is_refused_and_the_next_one_is_not(server: Server, home: Path, tmp_path: Path, part: str) -> None:
    registry = registry_of(home)
    with server.loses_nothing(POOLS):
        version = broken_version(registry, tmp_path / "artifact", part)
        wait_until(lambda: server.engine.problem is not None)
        assert server.engine.loaded.version != version
        goes_on(server)
        registry.rollback("recsys", reason="a test")
        resumes(server, home)


def broken_version(registry: Registry, folder: Path, part: str) -> int:
    """A champion whose artifact lost a part after the gates had seen it."""
    champion = registry.log.champion("recsys")
    assert champion is not None
    source = local_path(registry.version("recsys", champion.to_version).source)
    assert source is not None
    shutil.copytree(source, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    found = [path for path in folder.rglob(part) if path.parent == folder / "bundle"] or list(folder.rglob(f"*{part}*"))
    assert found, f"the bundle has no {part}"
    (shutil.rmtree if found[0].is_dir() else Path.unlink)(found[0])
    version = another_version(registry, source=folder.as_uri(), promoted=False)
    moves = [Entry(action, version, champion.sha256, "a test") for action in ("validate", "promote")]
    registry.log.append("recsys", *moves, actor="a test")
    return version


class Wire:
    """Stands between a client and a server, and can be cut, or hang: bytes go in, and none come out."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._flows = threading.Event()
        self._flows.set()
        self._ends: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.mend()

    def cut(self) -> None:
        """No connection stands, and none is taken."""
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._listener = None
        for end in self._ends:
            end.close()
        self._ends.clear()

    def hang(self) -> None:
        """Connections stand and are taken, and nothing goes through."""
        self._flows.clear()

    def mend(self) -> None:
        """As it was."""
        self._flows.set()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
            self.port = int(self._listener.getsockname()[1])
            threading.Thread(target=self._take, args=(self._listener,), name="asyncio_wire", daemon=True).start()

    def close(self) -> None:
        self._flows.set()
        if self._listener is not None:
            self.cut()

    def _take(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            self._ends += [client, far]
            for source, target in ((client, far), (far, client)):
                threading.Thread(target=self._carry, args=(source, target), name="asyncio_wire", daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while part := source.recv(65536):
                self._flows.wait()
                target.sendall(part)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture
def wire(postgres: str) -> Iterator[Wire]:
    found = Wire(int(make_url(postgres).port or 0))
    yield found
    found.close()


@pytest.fixture
def over_postgres(home: Path, tiny_run: Any, postgres: str, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose registry is in PostgreSQL, behind a wire."""
    near = registry_of(home)
    champion = near.log.champion("recsys")
    assert champion is not None
    bundle = near.download("recsys", champion.to_version)
    monkeypatch.setenv("RECSYS_TRACKING_URI", make_url(postgres).set(port=wire.port).render_as_string(hide_password=False))
    registry = registry_of(home)
    with start_run(registry.location.tracking_uri, registry.location.artifacts, "faults", "one") as tracker:
        version = registry.register(bundle, "recsys", tracker.run_id)
    if registry.log.champion("recsys") is None:
        moves = [Entry(action, version, champion.sha256, "a test") for action in ("validate", "promote")]
        registry.log.append("recsys", *moves, actor="a test")
    with served(RegistrySource("models:/recsys@champion", registry.location)) as server:
        yield server


def test_postgresql_that_is_stopped_and_comes_back(over_postgres: Server, wire: Wire, home: Path) -> None:
    with over_postgres.loses_nothing(POOLS):
        wire.cut()
        goes_on(over_postgres)
        wire.mend()
        resumes(over_postgres, home)


def test_postgresql_that_does_not_answer_holds_nobody(over_postgres: Server, wire: Wire, home: Path) -> None:
    """The follower waits, and nobody else does; when bytes flow again, it goes on by itself."""
    with over_postgres.loses_nothing(POOLS):
        wire.hang()
        assert all(over_postgres.is_whole() for _ in range(20))
        assert over_postgres.get("/readyz").status_code == 200
        wire.mend()
        resumes(over_postgres, home)


def test_a_server_that_starts_without_its_registry_is_ready_once_that_is_there(home: Path) -> None:
    location = registry_of(home).location
    (home / "mlflow.db").rename(home / "aside")
    source = RegistrySource("models:/recsys@champion", location)
    with pytest.raises(Exception, match=r"champion|no such table"):
        source.target()
    (home / "aside").replace(home / "mlflow.db")
    with served(source) as server:
        assert server.is_whole()
