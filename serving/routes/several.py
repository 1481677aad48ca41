# SPDX-License-Identifier: Apache-2.0
"""Several requests to the engine that are answered together or not at all; and bodies that routes parse themselves."""

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from recsys.core.deadline import RejectReason
from serving.engine import Answer, Engine, Rejected, Work
from serving.routes import strict

B = TypeVar("B", bound=BaseModel)

_SHOWN = 100


class Malformed(Rejected):
    """A body that is no JSON, or another than its own length says."""

    def __init__(self, message: str) -> None:
        super().__init__(RejectReason.INVALID_INPUT, message)

    @property
    def status(self) -> int:
        """400, as of every body that cannot be read."""
        return 400


async def answers(engine: Engine, works: Sequence[Work]) -> list[Answer]:
    """One answer for each; where one is rejected, the others are taken back.

    Raises:
        Rejected: the first rejection.
    """
    tasks = [asyncio.ensure_future(engine.answer(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def parsed(cls: type[B], content: bytes) -> B:
    """A body as what it should be.

    Raises:
        Rejected: it is not; names the field, the value and what was expected.
    """
    try:
        value = strict.loads(content)
    except ValueError as error:
        raise Malformed(f"body: not valid JSON: {error}") from None
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        shown = repr(first.get("input"))[:_SHOWN]
        raise Rejected(RejectReason.INVALID_INPUT, f"{field}: {first['msg']}, got {shown}") from None


def invalid(field: str, expected: str, got: Any) -> Rejected:
    """A rejection of one value."""
    return Rejected(RejectReason.INVALID_INPUT, f"{field}: expected {expected}, got {repr(got)[:_SHOWN]}")
