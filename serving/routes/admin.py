# SPDX-License-Identifier: Apache-2.0
"""``/admin``: changes of the catalogue, and how canary and shadow do. Offered only where the settings say so."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from recsys.core.deadline import RejectReason
from recsys.core.errors import RecsysError
from serving.engine import Engine, Loaded, Rejected
from serving.lanes import Canary, Shadow
from serving.live import LiveCatalogue, Wanted
from serving.live.log import ChangeLogError
from serving.routes import answering, strict
from serving.settings import Settings


class ChangesBody(BaseModel):
    """Ask for changes, all or none."""

    model_config = ConfigDict(extra="forbid")

    changes: list[Wanted] = Field(min_length=1, max_length=1000)
    actor: str = Field(min_length=1, description="who asks")
    reason: str = Field(min_length=1, description="why")


class CatalogueOut(BaseModel):
    """The catalogue of the bundle that answers.

    Attributes:
        version: grows with every change that this bundle has seen.
        items: shown or not.
        live: that may be shown.
        changes: the ids of the changes that were asked for.
        refused: items that were added, but that this bundle cannot take, and why.
    """

    version: int
    items: int
    live: int
    changes: list[int]
    refused: dict[str, str]


class CanaryOut(BaseModel):
    """How the canary does, by what this worker has seen of it; null where there is none.

    Attributes:
        version: of the canary.
        percent: of the users.
        problem: why it could not be loaded.
        move: what the policy makes of it: ``hold``, ``advance``, ``promote`` or ``withdraw``.
        problems: guardrails that do not hold.
        figures: the canary's and the champion's, since the step began.
    """

    version: int | None
    percent: float | None
    problem: str | None
    move: str | None
    problems: list[str]
    figures: dict[str, Any]


class ShadowOut(BaseModel):
    """How the shadow's lists compare with those that this worker gave; see `serving.lanes.shadow.Report`."""

    version: int | None
    problem: str | None
    compared: int
    dropped: int
    failed: int
    overlap: float | None
    drift: float | None
    seconds: float | None
    primary_seconds: float | None


def routes_of(live: LiveCatalogue, canary: Canary | None = None, shadow: Shadow | None = None) -> Callable[[Engine, Settings], APIRouter]:
    """The routes over a catalogue that the engine is kept up with, and over the lanes that there are."""

    def routes(engine: Engine, settings: Settings) -> APIRouter:
        router = strict.router()

        @router.get("/admin/catalogue", response_model=CatalogueOut, responses=answering.ERRORS)
        async def catalogue() -> CatalogueOut:
            """What the catalogue holds now."""
            return _out(_loaded(engine), live, [])

        @router.post("/admin/catalogue", response_model=CatalogueOut, responses=answering.ERRORS)
        async def change(body: ChangesBody) -> CatalogueOut:
            """Add, remove, restore, block or unblock items. This worker's next request sees it; other workers' within a second."""
            return await asyncio.to_thread(_changed, engine, live, body)

        if canary is not None:
            router.add_api_route("/admin/canary", lambda: _canary_out(canary), response_model=CanaryOut, methods=["GET"], name="canary")
        if shadow is not None:
            router.add_api_route(
                "/admin/shadow", lambda: ShadowOut(**shadow.report()), response_model=ShadowOut, methods=["GET"], name="shadow"
            )
        return router

    return routes


def _changed(engine: Engine, live: LiveCatalogue, body: ChangesBody) -> CatalogueOut:
    try:
        changes = live.change(_loaded(engine), body.changes, actor=body.actor, reason=body.reason)
        engine.renew()
    except ChangeLogError as error:
        raise Rejected(RejectReason.DEPENDENCY, str(error)) from None
    except RecsysError as error:
        raise Rejected(RejectReason.INVALID_INPUT, str(error)) from None
    return _out(_loaded(engine), live, [change.id for change in changes])


def _loaded(engine: Engine) -> Loaded:
    if engine.loaded is None:
        raise Rejected(RejectReason.DEPENDENCY, engine.problem or "no model is loaded")
    return engine.loaded


def _canary_out(canary: Canary) -> CanaryOut:
    now, verdict = canary.lane.now, canary.verdict
    return CanaryOut(
        version=None if now is None else now[1].version,
        percent=None if now is None else now[0].details["percent"],
        problem=canary.lane.problem,
        move=None if verdict is None else verdict.move,
        problems=[] if verdict is None else list(verdict.problems),
        figures={} if verdict is None else verdict.figures,
    )


def _out(loaded: Loaded, live: LiveCatalogue, changes: list[int]) -> CatalogueOut:
    view = loaded.recommender.view
    return CatalogueOut(version=view.version.number, items=view.count, live=view.live_count, changes=changes, refused=live.refused(loaded))
