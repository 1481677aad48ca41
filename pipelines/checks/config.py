# SPDX-License-Identifier: Apache-2.0
"""What a recipe demands of its events; everything is optional."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from recsys.core.config import Config

Scalar = str | int | float


class ColumnCheck(Config):
    """What is demanded of a canonical column of the events, which has to be there.

    Attributes:
        type: of its values.
        low: no value is below it; of times, ISO 8601 text.
        high: no value is above it.
        values: there are no others.
        nulls: the share of nulls, at most.
        drift: the population stability index against the days before, at most: below 0.1 is commonly called stable, above 0.2 shifted.
    """

    type: Literal["text", "integer", "number", "time", "list"] | None = None
    low: Scalar | None = None
    high: Scalar | None = None
    values: tuple[Scalar, ...] | None = None
    nulls: float | None = Field(None, ge=0, le=1)
    drift: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low is not None and self.high is not None:
            if isinstance(self.low, str) != isinstance(self.high, str):
                raise ValueError(f"low and high: expected values of one type, got {self.low!r} and {self.high!r}")
            if self.low > self.high:  # type: ignore[operator]
                raise ValueError(f"low: expected at most high, {self.high!r}, got {self.low!r}")
        return self


class Volume(Config):
    """How many events a day has.

    Attributes:
        low: at least.
        high: at most.
        factor: at most this many times the median of the days before, and at least one over it.
    """

    low: int | None = Field(None, ge=0)
    high: int | None = Field(None, ge=0)
    factor: float | None = Field(None, gt=1)


class DataChecks(Config):
    """What is demanded of the events of a day.

    Attributes:
        columns: by name.
        volume: of the day.
        dropped: the share of the raw rows that ingest left out, at most.
        days: how many days before it a day is compared with, at most.
    """

    columns: Mapping[str, ColumnCheck] = {}
    volume: Volume = Volume()
    dropped: float | None = Field(None, ge=0, le=1)
    days: int = Field(7, ge=1, le=60)
