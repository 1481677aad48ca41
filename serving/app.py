# SPDX-License-Identifier: Apache-2.0
"""The HTTP application around an engine: routes, errors, start and end. Every rejection has one of the fixed reasons and a sentence."""

import asyncio
import gc
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeAlias

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from recsys.core.deadline import RejectReason
from recsys.core.memory import keep_freed_memory
from recsys.decisions.log import DecisionLog
from recsys.inference.request import InvalidRequest
from recsys.registry import Location
from serving.aside import second_port
from serving.decided import Decided
from serving.engine import Engine, Hosting, RegistrySource, Rejected, Served
from serving.engine.hook import OnAnswer
from serving.lanes import lanes_of
from serving.lifecycle import drain_on_sigterm
from serving.live import ChangeLog, LiveCatalogue
from serving.logs import FIELDS, configure_logs
from serving.metrics import Metrics
from serving.observing import Observe
from serving.routes import admin, events, open_inference, page, probes, rank, recommend, scoring, similar
from serving.schemas import ErrorOut
from serving.scope import ID_HEADER, REASON, REQUEST_ID
from serving.security import Credentials, Guard, Limits
from serving.settings import Settings
from serving.tracing import tracing_of_environment

log = logging.getLogger("serving")

_SWITCH_SECONDS = 0.0005

Routes: TypeAlias = Callable[[Engine, Settings], APIRouter]

ROUTES: tuple[Routes, ...] = (
    recommend.routes,
    rank.routes,
    similar.routes,
    events.routes,
    open_inference.routes,
    scoring.routes,
    probes.routes,
    page.routes,
)
"""What the application offers: functions of an engine and settings that give an `APIRouter`."""

CATALOGUE_FILE = "catalogue.sqlite"
"""The log of catalogue changes, below the home."""

_SHOWN = 200


def create_app(
    engine: Engine, settings: Settings, *closing: Callable[[], None], more: Sequence[Routes] = (), admin_routes: Routes | None = None
) -> FastAPI:
    """The application around an engine, which it starts and stops; ``closing`` is called when the engine has stopped.

    Args:
        engine: answers.
        settings: of the server.
        closing: what else ends with the engine.
        more: routes besides `ROUTES`.
        admin_routes: offered as the settings say: on a port of their own, beside the others, or, by default, not at all.
    """
    apart = settings.admin_port if admin_routes is not None else None
    beside = (admin_routes,) if admin_routes is not None and apart is None and settings.admin else ()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if admin_routes is not None and apart is not None:
                own = _application(engine, settings, (admin_routes, probes.routes))
                await stack.enter_async_context(second_port(own, settings.admin_host, apart))
            engine.start()
            drain_on_sigterm(engine, settings.grace_seconds)
            yield
        await asyncio.to_thread(engine.stop)
        for close in closing:
            await asyncio.to_thread(close)

    return _application(engine, settings, (*ROUTES, *more, *beside), lifespan)


def _application(
    engine: Engine,
    settings: Settings,
    offered: Sequence[Routes],
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """Routes behind all layers."""
    # A redirect would be to a host that the request names.
    app = FastAPI(title="recsys", version="1", lifespan=lifespan, redirect_slashes=False)
    # The last one added sees a request first.
    app.add_middleware(
        Limits,
        metrics=engine.metrics,
        most_bytes=settings.body_bytes,
        header_bytes=settings.header_bytes,
        depth=settings.json_depth,
        seconds=settings.body_seconds,
    )
    if settings.access is not None:
        app.add_middleware(Guard, credentials=Credentials.read(settings.access), metrics=engine.metrics)
    app.add_middleware(Observe, metrics=engine.metrics, tracing=engine.tracing, logged=settings.log_requests)
    for routes in offered:
        app.include_router(routes(engine, settings))
    _add_errors(app, engine.metrics)
    return app


def from_environment() -> FastAPI:
    """The application of a server or of one of its workers, whose settings are in the environment."""
    # Every call into PyTorch gives Python's lock away, and waits so long for it where another thread has work in Python.
    sys.setswitchinterval(_SWITCH_SECONDS)
    keep_freed_memory()  # else a third of a batch's time is the system's, which gives the same pages again and again
    settings = Settings.from_environment()
    configure_logs(settings.log_format)
    hosting = Hosting(
        settings.mmap, settings.quantize, settings.compile, settings.remembered_users, settings.events_go, settings.held_events
    )
    source = RegistrySource(settings.model, Location.under(settings.home), hosting)
    live = LiveCatalogue(ChangeLog(settings.home / CATALOGUE_FILE))
    canary, shadow = lanes_of(source, settings, live.kept_up) or (None, None)
    decided = None if settings.decisions is None else Decided(DecisionLog(settings.decisions, share=settings.decision_share))
    told = [each for each in (shadow, decided) if each is not None]
    on_answer, tracing = _all_of(told) if told else None, tracing_of_environment()
    engine = Engine(source, settings, on_answer=on_answer, keep_up=live.kept_up, lanes=canary, tracing=tracing)
    if shadow is not None:
        shadow.start(engine.metrics)
    if decided is not None:
        decided.start(engine.metrics)
    # What the imports have made stays: looking through all of it for garbage would stop every thread for half a second.
    gc.collect()
    gc.freeze()
    return create_app(engine, settings, *(each.close for each in told), admin_routes=admin.routes_of(live, canary, shadow))


def _all_of(told: Sequence[OnAnswer]) -> OnAnswer:
    def tell(served: Served) -> None:
        for each in told:
            each(served)

    return tell


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def rejection(request: Request, status: int, reason: RejectReason, message: str, **headers: str) -> JSONResponse:
        request.scope[REASON] = reason.value
        metrics.rejected.labels(reason.value).inc()
        return JSONResponse(ErrorOut(error=reason.value, message=message).model_dump(), status, headers or None)

    @app.exception_handler(Rejected)
    async def rejected(request: Request, error: Rejected) -> JSONResponse:
        after = {} if error.retry_after is None else {"retry-after": f"{error.retry_after:.0f}"}
        return rejection(request, error.status, error.reason, error.message, **after)

    @app.exception_handler(InvalidRequest)
    async def impossible(request: Request, error: InvalidRequest) -> JSONResponse:
        return rejection(request, 422, RejectReason.INVALID_INPUT, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message = f"body: not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
            return rejection(request, 400, RejectReason.INVALID_INPUT, message)
        field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        message = f"{field}: {first['msg']}, got {repr(first.get('input'))[:_SHOWN]}"
        return rejection(request, 422, RejectReason.INVALID_INPUT, message)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return rejection(request, error.status_code, RejectReason.INVALID_INPUT, str(error.detail))

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        # This response passes by whoever else would name the request. The server closes the connection after it, which is said beforehand.
        name = request.scope[REQUEST_ID]
        log.error("internal error", exc_info=error, extra={FIELDS: {"request_id": name}})
        return rejection(
            request, 500, RejectReason.INTERNAL, "the server failed; its log says why", **{ID_HEADER: name, "connection": "close"}
        )
