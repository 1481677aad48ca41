# SPDX-License-Identifier: Apache-2.0
"""Whether features still look as they did, and how old what is served is: shares of nulls, quantiles, PSI, and the age of events."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from feature_store.compiled import compile_view
from feature_store.definitions import FeatureRepo
from feature_store.online.base import FeatureStoreError, OnlineStore, Snapshot
from feature_store.online.packing import unpack
from feature_store.online.reader import check_versions
from recsys.core.config import Config
from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.schema import EVENT_TIME, TIME
from recsys.core.status import STATUS_SUFFIX, ValueStatus, status_column

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BINS = 10
SMALLEST_SHARE = 1e-4
"""What an empty bin counts as, so that its logarithm exists."""
BATCH_ENTITIES = 4096


class FeatureSummary(Config):
    """How a feature's values are spread. Of a list, what counts is its length.

    Attributes:
        kind: a number, a category (any other single value), or a list.
        rows: how many there were.
        null: the share of rows whose status is NULL.
        missing: the share of rows without a value for another reason: MISSING, EXPIRED or ERROR.
        quantiles: of numbers and lengths, at `QUANTILES`; empty without a PRESENT value.
        edges: of numbers and lengths, the inner bounds of the bins, each closed above.
        categories: of a category, the most frequent values; all others share the last bin.
        shares: of each bin among all rows; the last one of all is of the rows that are not PRESENT.
    """

    kind: Literal["number", "category", "list"]
    rows: int
    null: float
    missing: float
    quantiles: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()
    shares: tuple[float, ...]


class Summary(Config):
    """The features of a table, by name; JSON by ``model_dump_json``."""

    features: dict[str, FeatureSummary]


@dataclass(frozen=True)
class FeatureDrift:
    """A feature now beside a baseline.

    Attributes:
        psi: the population stability index over the baseline's bins, which include what is not PRESENT: 0 where nothing changed; below
            0.1 is commonly called stable, above 0.2 shifted.
        now: the summary of the new rows in the baseline's bins.
    """

    feature: str
    psi: float
    now: FeatureSummary


def summarize(table: pa.Table, *, bins: int = BINS) -> Summary:
    """The baseline of a table that a reader gave: of every column with a status column beside it.

    Args:
        table: at least one row.
        bins: how many equally filled bins a number is counted in (fewer where one value fills several), and how many categories.

    Raises:
        DataError: the table has no row, or ``bins`` is less than 2.
    """
    if bins < 2:
        raise DataError(f"summary: bins: expected at least 2, got {bins}")
    names = [name for name in table.column_names if status_column(name) in table.column_names and not name.endswith(STATUS_SUFFIX)]
    return Summary(features={name: _summary(table, name, None, bins) for name in names})


def drift(baseline: Summary, table: pa.Table) -> tuple[FeatureDrift, ...]:
    """Every feature of the baseline, as it is in ``table``.

    Raises:
        DataError: the table has no row.
        SchemaError: a feature is absent or of another kind.
    """
    found = []
    for name, before in baseline.features.items():
        if name not in table.column_names:
            raise SchemaError(f"drift: missing column: {unknown('column', name, table.column_names)}")
        now = _summary(table, name, before, BINS)
        found.append(FeatureDrift(name, psi(before.shares, now.shares), now))
    return tuple(found)


def psi(before: tuple[float, ...], now: tuple[float, ...]) -> float:
    """The population stability index of two distributions over the same bins: ``Σ (q − p) ln(q / p)``."""
    p, q = (np.maximum(shares, SMALLEST_SHARE) for shares in (before, now))
    return float(((q - p) * np.log(q / p)).sum())


def freshness(repo: FeatureRepo, store: OnlineStore, now: datetime) -> dict[str, float | None]:
    """The age at ``now`` of the newest event of each view of events, seconds; None without any. Reads the whole of these views.

    Raises:
        FeatureStoreError: the store cannot be read, or holds other versions of the views.
    """
    views = [view for view in (compile_view(repo, each.name) for each in repo.views) if view.source.kind == "events"]
    at = pa.scalar(now, TIME).cast(pa.int64()).as_py()
    ages: dict[str, float | None] = {}
    with store.snapshot() as snapshot:
        check_versions(tuple(views), snapshot)
        for view in views:
            newest = max(_newest(snapshot, view.view.name, view.stored), default=None)
            ages[view.view.name] = None if newest is None else (at - newest) / 1e6
    return ages


def _newest(snapshot: Snapshot, view: str, schema: pa.Schema) -> Iterator[int]:
    """The newest event time of each batch of entities, microseconds."""
    values = (value for _, value in snapshot.scan(view))
    while batch := list(islice(values, BATCH_ENTITIES)):
        try:
            newest = pc.max(unpack(batch, schema)[0].column(EVENT_TIME)).cast(pa.int64()).as_py()
        except FeatureStoreError as error:
            raise FeatureStoreError(f"view {view!r}: {error}") from None
        if newest is not None:
            yield newest


def _summary(table: pa.Table, name: str, baseline: FeatureSummary | None, bins: int) -> FeatureSummary:
    if not table.num_rows:
        raise DataError(f"feature {name!r}: expected at least one row, got none")
    values, status = table.column(name).combine_chunks(), np.asarray(table.column(status_column(name)))
    kind = _kind(values.type)
    if baseline is not None and baseline.kind != kind:
        raise SchemaError(f"feature {name!r}: expected a {baseline.kind} as in the baseline, got a {kind}: {values.type}")
    is_null, is_present = status == ValueStatus.NULL, (status == ValueStatus.PRESENT) & np.asarray(values.is_valid())
    present = values.filter(pa.array(is_present))
    if kind == "category":
        counts, found = _categories([str(value) for value in present.to_pylist()], baseline, bins)
    else:
        counts, found = _numbers(np.asarray(pc.list_value_length(present) if kind == "list" else present, np.float64), baseline, bins)
    return FeatureSummary(
        kind=kind,
        rows=table.num_rows,
        null=float(is_null.mean()),
        missing=float((~is_null & ~is_present).mean()),
        shares=tuple((np.append(counts, (~is_present).sum()) / table.num_rows).tolist()),
        **found,
    )


def _categories(texts: list[str], baseline: FeatureSummary | None, bins: int) -> tuple[np.ndarray, dict[str, Any]]:
    """How many there are in each bin, and what a summary says of them."""
    categories = tuple(text for text, _ in Counter(texts).most_common(bins)) if baseline is None else baseline.categories
    places = {text: place for place, text in enumerate(categories)}
    bin_of = np.array([places.get(text, len(categories)) for text in texts], np.int64)
    return np.bincount(bin_of, minlength=len(categories) + 1), {"categories": categories}


def _numbers(numbers: np.ndarray, baseline: FeatureSummary | None, bins: int) -> tuple[np.ndarray, dict[str, Any]]:
    """See `_categories`."""
    edges = _edges(numbers, bins) if baseline is None else baseline.edges
    bin_of = np.searchsorted(np.array(edges, np.float64), numbers, side="left")
    quantiles = tuple(np.quantile(numbers, QUANTILES).tolist()) if len(numbers) else ()
    return np.bincount(bin_of, minlength=len(edges) + 1), {"quantiles": quantiles, "edges": edges}


def _kind(of: pa.DataType) -> Literal["number", "category", "list"]:
    if pt.is_list(of):
        return "list"
    return "number" if pt.is_integer(of) or pt.is_floating(of) else "category"


def _edges(numbers: np.ndarray, bins: int) -> tuple[float, ...]:
    """Inner bounds of equally filled bins: values that occur, fewer where one of them fills several bins."""
    if not len(numbers):
        return ()
    inner = np.unique(np.quantile(numbers, np.arange(1, bins) / bins, method="inverted_cdf"))
    return tuple(inner[inner < numbers.max()].tolist())
