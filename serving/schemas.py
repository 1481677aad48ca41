# SPDX-License-Identifier: Apache-2.0
"""What the API takes and answers, as JSON."""

from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat

from recsys.bundle.rules import Quota, Rules

MAX_ITEMS = 1000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    """What the documentation shows, and a client can send as it is, for a catalogue that has the items 1 and 2."""
    return ConfigDict(extra="forbid", json_schema_extra={"examples": list(bodies)})


class _Asked(_Body):
    user_id: str = Field(min_length=1, max_length=256, description="any string; an unknown user is a new one")
    deadline_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="time for the answer, from the arrival of the request; cut to the server's largest"
    )


class QuotaBody(_Body):
    """At most so many items of any one value of an attribute."""

    attribute: str = Field(min_length=1, max_length=128, description="a column of the items; of lists, an item counts for each value")
    most: int = Field(ge=0, le=MAX_ITEMS)


class RulesBody(_Body):
    """Business rules of a list; what is absent is as the bundle has it."""

    exclude: list[str] = Field([], max_length=MAX_ITEMS, description="item ids that are not shown; unknown ones exclude nothing")
    quotas: list[QuotaBody] | None = Field(None, max_length=16)
    diversity: float | None = Field(None, ge=0, le=1, description="0: the order of the scores; 1: items as different as can be")

    def asked(self) -> Rules:
        """As the recommendation path takes them."""
        quotas = None if self.quotas is None else tuple(Quota(attribute=quota.attribute, most=quota.most) for quota in self.quotas)
        return Rules(exclude=tuple(self.exclude), quotas=quotas, diversity=self.diversity)


class RecommendBody(_Asked):
    """Ask for a list."""

    model_config = _examples(
        {"user_id": "42", "k": 10, "explain": True},
        {"user_id": "42", "k": 5, "explain": False, "rules": {"exclude": ["7"], "diversity": 0.3}, "deadline_ms": 5000},
    )

    k: int = Field(10, ge=1, le=MAX_ITEMS, description="length of the list; shorter where the catalogue is")
    explain: bool = Field(True, description="name the events of the history that mattered")
    rules: RulesBody = Field(default_factory=RulesBody, description="what the list may hold")


class RankBody(_Asked):
    """Ask for an order of given items."""

    model_config = _examples({"user_id": "42", "item_ids": ["1", "2"], "deadline_ms": 5000})

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


class SimilarBody(_Body):
    """Ask for items like an item."""

    model_config = _examples({"item_id": "1", "k": 10})

    item_id: str = Field(min_length=1, max_length=256)
    k: int = Field(10, ge=1, le=MAX_ITEMS, description="length of the list; shorter where the catalogue is")


class EventBody(_Body):
    """Something that a user did."""

    model_config = _examples(
        {"event_id": "0f3c-1", "user_id": "42", "item_id": "1", "time": "2026-01-01T12:00:00Z", "values": {"rating": 5}}
    )

    event_id: str = Field(min_length=1, max_length=128, description="the same event sent again has the same one, and counts once")
    user_id: str = Field(min_length=1, max_length=256)
    item_id: str = Field(min_length=1, max_length=256, description="an item that the catalogue does not have is counted")
    event_type: str | None = Field(None, max_length=128, description="what was done, where features read the column event_type")
    time: AwareDatetime = Field(description="when, with a time zone; a minute ahead of the server at most")
    values: dict[str, bool | int | FiniteFloat | str | None] = Field(
        default_factory=dict, max_length=64, description="by the columns that features read of events, such as a rating"
    )
    request_id: str | None = Field(
        None, min_length=1, max_length=128, description="of the list that showed the item, by which a canary is judged"
    )
    ingest_seq: int | None = Field(None, ge=0, lt=2**62, description="the number that the log of events gave it, where it has one by now")


class EventOut(_Body):
    """What became of an event."""

    event_id: str
    status: str = Field(description="accepted, or duplicate: it had come before, here or by the batch road")
    known_item: bool


class SimilarItemOut(_Body):
    """An item, and how like the one asked about it is."""

    item_id: str
    title: str | None
    similarity: float = Field(description="the cosine of the model's vectors of both items")


class SimilarOut(_Body):
    """Items like an item, the most alike first."""

    request_id: str
    item_id: str
    items: list[SimilarItemOut]
    model: ModelOut
    flags: list[str]
