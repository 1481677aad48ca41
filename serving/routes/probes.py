# SPDX-License-Identifier: Apache-2.0
"""``/livez``, ``/readyz``, ``/startupz``, ``/metrics``."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serving.engine import Engine
from serving.schemas import ReadyOut
from serving.settings import Settings


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/livez")
    async def livez() -> Response:
        """Whether the event loop turns and the thread that computes runs; if not, only a restart helps."""
        return _status(engine.alive, "alive", "dead")

    @router.get("/startupz")
    async def startupz() -> Response:
        """Whether a model was loaded, verified and warmed since the start."""
        return _status(engine.loaded is not None, "started", "starting")

    @router.get("/readyz", response_model=ReadyOut, responses={503: {"model": ReadyOut}})
    async def readyz() -> Response:
        """Whether requests should be sent here. The message says why not, or why the last swap failed, which is no reason not to."""
        loaded, why = engine.loaded, engine.not_ready
        out = ReadyOut(
            status="ready" if why is None else "not ready",
            message=why or engine.problem,
            model=None if loaded is None else loaded.name,
            version=None if loaded is None else loaded.version,
            sha256=None if loaded is None else loaded.sha256,
            store="left alone" if engine.breaker.open else "answers",
        )
        return JSONResponse(out.model_dump(), 200 if why is None else 503)

    @router.get("/metrics")
    def scrape(request: Request) -> Response:
        """The metrics, for Prometheus; of all workers. Exemplars where OpenMetrics is accepted."""
        content, media_type = engine.metrics.text(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": media_type})

    return router


def _status(good: bool, yes: str, no: str) -> Response:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)
