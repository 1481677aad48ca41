# SPDX-License-Identifier: Apache-2.0
"""What the API takes and answers, as JSON."""

from pydantic import BaseModel, ConfigDict, Field

MAX_ITEMS = 1000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Asked(_Body):
    user_id: str = Field(min_length=1, max_length=256, description="any string; an unknown user is a new one")
    deadline_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="time for the answer, from the arrival of the request; cut to the server's largest"
    )


class RecommendBody(_Asked):
    """Ask for a list."""

    k: int = Field(10, ge=1, le=MAX_ITEMS, description="length of the list; shorter where the catalogue is")
    explain: bool = Field(True, description="name the events of the history that mattered")


class RankBody(_Asked):
    """Ask for an order of given items."""

    item_ids: list[str] = Field(min_length=1, max_length=MAX_ITEMS)
    explain: bool = False


class ReasonOut(_Body):
    """An event of the history, and by how much the score falls without it."""

    item_id: str
    title: str | None
    weight: float


class ItemOut(_Body):
    """One recommended item."""

    item_id: str
    title: str | None
    score: float = Field(description="what the list is sorted by")
    log_probability: float = Field(
        description="the retriever's, over the live catalogue; in a popular list, of the item's share of all events"
    )
    probability: float | None = Field(description="the ranker's; null where it was not asked")
    reasons: list[ReasonOut]


class ModelOut(_Body):
    """Which bundle answered."""

    name: str
    version: int
    sha256: str
    features: dict[str, str] = Field(description="the version of each feature service")


class FeaturesOut(_Body):
    """How old the user's features are."""

    cached: bool = Field(description="whether the store could not answer, and the last ones were used")
    cached_age_seconds: float | None = Field(description="since they were read, where they are cached")
    newest_event_age_seconds: float | None = Field(description="since the user's newest event, where that is known")


class ListOut(_Body):
    """A list, and what made it."""

    request_id: str
    user_id: str
    items: list[ItemOut]
    model: ModelOut
    features: FeaturesOut
    flags: list[str]
    stages_ms: dict[str, float] = Field(description="time by stage, for those that there were")
    took_ms: float


class ErrorOut(_Body):
    """A rejection: one of the fixed reasons, and a sentence that names the field, the value and what was expected."""

    error: str
    message: str


class ReadyOut(_Body):
    """Whether requests should be sent here, and to which bundle they go."""

    status: str
    message: str | None
    model: str | None
    version: int | None
    sha256: str | None
    store: str
