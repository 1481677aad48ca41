# SPDX-License-Identifier: Apache-2.0
"""What the page asks and is answered, as JSON."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from serving.schemas import ModelOut

LONGEST_HISTORY = 256
MOST_ITEMS = 50
LONGEST_ID = 256
LONGEST_SEARCH = 100
MOST_FOUND = 20

Id = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WhatIfBody(_Body):
    """Ask for the list of a user, or of nobody in particular, whose history were another one."""

    user_id: Id | None = None
    history: list[Id] | None = Field(None, max_length=LONGEST_HISTORY, description="item ids, oldest first; null: the user's own")
    k: int = Field(10, ge=1, le=MOST_ITEMS)
    version: int | None = Field(None, ge=0, description="of the bundle, which must be loaded; null: the one that answers")


class EventOut(_Body):
    """An event of the history."""

    item_id: str
    title: str | None


class SupposedItemOut(_Body):
    """An item of the list."""

    item_id: str
    title: str | None
    score: float
    log_probability: float
    probability: float
    effects: list[float] = Field(description="by event of the history: how far the score falls without it")


class WhatIfOut(_Body):
    """A list, the history that it follows from, and the bundle that made it."""

    history: list[EventOut]
    items: list[SupposedItemOut]
    model: ModelOut
    flags: list[str]
    stages_ms: dict[str, float]


class BundleOut(_Body):
    """A bundle that is loaded."""

    model: ModelOut
    live: bool = Field(description="whether it is the one that answers")
    canary: bool = Field(description="whether it answers some of the users in that one's place")
    created: str


class BundlesOut(_Body):
    """The bundles that are loaded, the one that answers first."""

    bundles: list[BundleOut]


class FoundItemsOut(_Body):
    """Items that a search found."""

    items: list[EventOut]


class FoundUserOut(_Body):
    """A user."""

    user_id: str
    events: int


class FoundUsersOut(_Body):
    """Users that a search found."""

    users: list[FoundUserOut]


class BarOut(_Body):
    """A figure, with its 95% interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


class PlotOut(_Body):
    """Figures of one kind, to be drawn beside each other."""

    title: str
    bars: list[BarOut]


class ReportOut(_Body):
    """What the evaluation of a bundle measured."""

    version: int
    plots: list[PlotOut]
