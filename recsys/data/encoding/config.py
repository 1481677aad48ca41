# SPDX-License-Identifier: Apache-2.0
"""What each feature becomes: the configuration of an `Encoder`, as data."""

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from recsys.core.config import Config, Problem, by_kind
from recsys.data.spec import check_groups


class Identifiers(Config):
    """Strings that name rows of a table.

    Attributes:
        table: the table to look up in; features that name one table share its rows.
        ids: how strings become rows. ``vocabulary``: by a vocabulary fitted on train, for a closed set. ``hashed``: by their hash, for an
            open set, without any state; two strings of one row share its vector. ``raw``: not here, but by the table itself, as its 63-bit
            ids come and go (``embedding.managed`` of the ranker).
        rows: of the table, where ``ids`` is ``hashed`` or ``raw``; rows 0 and 1 are "no value" and "unknown".
        min_count: a value looked up less often in train is left out of the vocabulary.
    """

    table: str | None = None
    ids: Literal["vocabulary", "hashed", "raw"] = "vocabulary"
    rows: Annotated[int, Field(ge=4)] | None = None
    min_count: PositiveInt = 1

    @model_validator(mode="after")
    def _one_origin_of_rows(self) -> Self:
        if self.ids == "vocabulary" and self.rows is not None:
            raise Problem(("rows",), f"a vocabulary decides the rows of its table; expected `ids: hashed` or `ids: raw` beside {self.rows}")
        if self.ids != "vocabulary" and self.rows is None:
            raise Problem(("rows",), f"`ids: {self.ids}` needs the number of rows of the table")
        if self.ids != "vocabulary" and self.min_count > 1:
            raise Problem(("min_count",), f"`ids: {self.ids}` leaves no value out; expected 1, got {self.min_count}")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As before there was anything but vocabularies, so that older encoders keep their fingerprints."""
        content: dict[str, Any] = serialize(self)
        return content if self.ids != "vocabulary" else {k: v for k, v in content.items() if k not in ("ids", "rows")}


class Categorical(Identifiers):
    """A string: one row of a table, pooled as a bag of one. ``feature`` is the column, the key of the batch and by default the table."""

    kind: Literal["categorical"] = "categorical"
    feature: str


class Bag(Identifiers):
    """A list of strings without order, such as genres: pooled rows of a table. See `Categorical`."""

    kind: Literal["bag"] = "bag"
    feature: str


class Bucket(Config):
    """A number: the id of its quantile bucket in train, pooled as a bag of one.

    Attributes:
        feature: the column, the key of the batch and the table.
        buckets: how many; fewer result where one value spans several quantiles.
    """

    kind: Literal["bucket"] = "bucket"
    feature: str
    buckets: Annotated[int, Field(ge=2)]


class Dense(Config):
    """A number as a dense column. A value that is not there becomes 0 after standardisation, which is the mean of train.

    Attributes:
        feature: the column, and the name of the dense column.
        transform: ``log1p`` is sign(x) · log(1 + abs(x)), which is the usual one where x ≥ 0.
        standardize: subtract the mean and divide by the standard deviation of the transformed values present in train.
        indicator: add the dense column ``<feature>__absent``: 1 where no value is there, else 0.
    """

    kind: Literal["dense"] = "dense"
    feature: str
    transform: Literal["none", "log1p"] = "none"
    standardize: bool = True
    indicator: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """The dense columns that it becomes."""
        return (self.feature, f"{self.feature}__absent") if self.indicator else (self.feature,)


class SequenceExtra(Config):
    """A list aligned with the items of a history, in a table of its own name.

    Attributes:
        feature: the column, the key of the batch and the table.
        edges: numbers are bucketed by these ascending edges: bucket i holds ``edges[i - 1] <= x < edges[i]``.
        values: numbers are these distinct values; any other number is unknown.
        min_count: where neither is given, the elements are strings of a vocabulary fitted on train.
    """

    feature: str
    edges: tuple[FiniteFloat, ...] | None = None
    values: tuple[FiniteFloat, ...] | None = None
    min_count: PositiveInt = 1

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.edges is not None and self.values is not None:
            raise Problem((), f"sequence extra {self.feature!r}: expected edges or values or neither, got both")
        if self.edges is not None and any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise Problem(("edges",), f"expected ascending numbers, got {list(self.edges)}")
        if self.values is not None and len(set(self.values)) < len(self.values):
            raise Problem(("values",), f"expected distinct numbers, got {list(self.values)}")
        return self


class Sequence(Identifiers):
    """A history of items, oldest first, and the candidate that is compared with it, looked up unpooled in one table.

    Attributes:
        name: the field that the pooled sequence becomes.
        items: a column of lists of item ids, and a key of the batch.
        target: a column of one item id, and a key of the batch.
        max_length: how many elements are kept: the last ones.
        extra: lists aligned with ``items``.

    The table of items and target is ``target`` by default. For a vocabulary, look-ups of items (those kept) and of targets both count.
    """

    kind: Literal["sequence"] = "sequence"
    name: str
    items: str
    target: str
    max_length: PositiveInt
    extra: tuple[SequenceExtra, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The aligned keys, the item first."""
        return (self.items, *(extra.feature for extra in self.extra))


