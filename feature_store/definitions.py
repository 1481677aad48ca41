# SPDX-License-Identifier: Apache-2.0
"""Sources, views and services: what features there are, of which entity, from which table. Data only; `compiled` makes it executable."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from feature_store.features import TILED_ONLY, Aggregate, AnyFeature, Attribute, Clock, Feature, LastN, Name, source_columns
from recsys.core.config import Config, Problem
from recsys.core.errors import ConfigError, unknown
from recsys.core.files import sha256_json
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, REQUEST_TIME, Column, FeatureSchema
from recsys.core.status import STATUS_SUFFIX

SEMANTICS = 1
"""Part of every version: raised when the same definition comes to mean another value."""

TIMES = (EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ)


class Source(Config):
    """Where raw values come from: a table, or the request itself.

    Attributes:
        name: the source.
        kind: ``events`` has the columns ``event_time``, ``available_time`` and ``ingest_seq``, many rows per entity, and only grows;
            ``static`` has one row per entity and no time: a changed row changes the past; ``request`` is the row that the reader is
            asked with, has neither table nor keys, and is never stored.
        table: the table's name in what the readers are given.
        keys: the columns of entity ids (strings) that a view may choose from.
    """

    name: Name
    kind: Literal["events", "static", "request"]
    table: str | None = None
    keys: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "request" and (self.table is not None or self.keys):
            raise Problem((), f"source {self.name!r} is the request itself: expected neither table nor keys")
        if self.kind != "request" and self.table is None:
            raise Problem(("table",), "is required, but missing")
        if self.kind != "request" and not self.keys:
            raise Problem(("keys",), f"source {self.name!r} needs at least one column of entity ids, got none")
        return self


class FeatureView(Config):
    """Features of one entity from one source.

    Attributes:
        name: the view.
        source: the name of a `Source`.
        entity: one of the source's keys; of a request, a key of any source.
        ttl: seconds. Where the newest counted event is older than this, every value of the view is EXPIRED; an age of exactly ``ttl``
            is still PRESENT. Never expired by default.
        tile: seconds. An online store then keeps of each entity what is needed of every tile of time, rather than its events; all
            features are aggregates, whose windows begin where a tile does. See `feature_store.tiles`. No tiles by default.
        features: of the kinds in `feature_store.features`.
    """

    name: Name
    source: str
    entity: str
    ttl: PositiveInt | None = None
    tile: PositiveInt | None = None
    features: Annotated[tuple[Feature, ...], Field(min_length=1)]

    @model_serializer(mode="wrap")
    def _without_no_tile(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Versions are hashes of what this gives: those from before there was ``tile`` stay what they are."""
        return {key: value for key, value in dump(self).items() if key != "tile" or value is not None}


class FeatureService(Config):
    """The views that one request reads together, all of one entity."""

    name: Name
    views: Annotated[tuple[str, ...], Field(min_length=1)]


N = TypeVar("N", Source, FeatureView, FeatureService)


