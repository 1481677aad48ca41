# SPDX-License-Identifier: Apache-2.0
"""Which feedback belongs to which impression: the rules, on tables in memory.

A feedback event is of the latest decision of its request id that showed its item, not after the event. It counts for the impression's label
if it happened within the window, and if the impression was not emitted before the event was read. A label is the largest of its events', 0
without any: so neither their order nor how often they come says anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import polars as pl

from recsys.core.schema import EVENT_TIME, ITEM, REQUEST_TIME
from recsys.decisions.impressions import EVENT_KEYS, LABEL, REQUEST

EARLY, AFTER_WINDOW, AFTER_EMISSION, UNKNOWN_ITEM, UNKNOWN_REQUEST = (
    "before_request",
    "after_window",
    "after_emission",
    "unknown_item",
    "unknown_request",
)
REASONS = (EARLY, AFTER_WINDOW, AFTER_EMISSION, UNKNOWN_ITEM, UNKNOWN_REQUEST)
"""Why an event is in no label."""

_CLOSE, _ROW, _EVENT = "close", "row", "event"


class Past(Protocol):
    """What earlier runs wrote of some request ids."""

    def impressions(self, requests: pl.Series) -> pl.DataFrame:
        """Those that were emitted: ``request_id``, ``item_id``, ``request_time``, and ``close``, when the window ended."""
        ...

    def joined(self, requests: pl.Series) -> pl.DataFrame:
        """The events that are in their labels."""
        ...

    def apart(self, requests: pl.Series) -> pl.DataFrame:
        """The events that are in none."""
        ...


@dataclass(frozen=True)
class Joined:
    """What one run adds.

    Attributes:
        impressions: whose window has closed: the columns of ``shown``, then ``close`` and ``label``.
        events: that are in their labels, with the ``request_time`` of the decision.
        apart: events that are in no label, each with its ``reason``.
        pending: events that wait for their window to close, or for their decision.
        repeated: events that had come before.
    """

    impressions: pl.DataFrame
    events: pl.DataFrame
    apart: pl.DataFrame
    pending: pl.DataFrame
    repeated: int


def join_feedback(
    shown: pl.DataFrame, events: pl.DataFrame, past: Past, *, since: datetime | None, until: datetime, window: timedelta
) -> Joined:
    """Join feedback with what was shown.

    Args:
        shown: one row for each place of each list: ``request_id``, ``item_id``, ``request_time``, ``position``, whatever is to be kept, and
            ``new``: whether no earlier run has seen the decision. Impressions whose window closed by ``since`` and which are not new were
            emitted.
        events: the columns `EVENT_KEYS`, those that are pending from earlier runs among them.
        past: see `Past`; asked only where an event is of none of ``shown``.
        since: of the last run, its ``until``; None where this is the first.
        until: feedback is complete up to here.
        window: after a request, in which feedback counts; its last moment included.
    """
    live = shown.with_columns((pl.col(REQUEST_TIME) + window).alias(_CLOSE))
    if since is not None:
        live = live.filter(pl.col("new") | (pl.col(_CLOSE) > since))
    live = live.drop("new").sort(REQUEST_TIME, REQUEST, "position", ITEM).with_row_index(_ROW)
    unique = events.select(EVENT_KEYS).unique().sort(EVENT_KEYS).with_row_index(_EVENT)

    matched = _latest(unique, live)
    inside = matched.filter(pl.col(EVENT_TIME) <= pl.col(_CLOSE))
    counted = inside.filter(pl.col(_CLOSE) <= until)
    waiting = inside.filter(pl.col(_CLOSE) > until)
    outside = [_because(AFTER_WINDOW, matched.filter(pl.col(EVENT_TIME) > pl.col(_CLOSE)))]

    rest = unique.join(matched, on=_EVENT, how="anti")
    repeated, unknown = 0, rest
    if rest.height:
        repeated, unknown, more = _of_the_past(rest, live, past)
        outside += more
    expired = pl.col(EVENT_TIME) + window <= until
    outside.append(_because(UNKNOWN_REQUEST, unknown.filter(expired)))
    apart = pl.concat(outside).sort(EVENT_KEYS)
    if apart.height:
        before = apart.height
        apart = apart.join(past.apart(apart[REQUEST].unique()), on=EVENT_KEYS, how="anti")
        repeated += before - apart.height
    return Joined(
        impressions=_labelled(live.filter(pl.col(_CLOSE) <= until), counted),
        events=counted.select(*EVENT_KEYS, REQUEST_TIME).sort(EVENT_KEYS),
        apart=apart,
        pending=pl.concat([waiting.select(EVENT_KEYS), unknown.filter(~expired).select(EVENT_KEYS)]).sort(EVENT_KEYS),
        repeated=repeated + events.height - unique.height,
    )


def _of_the_past(rest: pl.DataFrame, live: pl.DataFrame, past: Past) -> tuple[int, pl.DataFrame, list[pl.DataFrame]]:
    """Of events that no live impression takes: how many earlier runs have counted, those of no known request, and the others by reason."""
    requests = rest[REQUEST].unique()
    emitted = past.impressions(requests).with_row_index(_ROW)
    matched = _latest(rest, emitted)
    joined = past.joined(requests)
    late = matched.join(joined, on=EVENT_KEYS, how="anti")
    inside = pl.col(EVENT_TIME) <= pl.col(_CLOSE)
    rest = rest.join(matched, on=_EVENT, how="anti")
    known = pl.concat([live.select(REQUEST, ITEM), emitted.select(REQUEST, ITEM)])
    early = rest.join(known, on=[REQUEST, ITEM], how="semi")
    other = rest.join(early, on=_EVENT, how="anti")
    foreign = other.join(known, on=REQUEST, how="semi")
    reasons = [
        _because(AFTER_EMISSION, late.filter(inside)),
        _because(AFTER_WINDOW, late.filter(~inside)),
        _because(EARLY, early),
        _because(UNKNOWN_ITEM, foreign),
    ]
    return matched.height - late.height, other.join(foreign, on=_EVENT, how="anti"), reasons


def _latest(events: pl.DataFrame, shown: pl.DataFrame) -> pl.DataFrame:
    """The events that some impression takes, each with the latest one before it; of an item that a list shows twice, its first place."""
    both = events.join(shown.select(REQUEST, ITEM, REQUEST_TIME, _CLOSE, _ROW), on=[REQUEST, ITEM])
    before = both.filter(pl.col(REQUEST_TIME) <= pl.col(EVENT_TIME))
    return before.sort(REQUEST_TIME, _ROW, descending=[False, True]).unique(_EVENT, keep="last", maintain_order=True)


def _labelled(due: pl.DataFrame, counted: pl.DataFrame) -> pl.DataFrame:
    labels = counted.group_by(_ROW).agg(pl.col(LABEL).max())
    return due.join(labels, on=_ROW, how="left", maintain_order="left").with_columns(pl.col(LABEL).fill_null(0.0)).drop(_ROW)


def _because(reason: str, events: pl.DataFrame) -> pl.DataFrame:
    columns: Sequence[str] = EVENT_KEYS
    return events.select(*columns, pl.lit(reason).alias("reason"))
