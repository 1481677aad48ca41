# SPDX-License-Identifier: Apache-2.0
"""Definitions made executable: one compiled view is what both the offline and the online reader evaluate."""

from dataclasses import dataclass
from functools import reduce

import polars as pl
import pyarrow as pa

from feature_store.definitions import TIMES, FeatureRepo, FeatureView, Source
from feature_store.features import Condition, Count, Mean, Sum, source_columns
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, Column, Dtype, FeatureSchema, Kind


@dataclass(frozen=True)
class CompiledView:
    """A view with the types of what it reads.

    Attributes:
        view: the definition.
        source: its source.
        version: see `FeatureRepo.view_version`.
        columns: what is read from the source: the entity, the times of an event, then the values.
        stored: the Arrow schema of one entity's rows, which is ``columns`` without the entity; times are not nullable.
        outputs: the column that each feature becomes, in order.
        conditions: every ``where`` of the view as one boolean Polars expression without nulls.
    """

    view: FeatureView
    source: Source
    version: str
    columns: FeatureSchema
    stored: pa.Schema
    outputs: tuple[Column, ...]
    conditions: dict[tuple[Condition, ...], pl.Expr]

    @property
    def is_static(self) -> bool:
        """Whether the source has no time."""
        return self.source.kind == "static"


def compile_view(repo: FeatureRepo, name: str) -> CompiledView:
    """The executable form of a view; `ConfigError` where there is none of this name."""
    view = repo.view(name)
    source = repo.source(view.source)
    times = () if source.kind == "static" else tuple(_time_column(time) for time in TIMES)
    columns = (Column(name=view.entity, kind=Kind.ID), *times, *source_columns(view.features).values())
    return CompiledView(
        view=view,
        source=source,
        version=repo.view_version(name),
        columns=FeatureSchema(columns=columns),
        stored=pa.schema([pa.field(c.name, c.arrow, nullable=c.name not in TIMES) for c in columns[1:]]),
        outputs=tuple(feature.output for feature in view.features),
        conditions={f.where: _compile_conditions(f.where) for f in view.features if isinstance(f, Count | Sum | Mean)},
    )


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
