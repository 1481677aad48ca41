# SPDX-License-Identifier: Apache-2.0
"""The explorer page at ``/``, and what it asks for under ``/page``."""

import asyncio
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response
from starlette.exceptions import HTTPException

from feature_store.online.base import FeatureStoreError
from recsys.core.deadline import RejectReason
from recsys.inference.request import InvalidRequest
from serving.engine import Engine, Loaded, Rejected
from serving.engine.verify import NOBODY
from serving.page import schemas
from serving.page.files import HEADERS, File, page_files
from serving.page.finding import Titles, find_users
from serving.page.report import plots_of
from serving.page.what_if import Supposed, suppose
from serving.routes import answering, strict
from serving.schemas import ModelOut
from serving.settings import Settings

Text = Annotated[str, Query(max_length=schemas.LONGEST_SEARCH)]
Limit = Annotated[int, Query(ge=1, le=schemas.MOST_FOUND)]
Version = Annotated[int | None, Query(ge=0)]
T = TypeVar("T")

_MOST_WAITING = 16


def routes(engine: Engine, settings: Settings) -> APIRouter:
    """The routes."""
    router = strict.router(include_in_schema=False)  # what the page asks is its own affair
    files = page_files()
    aside = _Aside(settings)
    titles: weakref.WeakKeyDictionary[Loaded, Titles] = weakref.WeakKeyDictionary()

    def titles_of(loaded: Loaded) -> Titles:
        if loaded not in titles:
            titles[loaded] = Titles(loaded)
        return titles[loaded]

    @router.get("/")
    async def page() -> Response:
        """The page."""
        return _sent(files["index.html"])

    @router.get("/page/static/{name}")
    async def static(name: str) -> Response:
        """A file of the page."""
        if name not in files:
            raise HTTPException(404, f"{name[:50]!r} is no file of the page")
        return _sent(files[name])

    @router.get("/page/bundles", response_model=schemas.BundlesOut)
    async def bundles() -> schemas.BundlesOut:
        """The bundles that are loaded."""
        live, canary = (None if loaded is None else loaded.key for loaded in (engine.loaded, engine.canary))
        found = [_bundle_out(loaded, live=loaded.key == live, canary=loaded.key == canary) for loaded in engine.bundles]
        return schemas.BundlesOut(bundles=found)

    @router.get("/page/items", response_model=schemas.FoundItemsOut, responses=answering.ERRORS)
    async def items(request: Request, q: Text = "", limit: Limit = 10) -> schemas.FoundItemsOut:
        """Live items whose title holds the text."""
        loaded = _loaded(engine, None)
        found = await aside.run(lambda: titles_of(loaded).find(q, limit), request)
        return schemas.FoundItemsOut(items=[schemas.EventOut(item_id=item, title=title) for item, title in found])

    @router.get("/page/users", response_model=schemas.FoundUsersOut, responses=answering.ERRORS)
    async def users(request: Request, q: Text = "", limit: Limit = 10) -> schemas.FoundUsersOut:
        """The user of this id, and some known ones whose ids begin with it."""
        loaded = _loaded(engine, None)
        found = await aside.run(lambda: find_users(loaded, q, limit, datetime.now(UTC)), request)
        return schemas.FoundUsersOut(users=[schemas.FoundUserOut(user_id=user.user_id, events=user.events) for user in found])

    @router.post("/page/what-if", response_model=schemas.WhatIfOut, responses=answering.ERRORS)
    async def what_if(body: schemas.WhatIfBody, request: Request) -> schemas.WhatIfOut:
        """The list of one loaded bundle for a user whose history were another one."""
        loaded = _loaded(engine, body.version)
        user, now = body.user_id or NOBODY, datetime.now(UTC)
        supposed = await aside.run(lambda: suppose(loaded.recommender, user, body.history, body.k, now), request)
        return _what_if_out(loaded, supposed)

    @router.get("/page/report", response_model=schemas.ReportOut, responses=answering.ERRORS)
    async def report(version: Version = None) -> schemas.ReportOut:
        """What the evaluation of a loaded bundle measured."""
        loaded = _loaded(engine, version)
        return schemas.ReportOut(version=loaded.version, plots=plots_of(loaded.recommender.bundle.metrics))

    return router


class _Aside:
    """Computes for the page on a thread beside the engine's, one thing at a time, so that it takes little from what is served."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0

    async def run(self, compute: Callable[[], T], request: Request) -> T:
        """What the function gives.

        Raises:
            Rejected: too much waits, the deadline came or the client went before its turn, or the feature store does not answer.
            InvalidRequest: the function raised it.
        """
        deadline = answering.deadline_of(request, None, self._settings.largest_deadline_ms, self._settings)
        if self._waiting >= _MOST_WAITING:
            raise Rejected(RejectReason.QUEUE_FULL, f"{self._waiting} requests of the page wait already", retry_after=1)
        self._waiting += 1
        try:
            async with self._turn:
                if deadline.expired:
                    raise Rejected(RejectReason.DEADLINE_BEFORE_START, "the deadline came before the request could be begun")
                if await request.is_disconnected():
                    raise Rejected(RejectReason.CANCELLED, "the client has gone")
                return await asyncio.to_thread(compute)
        except FeatureStoreError as error:
            raise Rejected(RejectReason.DEPENDENCY, f"the feature store does not answer: {error}") from error
        finally:
            self._waiting -= 1


def _loaded(engine: Engine, version: int | None) -> Loaded:
    """The bundle of a version, or the one that answers."""
    bundles = engine.bundles
    if not bundles:
        raise Rejected(RejectReason.DEPENDENCY, engine.problem or "no model is loaded")
    if version is None:
        return bundles[0]
    for loaded in bundles:
        if loaded.version == version:
            return loaded
    raise InvalidRequest(f"version: {version} is not loaded, expected one of {[loaded.version for loaded in bundles]}")


def _sent(file: File) -> Response:
    return Response(file.content, media_type=file.media_type, headers=HEADERS)


def _model_out(loaded: Loaded) -> ModelOut:
    return ModelOut(name=loaded.name, version=loaded.version, sha256=loaded.sha256, features=loaded.features)


def _bundle_out(loaded: Loaded, *, live: bool, canary: bool) -> schemas.BundleOut:
    created = loaded.recommender.bundle.manifest.created
    return schemas.BundleOut(model=_model_out(loaded), live=live, canary=canary, created=created.isoformat(timespec="seconds"))


def _what_if_out(loaded: Loaded, supposed: Supposed) -> schemas.WhatIfOut:
    titles = loaded.titles
    return schemas.WhatIfOut(
        history=[schemas.EventOut(item_id=item, title=titles.get(item)) for item in supposed.history],
        items=[
            schemas.SupposedItemOut(
                item_id=item.item_id,
                title=titles.get(item.item_id),
                score=item.score,
                log_probability=item.log_probability,
                probability=item.probability,
                effects=effects,
            )
            for item, effects in zip(supposed.response.items, supposed.effects.T.tolist(), strict=True)
        ],
        model=_model_out(loaded),
        flags=list(supposed.response.flags),
        stages_ms={stage: 1000 * seconds for stage, seconds in supposed.stages.items()},
    )
