# SPDX-License-Identifier: Apache-2.0
"""MLflow's scoring protocol, as ``mlflow models serve`` speaks it for a bundle: ``/invocations``, ``/ping``, ``/health``, ``/version``."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from recsys.inference import request as path
from serving.engine import Engine, Work
from serving.routes import answering, several
from serving.schemas import MAX_ITEMS
from serving.settings import Settings

_COLUMNS = ("user_id", "k", "request_time")
_DEFAULT_K = 10
_MOST_ROWS = 256
_FORMS = ("dataframe_split", "dataframe_records", "inputs", "instances")
_EXAMPLES = (
    {"dataframe_split": {"columns": ["user_id", "k"], "data": [["42", 10]]}},
    {"dataframe_records": [{"user_id": "42", "k": 10}]},
    {"inputs": [{"user_id": "42"}]},
    {"instances": [{"user_id": "42"}]},
)
Row = Mapping[str, Any]


class Split(BaseModel):
    """A frame as its columns' names and its rows."""

    columns: list[str]
    data: list[list[Any]] = Field(max_length=_MOST_ROWS)
    index: list[Any] | None = None


class Invocation(BaseModel):
    """A request, in one of the four forms."""

    dataframe_split: Split | None = None
    dataframe_records: list[dict[str, Any]] | None = Field(None, max_length=_MOST_ROWS)
    inputs: list[dict[str, Any]] | dict[str, list[Any]] | None = Field(None, max_length=_MOST_ROWS)
    instances: list[dict[str, Any]] | dict[str, list[Any]] | None = Field(None, max_length=_MOST_ROWS)

    def rows(self) -> list[Row]:
        """The rows, whichever form they have."""
        given = [form for form in _FORMS if getattr(self, form) is not None]
        if len(given) != 1:
            raise several.invalid("body", f"one of {', '.join(_FORMS)}", given)
        value = getattr(self, given[0])
        if isinstance(value, Split):
            value = _zipped(value.columns, value.data)
        elif isinstance(value, dict):
            lengths = {len(column) for column in value.values()}
            if len(lengths) > 1:
                raise several.invalid(given[0], "columns of one length", sorted(lengths))
            value = _zipped(list(value), list(zip(*value.values(), strict=True)))
        if not 1 <= len(value) <= _MOST_ROWS:
            raise several.invalid(given[0], f"1 to {_MOST_ROWS} rows", len(value))
        return list(value)


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/ping")
    @router.get("/health")
    async def ping() -> Response:
        """As ``/readyz``, in a status alone."""
        return Response("\n", 200 if engine.not_ready is None else 503, media_type="application/json")

    @router.get("/version")
    async def mlflow_version() -> Response:
        """The version of MLflow that is installed, whose protocol this is."""
        return Response(version("mlflow"), media_type="text/plain")

    @router.post("/invocations", responses=answering.ERRORS, openapi_extra=answering.body_of(Invocation.model_json_schema(), *_EXAMPLES))
    async def invocations(request: Request) -> JSONResponse:
        """A list for each row: ``user_id`` and, where they are given, ``k`` and ``request_time``."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"content-type: expected application/json, got {kind[:50]!r}")
        answering.admit(engine, request, settings)
        rows = several.parsed(Invocation, await request.body()).rows()
        now, request_id = datetime.now(UTC), answering.request_id_of(request)
        deadline = answering.deadline_of(request, None, settings.recommend_deadline_ms, settings)
        asked = [_request(row, place, now) for place, row in enumerate(rows)]
        works = [Work(each, deadline, f"{request_id}-{place}" if place else request_id) for place, each in enumerate(asked)]
        answers = await several.answers(engine, works)
        answering.note(request, answers[0])
        predictions = [
            {
                "user_id": response.user_id,
                "item_ids": [item.item_id for item in response.items],
                "scores": [item.score for item in response.items],
            }
            for response in (answer.response for answer in answers)
        ]
        return JSONResponse({"predictions": predictions})

    return router


def _zipped(columns: list[str], data: list[Any]) -> list[Row]:
    if len(set(columns)) != len(columns):
        raise several.invalid("columns", "each name once", columns)
    for place, row in enumerate(data):
        if len(row) != len(columns):
            raise several.invalid(f"data: row {place}", f"{len(columns)} values, one for each column", len(row))
    return [dict(zip(columns, row, strict=True)) for row in data]


def _request(row: Row, place: int, now: datetime) -> path.Request:
    """Further columns are left aside, as MLflow does."""
    user, k, at = (row.get(name) for name in _COLUMNS)
    if not isinstance(user, str) or not 1 <= len(user) <= 256:
        raise several.invalid(f"user_id: row {place}", "a string of 1 to 256 characters", user)
    try:
        user.encode()
    except UnicodeEncodeError:
        raise several.invalid(f"user_id: row {place}", "a string that UTF-8 has", user) from None
    k = _DEFAULT_K if k is None else k
    if type(k) is not int or not 1 <= k <= MAX_ITEMS:
        raise several.invalid(f"k: row {place}", f"a whole number from 1 to {MAX_ITEMS}", k)
    return path.Request(user_id=user, k=k, at=now if at is None else _time(at, place))


def _time(at: object, place: int) -> datetime:
    try:
        if not isinstance(at, str):
            raise ValueError
        time = datetime.fromisoformat(at)
        if time.tzinfo is None:
            raise ValueError
        return time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise several.invalid(f"request_time: row {place}", "a time as in ISO 8601, with its offset from UTC", at) from None
