# SPDX-License-Identifier: Apache-2.0
"""Definitions made executable: one compiled view is what both the offline and the online reader evaluate."""

from dataclasses import dataclass
from functools import reduce

import polars as pl
import pyarrow as pa

from feature_store.definitions import TIMES, FeatureRepo, FeatureView, Source
from feature_store.features import Aggregate, AnyFeature, Condition, LastN, source_columns
from feature_store.partials import Partial, partials_of
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, TIME, Column, Dtype, FeatureSchema, Kind

TOKENIZER = "tokenizer"
"""The key, in the metadata of a history's column, of the fingerprint of the item tokenizer whose codes it holds."""
TILE, EVENT = "tile", "event"
"""The columns of a tile's number, and of the hash of a single event, in what an online store keeps."""


@dataclass(frozen=True)
class CompiledView:
    """A view with the types of what it reads.

    Attributes:
        view: the definition.
        source: its source.
        version: see `FeatureRepo.view_version`.
        columns: what is read from the source: the entity, the times of an event, then the values; of a request the values alone.
        events: the Arrow schema of one entity's rows, which is ``columns`` without the entity; times are not nullable.
        partials: what is kept of each tile; nothing in a view without tiles.
        outputs: the column that each feature becomes, in order; its metadata have `TOKENIZER` where it holds codes.
        conditions: every ``where`` of the view as one boolean Polars expression without nulls.
    """

    view: FeatureView
    source: Source
    version: str
    columns: FeatureSchema
    events: pa.Schema
    partials: tuple[Partial, ...]
    outputs: tuple[pa.Field, ...]
    conditions: dict[tuple[Condition, ...], pl.Expr]

    @property
    def stored(self) -> pa.Schema:
        """The Arrow schema of what an online store keeps of one entity: its events, or its tiles (see `feature_store.tiles.Tiles`)."""
        if self.view.tile is None:
            return self.events
        times = [pa.field(name, TIME, nullable=False) for name in (EVENT_TIME, AVAILABLE_TIME)]
        states = [field for place, partial in enumerate(self.partials) for field in partial.fields(str(place))]
        return pa.schema([*(pa.field(name, pa.int64(), nullable=False) for name in (TILE, EVENT)), *times, *states])

    @property
    def is_static(self) -> bool:
        """Whether the source has no time."""
        return self.source.kind == "static"

    @property
    def is_request(self) -> bool:
        """Whether the values come with the request, so that there is nothing to store or to look up."""
        return self.source.kind == "request"


def compile_view(repo: FeatureRepo, name: str) -> CompiledView:
    """The executable form of a view; `ConfigError` where there is none of this name."""
    view = repo.view(name)
    source = repo.source(view.source)
    entity = () if source.kind == "request" else (Column(name=view.entity, kind=Kind.ID),)
    times = tuple(_time_column(time) for time in TIMES) if source.kind == "events" else ()
    stored = (*times, *source_columns(view.features).values())
    return CompiledView(
        view=view,
        source=source,
        version=repo.view_version(name),
        columns=FeatureSchema(columns=(*entity, *stored)),
        events=pa.schema([pa.field(c.name, c.arrow, nullable=c.name not in TIMES) for c in stored]),
        partials=() if view.tile is None else tuple(dict.fromkeys(p for feature in view.features for p in partials_of(feature))),
        outputs=tuple(_output(feature) for feature in view.features),
        conditions={f.where: _compile_conditions(f.where) for f in view.features if isinstance(f, Aggregate)},
    )


def _output(feature: AnyFeature) -> pa.Field:
    stamp = feature.tokenizer if isinstance(feature, LastN) else None
    return pa.field(feature.name, feature.output.arrow, metadata=None if stamp is None else {TOKENIZER: stamp})


def _compile_conditions(conditions: tuple[Condition, ...]) -> pl.Expr:
    return reduce(lambda one, other: one & other, map(_compile_condition, conditions), pl.lit(True))


def _compile_condition(condition: Condition) -> pl.Expr:
    column, value = pl.col(condition.column), pl.lit(condition.value)
    comparisons = {
        "==": column == value,
        "!=": column != value,
        "<": column < value,
        "<=": column <= value,
        ">": column > value,
        ">=": column >= value,
    }
    return comparisons[condition.op].fill_null(False)


def _time_column(name: str) -> Column:
    if name in (EVENT_TIME, AVAILABLE_TIME):
        return Column(name=name, kind=Kind.TIME)
    return Column(name=name, kind=Kind.DENSE, dtype=Dtype.INT)
