# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/similar``."""

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from recsys.core.deadline import RejectReason
from serving.engine import Engine, Loaded, Rejected
from serving.routes import answering, strict
from serving.schemas import ModelOut, SimilarBody, SimilarItemOut, SimilarOut
from serving.scope import VERSION
from serving.settings import Settings

_AT_ONCE = 2
"""Searches that run at one time; each goes over all items."""
_MAY_WAIT = 64


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The route."""
    router = strict.router()
    turns, waiting = asyncio.Semaphore(_AT_ONCE), 0

    @router.post("/v1/similar", response_model=SimilarOut, responses=answering.ERRORS)
    async def similar(body: SimilarBody, request: Request) -> Response:
        """The live items that the model finds most like an item, without the item itself."""
        nonlocal waiting
        if (loaded := engine.loaded) is None:
            raise Rejected(RejectReason.DEPENDENCY, engine.problem or "no model is loaded")
        if waiting >= _MAY_WAIT:
            raise Rejected(RejectReason.QUEUE_FULL, f"{waiting} searches for similar items wait already", retry_after=1.0)
        waiting += 1
        try:
            async with turns:
                out = await asyncio.to_thread(_similar, loaded, body, answering.request_id_of(request))
        finally:
            waiting -= 1
        request.scope[VERSION] = loaded.version
        return JSONResponse(out.model_dump())

    return router


def _similar(loaded: Loaded, body: SimilarBody, request_id: str) -> SimilarOut:
    rows, cosines = loaded.recommender.likeness.similar(body.item_id, body.k)
    ids = loaded.recommender.view.take(rows).to_pylist()
    return SimilarOut(
        request_id=request_id,
        item_id=body.item_id,
        items=[
            SimilarItemOut(item_id=item, title=loaded.titles.get(item), similarity=float(cosine))
            for item, cosine in zip(ids, cosines, strict=True)
        ],
        model=ModelOut(name=loaded.name, version=loaded.version, sha256=loaded.sha256, features=loaded.features),
        flags=["short_list"] if len(ids) < body.k else [],
    )
