# SPDX-License-Identifier: Apache-2.0
"""The HTTP application around an engine: routes, errors, start and end. Every rejection has one of the fixed reasons and a sentence."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from recsys.core.deadline import RejectReason
from recsys.decisions.log import DecisionLog
from recsys.inference.request import InvalidRequest
from recsys.registry import Location
from serving.decided import Decided
from serving.engine import Engine, Hosting, RegistrySource, Rejected, Served
from serving.engine.hook import OnAnswer
from serving.lanes import lanes_of
from serving.lifecycle import drain_on_sigterm
from serving.live import ChangeLog, LiveCatalogue
from serving.metrics import Metrics
from serving.observing import Observe
from serving.routes import admin, events, open_inference, page, probes, rank, recommend, scoring, similar
from serving.schemas import ErrorOut
from serving.security import Credentials, Guard, Limits
from serving.settings import Settings

log = logging.getLogger("serving")

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


def create_app(engine: Engine, settings: Settings, *closing: Callable[[], None], more: Sequence[Routes] = ()) -> FastAPI:
    """The application around an engine, which it starts and stops; ``closing`` is called when the engine has stopped.

    Args:
        engine: answers.
        settings: of the server.
        closing: what else ends with the engine.
        more: routes besides `ROUTES`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        drain_on_sigterm(engine, settings.grace_seconds)
        yield
        await asyncio.to_thread(engine.stop)
        for close in closing:
            await asyncio.to_thread(close)

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
    app.add_middleware(Observe, metrics=engine.metrics)
    for routes in (*ROUTES, *more):
        app.include_router(routes(engine, settings))
    _add_errors(app, engine.metrics)
    return app


def from_environment() -> FastAPI:
    """The application of a server or of one of its workers, whose settings are in the environment."""
    # Libraries may have set handlers when they were imported; ours replace them.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s", force=True)
    settings = Settings.from_environment()
    hosting = Hosting(
        settings.mmap, settings.quantize, settings.compile, settings.remembered_users, settings.events_go, settings.held_events
    )
    source = RegistrySource(settings.model, Location.under(settings.home), hosting)
    live = LiveCatalogue(ChangeLog(settings.home / CATALOGUE_FILE))
    canary, shadow = lanes_of(source, settings, live.kept_up) or (None, None)
    decided = None if settings.decisions is None else Decided(DecisionLog(settings.decisions, share=settings.decision_share))
    told = [each for each in (shadow, decided) if each is not None]
    engine = Engine(source, settings, on_answer=_all_of(told) if told else None, keep_up=live.kept_up, lanes=canary)
    if shadow is not None:
        shadow.start(engine.metrics)
    more = (admin.routes_of(live, canary, shadow),) if settings.admin else ()
    return create_app(engine, settings, *(each.close for each in told), more=more)


def _all_of(told: Sequence[OnAnswer]) -> OnAnswer:
    def tell(served: Served) -> None:
        for each in told:
            each(served)

    return tell


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def rejection(status: int, reason: RejectReason, message: str, retry_after: float | None = None) -> JSONResponse:
        metrics.rejected.labels(reason.value).inc()
        headers = None if retry_after is None else {"retry-after": f"{retry_after:.0f}"}
        return JSONResponse(ErrorOut(error=reason.value, message=message).model_dump(), status, headers)

    @app.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        return rejection(error.status, error.reason, error.message, error.retry_after)

    @app.exception_handler(InvalidRequest)
    async def impossible(_: Request, error: InvalidRequest) -> JSONResponse:
        return rejection(422, RejectReason.INVALID_INPUT, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return rejection(400, RejectReason.INVALID_INPUT, f"body: not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return rejection(422, RejectReason.INVALID_INPUT, f"{field}: {first['msg']}, got {repr(first.get('input'))[:_SHOWN]}")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return rejection(error.status_code, RejectReason.INVALID_INPUT, str(error.detail))

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> JSONResponse:
        log.exception("internal error", exc_info=error)
        return rejection(500, RejectReason.INTERNAL, "the server failed; its log says why")
