# SPDX-License-Identifier: Apache-2.0
"""A registered bundle under MLflow's own clients: its loader, its check of serving inputs, and its scoring server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
import yaml

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.bundle.manifest import verify
from recsys.core.config import parse
from recsys.core.errors import BundleError
from recsys.core.files import read_json, write_json
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request
from recsys.registry import Evidence, Location, Registry
from recsys.registry.pyfunc import BUNDLE, MLMODEL
from recsys.training.tracking import start_run

ROOT = Path(__file__).parents[3]
AT = "2030-01-01T00:00:00+00:00"
FRAME = pd.DataFrame({"user_id": ["1", "2", "never seen"], "k": [3, 5, 4], "request_time": [AT] * 3})


@dataclass(frozen=True)
class Registered:
    """A registry whose champion is an MLflow model."""

    home: Path
    location: Location
    source: Path

    @property
    def bundle(self) -> Path:
        return self.source / BUNDLE


@pytest.fixture(scope="module")
def registered(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    """The tiny run's bundle as the champion; with the run's online store."""
    home = tmp_path_factory.mktemp("flavored")
    location = Location.under(home)
    shutil.copytree(Location.under(tiny_run.home).online, location.online)
    with start_run(location.tracking_uri, location.artifacts, "e", "r") as tracker:
        registry, bundle = Registry(location), tiny_run.directory / "bundle"
        version = registry.register(bundle, "recsys", tracker.run_id)
        registry.promote("recsys", version, gates=(), evidence=Evidence.of(bundle), expected=None)
    return Registered(home, location, Path(registry.version("recsys", version).source.removeprefix("file://")))


@pytest.fixture
def tracking(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's own configuration, as a user sets it; and no RECSYS_HOME."""
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.delenv("RECSYS_HOME", raising=False)
    mlflow.set_tracking_uri(registered.location.tracking_uri)
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def expected(registered: Registered) -> dict[str, list[tuple[str, float]]]:
    """What the one recommendation path answers to `FRAME`, by user."""
    bundle = Bundle.load(registered.bundle)
    store = SQLiteStore.open(registered.location.online_store(bundle.manifest.feature_versions))
    recommender = Recommender(bundle, OnlineReader(parse(FeatureRepo, bundle.features, source="features.json"), store))
    at = datetime.fromisoformat(AT)
    answers = recommender.recommend([Request(user_id=row.user_id, k=row.k, at=at) for row in FRAME.itertuples()])
    store.close()
    return {answer.user_id: [(item.item_id, item.score) for item in answer.items] for answer in answers}


def held(rows: list[dict[str, Any]], expected: dict[str, list[tuple[str, float]]]) -> None:
    """Hold that rows of the output are the expected lists, in the order of `FRAME`."""
    assert [row["user_id"] for row in rows] == list(expected)
    for row, items in zip(rows, expected.values(), strict=True):
        assert list(row["item_ids"]) == [item for item, _ in items]
        assert list(row["scores"]) == pytest.approx([score for _, score in items], abs=1e-4)


def load(uri: str = "models:/recsys@champion", **more: Any) -> Any:
    from mlflow import pyfunc

    return pyfunc.load_model(uri, **more)


def test_mlflow_loads_the_champion_and_it_answers(tracking: None, expected: dict[str, Any]) -> None:
    found = load().predict(FRAME)
    assert list(found.columns) == ["user_id", "item_ids", "scores"]
    held(found.to_dict("records"), expected)


def test_k_and_time_may_be_left_out_and_users_may_be_many(tracking: None) -> None:
    users = [str(user) for user in range(150)]
    found = load().predict(pd.DataFrame({"user_id": users}))
    assert list(found["user_id"]) == users
    assert all(len(items) == len(scores) == 10 for items, scores in zip(found["item_ids"], found["scores"], strict=True))
    assert load().predict(pd.DataFrame({"user_id": pd.Series([], dtype=object)})).empty


def test_a_list_is_no_longer_than_the_catalogue(tracking: None) -> None:
    (row,) = load().predict(pd.DataFrame({"user_id": ["1"], "k": [10**9]})).to_dict("records")
    assert 10 < len(row["item_ids"]) == len(set(row["item_ids"]))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"user": ["1"]}, "user_id"),
        ({"user_id": ["1"], "k": ["three"]}, "k"),
        ({"user_id": ["1"], "k": [0]}, "k: expected 1 or more, got 0"),
        ({"user_id": [""]}, "user_id: expected a non-empty string"),
        ({"user_id": [None]}, "user_id: row 0: expected a string"),
        ({"user_id": ["1"], "request_time": ["yesterday"]}, "request_time: row 0: expected a time as in ISO 8601, got 'yesterday'"),
        ({"user_id": ["1"], "request_time": ["2030-01-01T00:00:00"]}, "expected a time with a time zone"),
    ],
)
def test_what_the_signature_does_not_allow_is_an_error_that_says_why(tracking: None, frame: dict[str, Any], message: str) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=message):
        load().predict(pd.DataFrame(frame))


