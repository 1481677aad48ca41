# SPDX-License-Identifier: Apache-2.0
"""Databases and buckets, each a real one."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from recsys.registry import Location, Registry
from tests.recsys.registry.servers import postgres_server
from tests.recsys.registry.small import register, write_bundle

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server, which starts when the first test asks for it."""
    with postgres_server() as url:
        yield url


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """A database of its own."""
    name = f"registry_{next(_NUMBERS)}"
    engine = create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return make_url(postgres).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make."""
    location = Location.under(tmp_path_factory.mktemp("mlflow"))
    Registry(location).models()
    return Path(make_url(location.log).database or "")


@pytest.fixture
def registry(mlflow_database: Path, tmp_path: Path) -> Registry:
    """An empty registry on local disk."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(mlflow_database, home / "mlflow.db")
    return Registry(Location.under(home))


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    """A registry with three versions of the model m."""
    for number in (1, 2, 3):
        write_bundle(tmp_path / f"bundle{number}", auc=0.6 + number / 100, features=f"f{number}")
        assert register(registry, tmp_path / f"bundle{number}") == number
    return registry


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An address in a bucket of a server that speaks S3, with what clients need in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="models")
        yield "s3://models/registry"
    server.stop()
