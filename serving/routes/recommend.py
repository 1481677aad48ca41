# SPDX-License-Identifier: Apache-2.0
"""``POST /v1/recommend``."""

from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response

from recsys.inference import request as path
from serving.engine import Engine, Work
from serving.routes import answering, strict
from serving.schemas import ListOut, RecommendBody
from serving.settings import Settings


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The route."""
    router = strict.router(lambda request: answering.admit(engine, request, settings))

    @router.post("/v1/recommend", response_model=ListOut, responses=answering.ERRORS)
    async def recommend(body: RecommendBody, request: Request) -> Response:
        """The best live unseen items for a user, each with the events of the history that it owes its place to."""
        asked = path.Request(body.user_id, body.k, datetime.now(UTC), body.explain, body.rules.asked())
        deadline = answering.deadline_of(request, body.deadline_ms, settings.recommend_deadline_ms, settings)
        return await answering.answer(engine, request, Work(asked, deadline, answering.request_id_of(request)))

    return router