def test_serving_inputs_are_valid_by_mlflows_own_check(tracking: None, registered: Registered, expected: dict[str, Any]) -> None:
    from mlflow.models import convert_input_example_to_serving_input, validate_serving_input

    example = json.loads((registered.source / "serving_input_example.json").read_text())
    found = validate_serving_input("models:/recsys@champion", example)
    assert len(found) == 1 and len(found["item_ids"][0]) == 10
    held(validate_serving_input("models:/recsys@champion", convert_input_example_to_serving_input(FRAME)).to_dict("records"), expected)


def test_the_input_example_is_a_recorded_request(tracking: None, registered: Registered) -> None:
    first = Bundle.load(registered.bundle).golden.requests[0]
    model = load()
    (row,) = model.predict(model.input_example).to_dict("records")
    assert row["user_id"] == first.user_id and tuple(row["item_ids"]) == first.item_ids


def test_the_model_is_described_and_nothing_of_it_is_pickled(registered: Registered) -> None:
    described = yaml.safe_load((registered.source / MLMODEL).read_text())
    flavor = described["flavors"]["python_function"]
    assert flavor["loader_module"] == "recsys.registry.pyfunc" and flavor["data"] == BUNDLE
    assert list(described["flavors"]) == ["python_function"]
    assert described["metadata"]["bundle_sha256"] == verify(registered.bundle).sha256
    inputs = json.loads(described["signature"]["inputs"])
    assert [(column["name"], column["type"], column["required"]) for column in inputs] == [
        ("user_id", "string", True),
        ("k", "long", False),
        ("request_time", "string", False),
    ]
    files = [path.name for path in registered.source.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".joblib", ".pt", ".py"))]


def test_the_bundle_inside_stays_a_verified_bundle(tracking: None, registered: Registered, tiny_run) -> None:
    load()  # MLflow writes a file of its own beside MLmodel
    assert verify(registered.bundle).sha256 == verify(tiny_run.directory / "bundle").sha256


def test_features_come_from_the_home_of_the_environment(
    tracking: None, registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    monkeypatch.setenv("RECSYS_HOME", str(tmp_path))
    with pytest.raises(Exception, match="no such file; materialise the features first"):
        load()
    shutil.copytree(registered.location.online, tmp_path / "online")
    held(load().predict(FRAME).to_dict("records"), expected)


def test_the_place_of_the_features_may_be_given(tracking: None, registered: Registered, tmp_path: Path, expected: dict[str, Any]) -> None:
    moved = Path(shutil.copytree(registered.location.online, tmp_path / "elsewhere"))
    (file,) = moved.glob("*.sqlite")
    features = {"name": "online", "store": {"name": "sqlite", "path": str(file), "read_only": True}}
    held(load(model_config={"features": features}).predict(FRAME).to_dict("records"), expected)


def test_a_changed_bundle_and_another_bundle_are_refused(registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_HOME", raising=False)
    model = Path(shutil.copytree(registered.source, tmp_path / "model"))
    metrics = read_json(model / BUNDLE / "metrics.json")
    write_json(model / BUNDLE / "metrics.json", metrics | {"better": 1})
    with pytest.raises(BundleError, match=r"metrics\.json was changed"):
        load(str(model))
    write_json(model / BUNDLE / "metrics.json", metrics)
    manifest = read_json(model / BUNDLE / "manifest.json")
    write_json(model / BUNDLE / "manifest.json", manifest | {"seed": manifest["seed"] + 1})
    with pytest.raises(BundleError, match="was registered: refused"):
        load(str(model))


# --- the scoring server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(registered: Registered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """``mlflow models serve``, as a user starts it."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/recsys@champion", "--env-manager", "local"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": paths,
        "MLFLOW_TRACKING_URI": registered.location.tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RECSYS_HOME": str(registered.home),
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "-p", str(port), "-w", "1"], env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until = time.monotonic() + 180
            while not answers(client):
                assert time.monotonic() < until and process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_the_scoring_server_answers_every_form_of_its_protocol(server: httpx.Client, expected: dict[str, Any]) -> None:
    records = FRAME.to_dict("records")
    split = {"columns": list(FRAME.columns), "data": FRAME.to_numpy().tolist()}
    for body in (
        {"dataframe_split": split},
        {"dataframe_records": records},
        {"inputs": FRAME.to_dict("list")},
        {"inputs": records},
        {"instances": records},
    ):
        answer = server.post("/invocations", json=body)
        assert answer.status_code == 200, answer.text
        held(answer.json()["predictions"], expected)


@pytest.mark.slow
def test_the_scoring_server_is_healthy_and_refuses_what_is_malformed(server: httpx.Client) -> None:
    import mlflow

    for route in ("/ping", "/health"):
        assert server.get(route).status_code == 200
    assert server.get("/version").text.strip('"') == mlflow.__version__
    for body in ({"dataframe_records": [{"k": 3}]}, {"dataframe_records": [{"user_id": "1", "k": 0}]}, {"nothing": 1}):
        assert server.post("/invocations", json=body).status_code == 400, body
    (row,) = server.post("/invocations", json={"dataframe_records": [{"user_id": "1"}]}).json()["predictions"]
    assert len(row["item_ids"]) == 10
