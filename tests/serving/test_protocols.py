# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol by Triton's own client and byte by byte, and MLflow's scoring protocol, over a real bundle."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import tritonclient.http as triton
import uvicorn
from fastapi.testclient import TestClient
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json

from feature_store.online import FeatureStoreError
from recsys.inference.request import Request
from recsys.registry.pyfunc import Scorer
from serving.app import create_app
from serving.engine import Engine, Loaded
from tests.serving.support import Faulty, Switch, settings, wait_until

Load = Callable[..., Loaded]
ITEMS = ["5", "50", "99"]
INFER = "/v2/models/recsys/infer"


@pytest.fixture(scope="module")
def made(bundle: Any, online: Any) -> Loaded:
    return Loaded.of(bundle, online, name="recsys", version=1)


@pytest.fixture(scope="module")
def engine(made: Loaded) -> Engine:
    return Engine(Switch(v1=lambda: made), settings())


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: engine.loaded is not None)
        yield client


@pytest.fixture(scope="module")
def address(client: TestClient) -> Iterator[str]:
    """The same application behind a socket."""
    server = uvicorn.Server(uvicorn.Config(client.app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def expected(made: Loaded, user: str, items: list[str], at: Any) -> dict[str, Any]:
    return {item.item_id: item for item in made.recommender.rank_items(Request(user, len(items), at), items).items}


def now() -> Any:
    return datetime.now(UTC)


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gets_the_rankers_figures(address: str, made: Loaded, binary: bool) -> None:
    with triton.InferenceServerClient(address) as client:
        assert (
            client.is_server_live()
            and client.is_server_ready()
            and client.is_model_ready("recsys")
            and client.is_model_ready("recsys", "1")
        )
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        about = client.get_model_metadata("recsys")
        assert [each["name"] for each in about["inputs"]] == ["user_id", "item_id"] and about["versions"] == ["1"]
        inputs = []
        for name, values in (("user_id", ["3", "7", "3"]), ("item_id", ITEMS)):
            tensor = triton.InferInput(name, [len(values)], "BYTES")
            tensor.set_data_from_numpy(np.array([value.encode() for value in values], np.object_), binary_data=binary)
            inputs.append(tensor)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probability", "score")]
        result = client.infer("recsys", inputs, outputs=outputs, request_id="mine")
        assert result.get_response()["id"] == "mine"
        at = now()
        rows = [
            expected(made, "3", ["5", "99"], at)["5"],
            expected(made, "7", ["50"], at)["50"],
            expected(made, "3", ["5", "99"], at)["99"],
        ]
        for name in ("score", "probability"):
            assert result.as_numpy(name).dtype == np.float32
            assert result.as_numpy(name) == pytest.approx([getattr(row, name) for row in rows], abs=1e-3)


def test_tritons_client_is_told_what_is_wrong(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        with pytest.raises(triton.InferenceServerException, match="invalid_input"):
            client.get_model_metadata("others")
        tensor = triton.InferInput("item_id", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"5"], np.object_))
        with pytest.raises(triton.InferenceServerException, match="invalid_input"):
            client.infer("recsys", [tensor])


def tensor(name: str, values: list[Any], **changed: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": "BYTES", "data": values} | changed


def test_one_user_for_all_items_byte_by_byte(client: TestClient) -> None:
    """The binary extension as its specification writes it out: lengths in four bytes, little-endian, before each string."""
    plain = client.post(INFER, json={"id": "7", "inputs": [tensor("user_id", ["3"]), tensor("item_id", ITEMS)]})
    assert plain.status_code == 200 and plain.json()["id"] == "7" and plain.json()["model_version"] == "1"
    binary = [
        {"name": name, "shape": [n], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
        for name, n, size in (("user_id", 1, 5), ("item_id", 3, 17))
    ]
    head = json.dumps({"inputs": binary, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"\x01\x00\x00\x003" + b"\x01\x00\x00\x005" + b"\x02\x00\x00\x0050" + b"\x02\x00\x00\x0099"
    answer = client.post(INFER, content=body, headers={"inference-header-content-length": str(len(head))})
    length = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:length])["outputs"]
    assert [each["parameters"]["binary_data_size"] for each in outputs] == [12, 12] and len(answer.content) == length + 24
    figures = np.frombuffer(answer.content[length:], "<f4").reshape(2, 3)
    assert figures.tolist() == pytest.approx(np.array([each["data"] for each in plain.json()["outputs"]]), abs=1e-3)


@pytest.mark.parametrize(
    ("body", "header", "status"),
    [
        (b"{", None, 400),
        (b'{"inputs": [NaN]}', None, 400),
        (b"{}", "3", 400),
        (b"{}", "-1", 400),
        (b'{"inputs": []}', None, 422),
        (b'{"inputs": []}more', "14", 400),
        (json.dumps({"inputs": [tensor("user_id", ["3"]), tensor("item_id", ["none such"])]}).encode(), None, 422),
        (json.dumps({"inputs": [tensor("user_id", ["3"]), tensor("item_id", ["\ud800"])]}).encode(), None, 422),
        (json.dumps({"inputs": [tensor("user_id", ["3", "3"]), tensor("item_id", ITEMS)]}).encode(), None, 422),
        (json.dumps({"inputs": [tensor("user_id", ["3"]), tensor("item_id", ITEMS, shape=[2])]}).encode(), None, 422),
        (json.dumps({"inputs": [tensor("user_id", ["3"]), tensor("item_id", ITEMS, datatype="FP32")]}).encode(), None, 422),
        (json.dumps({"inputs": [tensor("user_id", ["3"]), tensor("item_id", ITEMS)], "outputs": [{"name": "x"}]}).encode(), None, 422),
        (json.dumps({"inputs": [tensor("user_id", [], data=None, parameters={"binary_data_size": 9**99})]}).encode(), None, 422),
    ],
)
def test_wrong_tensors_get_a_sentence(client: TestClient, body: bytes, header: str | None, status: int) -> None:
    answer = client.post(INFER, content=body, headers={} if header is None else {"inference-header-content-length": header})
    assert (answer.status_code, answer.json()["error"]) == (status, "invalid_input"), answer.text


def test_other_models_and_versions_are_not_here(client: TestClient) -> None:
    for path in ("/v2/models/others", "/v2/models/recsys/versions/2", "/v2/models/recsys/versions/2/ready"):
        assert client.get(path).status_code == 404
    assert client.post("/v2/models/recsys/versions/9/infer", json={"inputs": []}).status_code == 404
    assert client.get("/v2/models/recsys/versions/1/ready").status_code == 200


def test_without_the_ranker_there_is_no_figure(load: Load, faulty: Faulty) -> None:
    engine = Engine(Switch(v1=lambda: load(reader=faulty)), settings(breaker_failures=1000))
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: engine.loaded is not None)
        faulty.services, faulty.error = {"item"}, FeatureStoreError("gone")
        answer = client.post(INFER, json={"inputs": [tensor("user_id", ["3"]), tensor("item_id", ITEMS)]})
        assert (answer.status_code, answer.json()["error"]) == (503, "dependency")


FRAME = pd.DataFrame({"user_id": ["3", "7", "who?"], "k": [4, 2, 3]})
FORMS = {
    "dataframe_split": FRAME.to_dict(orient="split"),
    "dataframe_records": FRAME.to_dict(orient="records"),
    "inputs": FRAME.to_dict(orient="list"),
    "instances": FRAME.to_dict(orient="records"),
}


@pytest.mark.parametrize("form", FORMS)
def test_invocations_are_answered_as_mlflow_does(client: TestClient, made: Loaded, form: str) -> None:
    """Against MLflow's own parser and writer around the pyfunc flavor's scorer."""
    answer = client.post("/invocations", json={form: FORMS[form]})
    assert answer.status_code == 200
    written = io.StringIO()
    parsed = FRAME if form in ("inputs", "instances") else infer_and_parse_data({form: FORMS[form]})
    predictions_to_json(Scorer(made.recommender).predict(pd.DataFrame(parsed)), written)
    want, got = json.loads(written.getvalue())["predictions"], answer.json()["predictions"]
    assert list(answer.json()) == ["predictions"] and [list(row) for row in got] == [list(row) for row in want]
    for one, other in zip(got, want, strict=True):
        assert (one["user_id"], one["item_ids"]) == (other["user_id"], other["item_ids"])
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-3)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400),
        ('{"inputs": [{"user_id": NaN}]}', 400),
        ("{}", 422),
        ("[]", 422),
        ('{"inputs": [], "instances": []}', 422),
        ('{"inputs": []}', 422),
        ('{"inputs": [{"user_id": 3}]}', 422),
        ('{"inputs": [{"user_id": "\\ud800"}]}', 422),
        ('{"inputs": [{"user_id": "3", "k": 0}]}', 422),
        ('{"inputs": [{"user_id": "3", "k": 1e400}]}', 422),
        ('{"inputs": [{"user_id": "3", "request_time": "0001-01-01T00:00:00+23:00"}]}', 422),
        ('{"inputs": {"user_id": ["3"], "k": []}}', 422),
        ('{"dataframe_split": {"columns": ["user_id", "user_id"], "data": [["3", "4"]]}}', 422),
        ('{"dataframe_split": {"columns": ["user_id"], "data": [["3", "4"]]}}', 422),
    ],
)
def test_wrong_frames_get_a_sentence(client: TestClient, body: str, status: int) -> None:
    answer = client.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (status, "invalid_input"), answer.text


def test_mlflows_other_routes(client: TestClient) -> None:
    assert client.get("/ping").status_code == client.get("/health").status_code == 200
    assert client.get("/version").text == mlflow.__version__
    assert client.post("/invocations", content=b"user_id\n3\n", headers={"content-type": "text/csv"}).status_code == 415
