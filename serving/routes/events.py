# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/events``."""

import asyncio
from datetime import UTC, datetime, timedelta

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from feature_store.online import FeatureStoreError
from recsys.core.deadline import RejectReason
from recsys.inference.request import InvalidRequest
from serving.engine import Engine, Rejected
from serving.events import Event
from serving.routes import answering, strict
from serving.schemas import EventBody, EventOut
from serving.settings import Settings

_AHEAD = timedelta(minutes=1)


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The route."""
    router = strict.router()

    @router.post("/v1/events", response_model=EventOut, responses=answering.ERRORS)
    async def events(body: EventBody) -> JSONResponse:
        """Take an event of a user, which counts from the next answer on."""
        if (loaded := engine.loaded) is None:
            raise Rejected(RejectReason.DEPENDENCY, engine.problem or "no model is loaded")
        if loaded.events is None:
            raise Rejected(RejectReason.DEPENDENCY, "no events are taken here (setting: events)")
        try:
            event = Event(**{**body.model_dump(exclude={"request_id"}), "time": body.time.astimezone(UTC)})
        except OverflowError:
            raise InvalidRequest(f"time: expected one that UTC has, got {body.time.isoformat()}") from None
        if event.time > event.received + _AHEAD:
            raise InvalidRequest(f"time: expected none after {datetime.now(UTC).isoformat()}, got {body.time.isoformat()}")
        try:
            new = await asyncio.to_thread(loaded.events.add, event)
        except FeatureStoreError as error:
            raise Rejected(RejectReason.DEPENDENCY, "the event could not be written; send it again") from error
        known = int(loaded.recommender.view.rows([event.item_id])[0]) >= 0
        status = "accepted" if new else "duplicate"
        engine.metrics.events.labels(status).inc()
        if new and not known:
            engine.metrics.unknown_items.inc()
        if new and body.request_id is not None:
            engine.feedback(body.request_id, event.user_id, event.item_id, event.values)
        return JSONResponse(EventOut(event_id=event.event_id, status=status, known_item=known).model_dump())

    return router
