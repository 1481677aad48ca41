# SPDX-License-Identifier: Apache-2.0
"""What every route that gives a list shares: its deadline, its request id, its client that may go, the shape of its answer."""

import asyncio
import math
import time
from typing import Any

import orjson
from fastapi import Request, Response

from recsys.core.deadline import Deadline, RejectReason
from serving.engine import Answer, Engine, Rejected, Work
from serving.schemas import ErrorOut
from serving.scope import ARRIVED, FLAGS, REQUEST_ID, VERSION
from serving.settings import Settings

DEADLINE_HEADER = "x-deadline-ms"
ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorOut} for code in (400, 422, 429, 500, 503, 504)}


def body_of(schema: dict[str, Any], *examples: dict[str, Any]) -> dict[str, Any]:
    """What the documentation says of a body that the route itself parses; nothing in ``schema`` refers to elsewhere."""
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inlined({**schema, "examples": list(examples)}, definitions)}},
        }
    }


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    return [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema


def deadline_of(request: Request, asked_ms: float | None, default_ms: float, settings: Settings) -> Deadline:
    """The deadline, from the arrival of the request: what the body or the header asks for, whichever is less, or the default.

    Raises:
        Rejected: the header is not a positive number.
    """
    asked = [] if asked_ms is None else [asked_ms]
    if (header := request.headers.get(DEADLINE_HEADER)) is not None:
        asked.append(_milliseconds(header))
    return Deadline(request.scope[ARRIVED] + min([*(asked or [default_ms]), settings.largest_deadline_ms]) / 1000)


def admit(engine: Engine, request: Request, settings: Settings) -> None:
    """Refuse at once what cannot be answered in time, whatever its body says: reading bodies must not take an overloaded server's time.

    Raises:
        Rejected: see `Engine.admit`; or the header is not a positive number.
    """
    engine.admit(deadline_of(request, None, settings.largest_deadline_ms, settings))


def request_id_of(request: Request) -> str:
    """By which the request is known, to whoever asks as well: every response says it."""
    request_id: str = request.scope[REQUEST_ID]
    return request_id


def note(request: Request, answer: Answer) -> None:
    """Tell whoever observes the request which bundle answered, and how."""
    request.scope[VERSION], request.scope[FLAGS] = answer.loaded.version, answer.response.flags


async def answer(engine: Engine, request: Request, work: Work) -> Response:
    """The answer as JSON; a client that goes before it comes takes the request back.

    Raises:
        Rejected: see `Engine.answer`; ``cancelled`` where the client has gone.
    """
    computed = asyncio.ensure_future(engine.answer(work))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({computed, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not computed.done():
            raise Rejected(RejectReason.CANCELLED, "the client has gone")
        found = await computed
    finally:
        computed.cancel()
        gone.cancel()
    note(request, found)
    out = _list_out(work, found, took_ms=1000 * (time.monotonic() - request.scope[ARRIVED]))
    return Response(orjson.dumps(out), media_type="application/json")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _milliseconds(header: str) -> float:
    try:
        value = float(header)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise Rejected(RejectReason.INVALID_INPUT, f"{DEADLINE_HEADER}: expected a positive number of milliseconds, got {header[:50]!r}")
    return value


def _list_out(work: Work, answer: Answer, took_ms: float) -> dict[str, Any]:
    """A `serving.schemas.ListOut`, not made as one: of 500 items that would take longer than all else that the event loop does."""
    loaded, ages = answer.loaded, answer.ages
    titles = loaded.titles
    return {
        "request_id": work.request_id,
        "user_id": answer.response.user_id,
        "items": [
            {
                "item_id": item.item_id,
                "title": titles.get(item.item_id),
                "score": item.score,
                "log_probability": item.log_probability,
                "probability": item.probability,  # NaN is null
                "reasons": [{"item_id": r.item_id, "title": titles.get(r.item_id), "weight": r.weight} for r in item.reasons],
            }
            for item in answer.response.items
        ],
        "model": {"name": loaded.name, "version": loaded.version, "sha256": loaded.sha256, "features": loaded.features},
        "features": {
            "cached": ages.cached is not None,
            "cached_age_seconds": ages.cached,
            "newest_event_age_seconds": ages.newest_event,
        },
        "flags": list(answer.response.flags),
        "stages_ms": {stage: 1000 * seconds for stage, seconds in answer.stages.items()},
        "took_ms": took_ms,
    }
