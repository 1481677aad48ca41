# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: lists, orders, probes, metrics. Every rejection has one of the fixed reasons and a sentence for the caller."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from recsys.core.deadline import RejectReason
from recsys.inference import request as path
from recsys.inference.recommender import Recommender
from serving.engine import Engine, Loaded, QueueFull
from serving.metrics import Metrics
from serving.schemas import ErrorOut, ItemOut, ListOut, ModelOut, RankBody, ReasonOut, RecommendBody

log = logging.getLogger("serving")
_ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorOut} for code in (400, 422, 429, 503)}


class Rejected(Exception):
    """A request that gets no full answer."""

    def __init__(self, status: int, reason: RejectReason, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


def create_app(engine: Engine) -> FastAPI:
    """The application around an engine, which it starts and stops."""
    metrics = Metrics()
    metrics.waiting.set_function(lambda: engine.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="recsys", version="1", lifespan=lifespan)
    app.state.metrics = metrics
    _add_errors(app, metrics)
    _add_probes(app, engine, metrics)
    _add_lists(app, engine, metrics)
    return app


def _add_lists(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.post("/v1/recommend", response_model=ListOut, responses=_ERRORS)
    async def recommend(body: RecommendBody) -> ListOut:
        """The best live unseen items for a user, each with the events of the history that it owes its place to."""
        asked = path.Request(user_id=body.user_id, k=body.k, at=datetime.now(UTC), explain=body.explain)
        return await _answer(engine, metrics, lambda recommender: recommender.recommend([asked])[0])

    @app.post("/v1/rank", response_model=ListOut, responses=_ERRORS)
    async def rank(body: RankBody) -> ListOut:
        """The given items in the order of their scores for a user."""
        asked = path.Request(user_id=body.user_id, k=len(body.item_ids), at=datetime.now(UTC), explain=body.explain)
        return await _answer(engine, metrics, lambda recommender: recommender.rank_items(asked, body.item_ids))


async def _answer(engine: Engine, metrics: Metrics, compute: Callable[[Recommender], path.Response]) -> ListOut:
    loaded = engine.loaded
    if loaded is None:
        raise Rejected(503, RejectReason.DEPENDENCY, engine.problem)
    started = time.perf_counter()
    try:
        answer = await engine.run(compute, loaded.recommender)
    except QueueFull as error:
        raise Rejected(429, RejectReason.QUEUE_FULL, str(error)) from None
    except path.InvalidRequest as error:
        raise Rejected(422, RejectReason.INVALID_INPUT, str(error)) from None
    for flag in answer.flags:
        metrics.flagged.labels(flag).inc()
    return _list_out(loaded, answer, took_ms=1000 * (time.perf_counter() - started))


def _list_out(loaded: Loaded, answer: path.Response, took_ms: float) -> ListOut:
    titles = loaded.titles
    items = [
        ItemOut(
            item_id=item.item_id,
            title=titles.get(item.item_id),
            score=item.score,
            log_probability=item.log_probability,
            probability=item.probability,
            reasons=[ReasonOut(item_id=r.item_id, title=titles.get(r.item_id), weight=r.weight) for r in item.reasons],
        )
        for item in answer.items
    ]
    model = ModelOut(name=loaded.name, version=loaded.version, sha256=loaded.sha256)
    return ListOut(user_id=answer.user_id, items=items, model=model, flags=list(answer.flags), took_ms=took_ms)


def _add_probes(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """Whether the event loop turns."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether a model is loaded, verified and warm."""
        loaded = engine.loaded
        if loaded is None:
            return JSONResponse({"status": "not ready", "message": engine.problem}, 503)
        return JSONResponse({"status": "ready", "model": loaded.name, "version": loaded.version, "sha256": loaded.sha256})

    @app.get("/metrics")
    async def scrape() -> Response:
        """The metrics, for Prometheus."""
        if engine.loaded is not None:
            metrics.model.labels(engine.loaded.name, str(engine.loaded.version), engine.loaded.sha256).set(1)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def rejection(status: int, reason: RejectReason, message: str) -> JSONResponse:
        metrics.rejected.labels(reason.value).inc()
        return JSONResponse(ErrorOut(error=reason.value, message=message).model_dump(), status)

    @app.middleware("http")
    async def observe(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.perf_counter()
        response = await call_next(request)
        known = request.scope.get("route")
        route = getattr(known, "path", "unknown")
        metrics.requests.labels(route, str(response.status_code)).inc()
        metrics.latency.labels(route).observe(time.perf_counter() - started)
        return response

    @app.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        return rejection(error.status, error.reason, error.message)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return rejection(400, RejectReason.INVALID_INPUT, f"body: not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return rejection(422, RejectReason.INVALID_INPUT, f"{field}: {first['msg']}, got {first.get('input')!r}")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return rejection(error.status_code, RejectReason.INVALID_INPUT, str(error.detail))

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        log.exception("internal error", exc_info=error)
        return rejection(500, RejectReason.INTERNAL, "the server failed; its log says why")
