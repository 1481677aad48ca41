# SPDX-License-Identifier: Apache-2.0
"""Which source column plays which role, and what type its values have: the one thing that a user writes to bring a data set in.

::

    interactions: {user_id: uid, item_id: iid, event_time: {column: ts, unit: s}, values: [{name: rating, kind: label, source: stars}]}
    items: {item_id: iid, attributes: [{name: title, kind: text}, {name: genres, kind: bag, separator: "|"}, {name: year, kind: dense}]}
    users: {user_id: uid, attributes: [{name: age, kind: dense}]}
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BeforeValidator, Field, model_validator

from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, ITEM, REQUEST_TIME, USER, Column, Dtype, FeatureSchema, Kind
from recsys.core.status import STATUS_SUFFIX

RESERVED = (USER, ITEM, EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ, REQUEST_TIME)

# What the values of each kind may be, the default first.
_DTYPES = {
    Kind.ID: (Dtype.STRING,),
    Kind.TIME: (Dtype.TIMESTAMP,),
    Kind.CATEGORICAL: (Dtype.STRING, Dtype.INT),
    Kind.BAG: (Dtype.STRING, Dtype.INT),
    Kind.SEQUENCE: (Dtype.STRING, Dtype.INT, Dtype.FLOAT),
    Kind.DENSE: (Dtype.FLOAT, Dtype.INT),
    Kind.TEXT: (Dtype.STRING,),
    Kind.LABEL: (Dtype.FLOAT, Dtype.INT),
}


class TimeUnit(StrEnum):
    """How a source writes a time: numbers since 1970-01-01 UTC, or ``iso`` for a timestamp, a date, or ISO 8601 text."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    ISO = "iso"


class TimeColumn(Config):
    """The source column of a time. A time without an offset is UTC. In YAML a bare name stands for ``{column: name}``."""

    column: str
    unit: TimeUnit = TimeUnit.ISO


def _bare_column(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


_Time = Annotated[TimeColumn, BeforeValidator(_bare_column)]


class SourceColumn(Column):
    """A typed column and where it comes from.

    Attributes:
        source: the column's name in the source; by default ``name``.
        separator: what stands between the elements of a bag or sequence where the source writes it as text.
        nulls: source texts (or whole numbers, as text) that mean "no value", such as ``["unknown", "-1"]``.
        unit: for the kind ``time``: how the source writes it.
    """

    source: str | None = None
    separator: str | None = Field(default=None, min_length=1)
    nulls: tuple[str, ...] = ()
    unit: TimeUnit = TimeUnit.ISO

    @property
    def source_name(self) -> str:
        """The column's name in the source."""
        return self.source or self.name

    @property
    def value_dtype(self) -> Dtype:
        """The type of a value, or of a list's element."""
        return self.dtype or _DTYPES[self.kind][0]

    @property
    def typed(self) -> Column:
        """The column without its origin."""
        return Column(name=self.name, kind=self.kind, dtype=self.dtype)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.name in RESERVED or self.name.startswith("__") or self.name.endswith(STATUS_SUFFIX):
            raise ValueError(f"column {self.name!r}: the name is reserved; expected none of {', '.join(RESERVED)}, __*, *{STATUS_SUFFIX}")
        if self.dtype is not None and self.dtype not in _DTYPES[self.kind]:
            expected = " or ".join(_DTYPES[self.kind])
            raise ValueError(f"column {self.name!r}: dtype {self.dtype.value!r} does not fit kind {self.kind.value!r}; expected {expected}")
        if self.separator is not None and self.kind not in (Kind.BAG, Kind.SEQUENCE):
            raise ValueError(f"column {self.name!r}: a separator is for the kinds bag and sequence, not {self.kind.value!r}")
        return self


def _features(fixed: tuple[Column, ...], columns: tuple[SourceColumn, ...]) -> FeatureSchema:
    return FeatureSchema(columns=(*fixed, *(column.typed for column in columns)))


def _sources(table: str, roles: dict[str, str], columns: tuple[SourceColumn, ...]) -> dict[str, str]:
    named = {**roles, **{column.name: column.source_name for column in columns}}
    return {f"{table}.{role}": name for role, name in named.items()}


def _refuse_twins(columns: tuple[SourceColumn, ...]) -> None:
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"column {name!r} is declared twice")


class InteractionsSchema(Config):
    """The roles in the table of events. ``available_time`` is when an event came to be known; by default when it happened."""

    user_id: str = USER
    item_id: str = ITEM
    event_time: _Time
    available_time: _Time | None = None
    values: tuple[SourceColumn, ...] = ()

    @property
    def features(self) -> FeatureSchema:
        """The canonical columns."""
        ids = (Column(name=USER, kind=Kind.ID), Column(name=ITEM, kind=Kind.ID))
        times = (Column(name=EVENT_TIME, kind=Kind.TIME), Column(name=AVAILABLE_TIME, kind=Kind.TIME))
        return _features((*ids, *times, Column(name=INGEST_SEQ, kind=Kind.ID, dtype=Dtype.INT)), self.values)

    @property
    def sources(self) -> dict[str, str]:
        """The source columns by their roles, such as ``interactions.user_id``."""
        roles = {USER: self.user_id, ITEM: self.item_id, EVENT_TIME: self.event_time.column}
        if self.available_time is not None:
            roles[AVAILABLE_TIME] = self.available_time.column
        return _sources("interactions", roles, self.values)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        _refuse_twins(self.values)
        return self


class _EntitySchema(Config):
    attributes: tuple[SourceColumn, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        _refuse_twins(self.attributes)
        for column in self.attributes:
            if column.kind is Kind.LABEL:
                raise ValueError(f"column {column.name!r}: a label belongs to an interaction, not to an item or user")
        return self


class ItemsSchema(_EntitySchema):
    """The roles in the table of items."""

    item_id: str = ITEM

    @property
    def features(self) -> FeatureSchema:
        """The canonical columns."""
        return _features((Column(name=ITEM, kind=Kind.ID),), self.attributes)

    @property
    def sources(self) -> dict[str, str]:
        """The source columns by their roles, such as ``items.item_id``."""
        return _sources("items", {ITEM: self.item_id}, self.attributes)


class UsersSchema(_EntitySchema):
    """The roles in the table of users."""

    user_id: str = USER

    @property
    def features(self) -> FeatureSchema:
        """The canonical columns."""
        return _features((Column(name=USER, kind=Kind.ID),), self.attributes)

    @property
    def sources(self) -> dict[str, str]:
        """The source columns by their roles, such as ``users.user_id``."""
        return _sources("users", {USER: self.user_id}, self.attributes)


class UnknownItem(StrEnum):
    """What becomes of an event whose item the table of items does not hold."""

    DROP = "drop"
    ADD = "add"  # the item joins the table, its attributes null
    ERROR = "error"


class DatasetSchema(Config):
    """The three tables of a data set, and the one rule that a user chooses."""

    interactions: InteractionsSchema
    items: ItemsSchema
    users: UsersSchema | None = None
    on_unknown_item: UnknownItem = UnknownItem.DROP

    @classmethod
    def load(cls, path: str | Path) -> "DatasetSchema":
        """Read a YAML file.

        Raises:
            ConfigError: names the file, the key, and the nearest known key.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"schema {str(path)!r}: cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of keys, got {type(data).__name__}")
        return parse(cls, data, source=str(path))

    def dump(self) -> str:
        """The schema as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
