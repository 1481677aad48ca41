# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/rank``."""

from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from recsys.bundle.rules import NO_RULES
from recsys.inference import request as path
from serving.engine import Engine, Work
from serving.routes import answering, strict
from serving.schemas import ListOut, RankBody
from serving.settings import Settings


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The route."""
    router = strict.router(lambda request: answering.admit(engine, request, settings))

    @router.post("/v1/rank", response_model=ListOut, responses=answering.ERRORS)
    async def rank(body: RankBody, request: Request) -> Response:
        """The given items in the order of their scores for a user."""
        asked = path.Request(user_id=body.user_id, k=len(body.item_ids), at=datetime.now(UTC), explain=body.explain, rules=NO_RULES)
        deadline = answering.deadline_of(request, body.deadline_ms, settings.rank_deadline_ms, settings)
        work = Work(asked, deadline, answering.request_id_of(request), tuple(body.item_ids))
        return await answering.answer(engine, request, work)

    return router
