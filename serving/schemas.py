# SPDX-License-Identifier: Apache-2.0
"""What the API takes and answers, as JSON."""

from pydantic import BaseModel, ConfigDict, Field

MAX_ITEMS = 1000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecommendBody(_Body):
    """Ask for a list."""

    user_id: str = Field(min_length=1, max_length=256, description="any string; an unknown user is a new one")
    k: int = Field(10, ge=1, le=MAX_ITEMS, description="length of the list; shorter where the catalogue is")
    explain: bool = Field(True, description="name the events of the history that mattered")


class RankBody(_Body):
    """Ask for an order of given items."""

    user_id: str = Field(min_length=1, max_length=256)
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
    score: float
    log_probability: float = Field(description="the retriever's, over the live catalogue")
    probability: float = Field(description="the ranker's")
    reasons: list[ReasonOut]


class ModelOut(_Body):
    """Which bundle answered."""

    name: str
    version: int
    sha256: str


class ListOut(_Body):
    """A list, and what made it."""

    user_id: str
    items: list[ItemOut]
    model: ModelOut
    flags: list[str]
    took_ms: float


class ErrorOut(_Body):
    """A rejection: one of the fixed reasons, and a sentence that names the field, the value and what was expected."""

    error: str
    message: str