class Task(Config):
    """A label to predict.

    Attributes:
        name: the task.
        feature: a column of numbers or booleans.
        threshold: a comparison such as ``">= 4"``, which turns the column into 0 and 1.
    """

    name: str
    feature: str
    threshold: Annotated[str, Field(pattern=r"^\s*(>=|>|<=|<|==)\s*-?\d+(\.\d+)?\s*$")] | None = None


Feature = Categorical | Bag | Bucket | Dense | Sequence
KINDS: dict[str, type[Config]] = {"categorical": Categorical, "bag": Bag, "bucket": Bucket, "dense": Dense, "sequence": Sequence}


class EncoderConfig(Config):
    """All inputs of a ranker, and its labels.

    Attributes:
        features: each of the kind ``categorical``, ``bag``, ``bucket``, ``dense`` or ``sequence``.
        tasks: the labels, in the order of the columns of `RankingBatch.labels`.
        weight: a column of numbers, at least 0: how much each row counts in training (`RankingBatch.weights`). It stands beside the labels,
            and is not read where there are none.
        groups: which fields belong together, by the names of `InputSpec.fields`: all of them, each in one group; empty where that is not
            known. They decide nothing about what is encoded, and are no part of the encoder's fingerprint.
    """

    features: tuple[Annotated[Feature, BeforeValidator(by_kind(KINDS, "kind of feature"))], ...]
    tasks: tuple[Task, ...] = ()
    weight: str | None = None
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        sequences = [f for f in self.features if isinstance(f, Sequence)]
        targets = list(dict.fromkeys(f.target for f in sequences))
        fields = [name for f in self.features for name in _fields(f)] + targets
        _distinct("features", "field", fields)
        _distinct("features", "key of a sequence", [key for f in sequences for key in f.keys] + targets)
        _distinct("tasks", "task", [task.name for task in self.tasks])
        _check_tables(self)
        if self.weight is not None and not self.tasks:
            raise Problem(("weight",), f"expected tasks beside {self.weight!r}: weights count in the loss alone")
        if self.groups:
            check_groups(self.groups, fields)
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a weight and groups, what is saved is what it was before there were any; so older encoders keep their fingerprints."""
        return {key: value for key, value in serialize(self).items() if value or key not in ("weight", "groups")}


def _fields(feature: Feature) -> tuple[str, ...]:
    """The names that a feature adds to `InputSpec.fields`, without the target of a sequence, which several may share."""
    match feature:
        case Sequence():
            return (feature.name,)
        case Dense():
            return feature.columns
        case _:
            return (feature.feature,)


def pooled_table(feature: Categorical | Bag) -> str:
    """The table of a pooled feature."""
    return feature.table or feature.feature


def item_table(feature: Sequence) -> str:
    """The table of a sequence's items and target."""
    return feature.table or feature.target


def _distinct(key: str, what: str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Problem((key,), f"every {what} must be distinct, but {twice[0]!r} occurs twice")


def _check_tables(config: EncoderConfig) -> None:
    """A table is either pooled, of items, of an extra or of a bucket; what shares a table agrees on how its rows are given."""
    uses: dict[str, tuple[str, str]] = {}
    target_table: dict[str, str] = {}
    for position, feature in enumerate(config.features):
        for table, use, rows in _uses(feature):
            shared = uses.setdefault(table, (use, rows))
            if shared != (use, rows):
                raise Problem(("features", position), f"table {table!r} is used for {shared[0]} ({shared[1]}) and for {use} ({rows})")
        if isinstance(feature, Sequence) and target_table.setdefault(feature.target, item_table(feature)) != item_table(feature):
            raise Problem(("features", position), f"target {feature.target!r} is looked up in two tables")


def _uses(feature: Feature) -> list[tuple[str, str, str]]:
    """For each table of a feature: its name, and phrases for its use and for how it gets rows (equal phrases may share)."""
    match feature:
        case Categorical() | Bag():
            return [(pooled_table(feature), "pooled values", _origin(feature))]
        case Bucket():
            return [(feature.feature, f"the buckets of {feature.feature!r}", "buckets")]
        case Dense():
            return []
        case Sequence():
            extras = [(extra.feature, f"the elements of {extra.feature!r}", f"min_count {extra.min_count}") for extra in feature.extra]
            return [(item_table(feature), "items of sequences", _origin(feature)), *extras]


def _origin(feature: Identifiers) -> str:
    return f"min_count {feature.min_count}" if feature.ids == "vocabulary" else f"ids {feature.ids}, {feature.rows} rows"