class FeatureRepo(Config):
    """All definitions, checked against each other. A feature's name is unique in the repo, so that services can be joined side by side."""

    sources: tuple[Source, ...]
    views: tuple[FeatureView, ...]
    services: tuple[FeatureService, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct("sources", "source", [source.name for source in self.sources])
        _distinct("views", "view", [view.name for view in self.views])
        _distinct("services", "service", [service.name for service in self.services])
        _distinct("views", "feature", [feature.name for view in self.views for feature in view.features])
        reserved = {REQUEST_TIME, *(key for source in self.sources for key in source.keys)}
        for place, view in enumerate(self.views):
            self._check_view(view, place, reserved)
        for place, service in enumerate(self.services):
            self._check_service(service, place)
        return self

    def _check_view(self, view: FeatureView, place: int, reserved: set[str]) -> None:
        at = ("views", place)
        sources = {source.name: source for source in self.sources}
        if view.source not in sources:
            raise Problem((*at, "source"), unknown("source", view.source, sources))
        source = sources[view.source]
        keys = {key for each in self.sources for key in each.keys} if source.kind == "request" else source.keys
        if view.entity not in keys:
            raise Problem((*at, "entity"), unknown(f"key of source {source.name!r}", view.entity, keys))
        for feature in view.features:
            if feature.name in reserved or feature.name.endswith(STATUS_SUFFIX):
                raise Problem((*at, "features"), f"a feature cannot be named {feature.name!r}: readers use that name themselves")
            _check_kind(feature, source, at)
            _check_tile(feature, view.tile, at)
        if source.kind != "events" and view.ttl is not None:
            raise Problem((*at, "ttl"), f"source {source.name!r} is {source.kind}: its rows have no age")
        try:
            read = source_columns(view.features)
        except Problem as problem:
            raise Problem((*at, "features"), problem.message) from None
        for column in read:
            if column in (view.entity, REQUEST_TIME, *TIMES):
                raise Problem((*at, "features"), f"column {column!r} is the entity or a time, not a value; for times use age or elapsed")

    def _check_service(self, service: FeatureService, place: int) -> None:
        views = {view.name: view for view in self.views}
        for name in service.views:
            if name not in views:
                raise Problem(("services", place, "views"), unknown("view", name, views))
        entities = sorted({views[name].entity for name in service.views})
        if len(entities) > 1:
            raise Problem(("services", place, "views"), f"the views of one service must share an entity, got {', '.join(entities)}")
        if len(set(service.views)) < len(service.views):
            raise Problem(("services", place, "views"), f"each view at most once, got {', '.join(service.views)}")
        stamps = sorted({stamp for name in service.views for stamp in _stamps(views[name])})
        if len(stamps) > 1:
            raise Problem(("services", place, "views"), f"histories of one service must share a tokenizer, got {', '.join(stamps)}")

    def source(self, name: str) -> Source:
        """The source of this name; `ConfigError` with the nearest name where there is none."""
        return _named("source", name, self.sources)

    def view(self, name: str) -> FeatureView:
        """The view of this name; `ConfigError` with the nearest name where there is none."""
        return _named("view", name, self.views)

    def service(self, name: str) -> FeatureService:
        """The service of this name; `ConfigError` with the nearest name where there is none."""
        return _named("feature service", name, self.services)

    def entity(self, service: str) -> str:
        """The key column of a service's spine."""
        return self.view(self.service(service).views[0]).entity

    def schema(self, service: str) -> FeatureSchema:  # type: ignore[override]  # hides a deprecated class method of pydantic's
        """The columns of a service's features, in order, without their status columns."""
        columns: list[Column] = []
        for name in self.service(service).views:
            columns += [feature.output for feature in self.view(name).features]
        return FeatureSchema(columns=tuple(columns))

    def tokenizer(self, service: str) -> str | None:
        """The fingerprint of the item tokenizer whose codes the service's histories hold; None where they hold none."""
        return next((stamp for name in self.service(service).views for stamp in _stamps(self.view(name))), None)

    def check_tokenizer(self, service: str, asked: str) -> None:
        """Raise a `ConfigError` where the service's histories are codes of another tokenizer than ``asked``, a model's fingerprint."""
        stamped = self.tokenizer(service)
        if stamped not in (None, asked):
            raise ConfigError(
                f"feature service {service!r}: its histories are codes of the tokenizer {stamped}, but the model expects {asked}; "
                "materialise histories of the model's own"
            )

    def view_version(self, view: str) -> str:
        """A hash over the view and its source: equal versions give equal values from equal tables."""
        definition = self.view(view)
        used = {"view": definition.model_dump(mode="json"), "source": self.source(definition.source).model_dump(mode="json")}
        return sha256_json({"semantics": SEMANTICS, **used})

    def version(self, service: str) -> str:
        """A hash over everything that the service uses, which a bundle pins."""
        views = self.service(service).views
        return sha256_json({"service": service, "views": [[name, self.view_version(name)] for name in views]})


def _check_kind(feature: AnyFeature, source: Source, at: tuple[str | int, ...]) -> None:
    fits = {
        "events": not isinstance(feature, Clock),
        "static": isinstance(feature, Attribute),
        "request": isinstance(feature, Attribute | Clock),
    }
    if not fits[source.kind]:
        needed = "a request" if isinstance(feature, Clock) else "events"
        what = "a table of events" if source.kind == "events" else source.kind
        message = f"feature {feature.name!r} of kind {feature.kind!r} needs {needed}, but source {source.name!r} is {what}"
        raise Problem((*at, "features"), message)


def _check_tile(feature: AnyFeature, tile: int | None, at: tuple[str | int, ...]) -> None:
    named = f"feature {feature.name!r} of kind {feature.kind!r}"
    if tile is None:
        if isinstance(feature, TILED_ONLY):
            raise Problem((*at, "features"), f"{named} needs a view with tiles: expected the key 'tile' of the view, got none")
        return
    if not isinstance(feature, Aggregate):
        raise Problem((*at, "features"), f"{named} is not made of tiles: expected an aggregate, or a view without 'tile'")
    if feature.window is None or feature.window < tile:
        raise Problem((*at, "features"), f"{named}: window: expected at least the view's tile of {tile} s, got {feature.window}")


def _stamps(view: FeatureView) -> list[str]:
    return [feature.tokenizer for feature in view.features if isinstance(feature, LastN) and feature.tokenizer is not None]


def _named(what: str, name: str, known: Iterable[N]) -> N:
    by_name = {each.name: each for each in known}
    if name not in by_name:
        raise ConfigError(unknown(what, name, by_name))
    return by_name[name]


def _distinct(key: str, what: str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Problem((key,), f"every {what} must have a name of its own, but {twice[0]!r} occurs twice")
