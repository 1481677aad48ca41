# SPDX-License-Identifier: Apache-2.0
"""The ranker under the Open Inference Protocol v2 (HTTP/REST), as the clients of KServe and Triton speak it: ``/v2``."""

from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from recsys.bundle.rules import NO_RULES
from recsys.core.deadline import RejectReason
from recsys.inference import request as asking
from serving.engine import Answer, Engine, Loaded, Rejected, Work
from serving.engine.work import POPULAR, RETRIEVER_ONLY
from serving.routes import answering, several, tensors
from serving.settings import Settings

INPUTS, OUTPUTS = ("user_id", "item_id"), ("score", "probability")
_LONGEST_USER = 256
Name = Annotated[str, Path(examples=["recsys"])]
Version = Annotated[str, Path(examples=["1"])]
_EXAMPLE = {
    "id": "1",
    "inputs": [
        {"name": "user_id", "shape": [1], "datatype": "BYTES", "data": ["42"]},
        {"name": "item_id", "shape": [2], "datatype": "BYTES", "data": ["1", "2"]},
    ],
}
_BODY = answering.body_of(tensors.Inference.model_json_schema(), _EXAMPLE)


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix="/v2", responses=answering.ERRORS)

    @router.get("")
    async def server() -> dict[str, Any]:
        """What the server is."""
        return {"name": "recsys", "version": "1", "extensions": ["binary_tensor_data"]}

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """As ``/livez``."""
        return JSONResponse({"live": engine.alive}, 200 if engine.alive else 503)

    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        """As ``/readyz``."""
        good = engine.not_ready is None
        return JSONResponse({"ready": good}, 200 if good else 503)

    @router.get("/models/{name}")
    async def model(name: Name) -> dict[str, Any]:
        """What the model takes and gives."""
        return _about(engine, name, None)

    @router.get("/models/{name}/versions/{version}")
    async def model_version(name: Name, version: Version) -> dict[str, Any]:
        """What the model takes and gives, if it is of this version."""
        return _about(engine, name, version)

    @router.get("/models/{name}/ready")
    async def model_ready(name: Name) -> JSONResponse:
        """Whether requests should be sent to the model here."""
        return _readiness(engine, name, None)

    @router.get("/models/{name}/versions/{version}/ready")
    async def model_version_ready(name: Name, version: Version) -> JSONResponse:
        """Whether requests should be sent to this version of the model here."""
        return _readiness(engine, name, version)

    @router.post("/models/{name}/infer", openapi_extra=_BODY)
    async def infer(name: Name, request: Request) -> Response:
        """The scores and the ranker's probabilities of items, each for its user or all for one."""
        return await _inferred(engine, settings, name, None, request)

    @router.post("/models/{name}/versions/{version}/infer", openapi_extra=_BODY)
    async def infer_version(name: Name, version: Version, request: Request) -> Response:
        """The scores and the ranker's probabilities by this version of the model."""
        return await _inferred(engine, settings, name, version, request)

    return router


def _about(engine: Engine, name: str, version: str | None) -> dict[str, Any]:
    """What a model takes and gives."""
    loaded = _model(engine, name, version)
    return {
        "name": loaded.name,
        "versions": [str(loaded.version)],
        "platform": "recsys",
        "inputs": [{"name": each, "datatype": "BYTES", "shape": [-1]} for each in INPUTS],
        "outputs": [{"name": each, "datatype": "FP32", "shape": [-1]} for each in OUTPUTS],
    }


def _readiness(engine: Engine, name: str, version: str | None) -> JSONResponse:
    """Whether requests should be sent to a model here."""
    _model(engine, name, version)
    good = engine.not_ready is None
    return JSONResponse({"name": name, "ready": good}, 200 if good else 503)


async def _inferred(engine: Engine, settings: Settings, name: str, version: str | None, request: Request) -> Response:
    """The answer to an inference request; see the module."""
    _model(engine, name, version)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "content-encoding: expected none")
    answering.admit(engine, request, settings)
    asked, values = tensors.read(await request.body(), request.headers.get(tensors.HEADER))
    wanted = _wanted(asked)
    users, items = _rows(values)
    by_user: dict[str, dict[str, None]] = {}
    for user, item in zip(users, items, strict=True):
        by_user.setdefault(user, {})[item] = None
    deadline = answering.deadline_of(request, None, settings.rank_deadline_ms, settings)
    request_id, now = answering.request_id_of(request), datetime.now(UTC)
    works = [Work(asking.Request(user, len(own), now, rules=NO_RULES), deadline, request_id, tuple(own)) for user, own in by_user.items()]
    answers = await several.answers(engine, works)
    answering.note(request, answers[0])
    figures = _figures(dict(zip(by_user, answers, strict=True)), users, items)
    loaded = answers[0].loaded
    head = {"model_name": loaded.name, "model_version": str(loaded.version), **({} if asked.id is None else {"id": asked.id})}
    content, length = tensors.write(head, [(each.name, figures[each.name], asked.binary(each)) for each in wanted])
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={tensors.HEADER: str(length)})


def _model(engine: Engine, name: str, version: str | None) -> Loaded:
    if (loaded := engine.loaded) is None:
        raise Rejected(RejectReason.DEPENDENCY, engine.problem or "no model is loaded")
    if name != loaded.name or version not in (None, str(loaded.version)):
        asked = name if version is None else f"{name}, version {version}"
        raise HTTPException(404, f"model: expected {loaded.name!r}, version {loaded.version}, got {asked[:100]!r}")
    return loaded


def _wanted(asked: tensors.Inference) -> list[tensors.Wanted]:
    wanted = [tensors.Wanted(name=name) for name in OUTPUTS] if asked.outputs is None else asked.outputs
    for each in wanted:
        if each.name not in OUTPUTS:
            raise several.invalid("outputs", " or ".join(OUTPUTS), each.name)
    return wanted


def _rows(values: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    if set(values) != set(INPUTS):
        raise several.invalid("inputs", " and ".join(INPUTS), sorted(values))
    users, items = values["user_id"], values["item_id"]
    if len(users) not in (1, len(items)):
        raise several.invalid("inputs.user_id.shape", f"[1] or [{len(items)}], as of item_id", [len(users)])
    for user in users:
        if not 1 <= len(user) <= _LONGEST_USER:
            raise several.invalid("inputs.user_id", f"1 to {_LONGEST_USER} characters", user)
    return users * len(items) if len(users) == 1 else users, items


def _figures(answers: dict[str, Answer], users: list[str], items: list[str]) -> dict[str, np.ndarray]:
    """By output, float32 ``[n]``.

    Raises:
        Rejected: a list is one without the ranker, of which the protocol could say nothing; or the bundle was swapped meanwhile.
    """
    if len({answer.loaded.sha256 for answer in answers.values()}) > 1:
        raise Rejected(RejectReason.DEPENDENCY, "the model was replaced meanwhile; ask again")
    for answer in answers.values():
        if not {RETRIEVER_ONLY, POPULAR}.isdisjoint(answer.response.flags):
            raise Rejected(RejectReason.DEPENDENCY, "the ranker could not be asked in time, or its features could not be read")
    found = {(user, item.item_id): item for user, answer in answers.items() for item in answer.response.items}
    rows = [found[pair] for pair in zip(users, items, strict=True)]
    return {name: np.array([getattr(row, name) for row in rows], np.float32) for name in OUTPUTS}
