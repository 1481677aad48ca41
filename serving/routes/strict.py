# SPDX-License-Identifier: Apache-2.0
"""JSON as its standard has it: no NaN or Infinity, no key twice, in UTF-8; and routes whose bodies are read so."""

import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException


def loads(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is none, has a key twice, or nests deeper than Python can follow.
    """
    try:
        return json.loads(content.decode(), parse_constant=_no_number, object_pairs_hook=_once)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


def router(first: Callable[[Request], None] | None = None, **options: Any) -> APIRouter:
    """A router whose routes read their bodies by `loads`.

    Args:
        first: called with each request before its body is read; what it raises is the outcome.
        options: those of `fastapi.APIRouter`.
    """

    class Route(_StrictRoute):
        before = staticmethod(first or _nothing)

    return APIRouter(route_class=Route, **options)


def _nothing(_: Request) -> None:
    return


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = loads(await self.body())
        return self._json


class _StrictRoute(APIRoute):
    before: Callable[[Request], None]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            self.before(request)
            # A route that parses its body itself looks at the media type itself.
            if self.body_field is not None and not _says_json(request):
                given = request.headers.get("content-type", "")[:50]
                raise HTTPException(415, f"content-type: expected application/json, got {given!r}")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    return kind.startswith("application/") and (kind == "application/json" or kind.endswith("+json"))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:50]!r} stands there twice")
    return value
