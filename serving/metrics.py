# SPDX-License-Identifier: Apache-2.0
"""What the server counts, for Prometheus. Labels have few values: routes, status codes, stages, flags, and the fixed reasons of rejection.

Where ``PROMETHEUS_MULTIPROC_DIR`` is set, as for several workers, processes count in files there, and each gives the sums over all of them.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from recsys.core.deadline import RejectReason

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_ROWS = (16, 64, 128, 256, 512, 1024, 1536, 2048, 4096)
_AGES = (1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 7 * 86400.0, 30 * 86400.0)
_SHARES = tuple(tenth / 10 for tenth in range(11))
_PROBABILITIES = tuple(tenth / 10 for tenth in range(1, 10))


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("recsys_requests", "Requests answered", ["route", "status"], registry=registry)
        self.rejected = Counter("recsys_rejected", "Requests without an answer", ["reason"], registry=registry)
        self.latency = Histogram("recsys_request_seconds", "From arrival to answer", ["route"], buckets=_SECONDS, registry=registry)
        self.stage = Histogram("recsys_stage_seconds", "Of an answer, by stage", ["stage"], buckets=_SECONDS, registry=registry)
        self.flagged = Counter("recsys_flagged", "Answers with a flag", ["flag"], registry=registry)
        self.failures = Counter("recsys_stage_failures", "Stages that failed for a batch", ["stage"], registry=registry)
        self.waiting = Gauge("recsys_requests_waiting", "Requests that wait", registry=registry, multiprocess_mode="livesum")
        self.queue_rows = Gauge("recsys_queue_rows", "Candidates that wait", registry=registry, multiprocess_mode="livesum")
        self.batch_rows = Histogram("recsys_batch_rows", "Candidates of a batch", buckets=_ROWS, registry=registry)
        self.batch_requests = Histogram("recsys_batch_requests", "Requests of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.lookups = Counter("recsys_cache_lookups", "Lookups in a cache", ["cache", "outcome"], registry=registry)
        self.cached_age = Histogram("recsys_cached_features_age_seconds", "Of users' cached features", buckets=_AGES, registry=registry)
        self.event_age = Histogram("recsys_newest_event_age_seconds", "Of users' newest events", buckets=_AGES, registry=registry)
        self.probability = Histogram(
            "recsys_first_probability", "The ranker's, of the first item", buckets=_PROBABILITIES, registry=registry
        )
        self.model = Gauge(
            "recsys_model_info",
            "1 for the bundle that answers",
            ["name", "version", "sha256"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.swaps = Counter("recsys_swaps", "Bundles put live, or not", ["outcome"], registry=registry)
        self.store_open = Gauge(
            "recsys_store_left_alone", "1 while the feature store is left alone", registry=registry, multiprocess_mode="livemax"
        )
        self.events = Counter("recsys_events", "Events taken", ["status"], registry=registry)
        self.unknown_items = Counter("recsys_events_unknown_items", "Events of items that the catalogue lacks", registry=registry)
        self.unlogged = Counter("recsys_unlogged_answers", "Answers that the hook had no room for", registry=registry)
        self.dropped_decisions = Counter("recsys_dropped_decisions", "Decisions that are in no part of the log", registry=registry)
        self.versions = Counter(
            "recsys_version_requests", "Requests by the version that was to answer", ["version", "outcome"], registry=registry
        )
        self.shadow = Counter("recsys_shadow_requests", "Requests copied to a shadow", ["outcome"], registry=registry)
        self.overlap = Histogram("recsys_shadow_overlap", "Of the first items with a shadow's", buckets=_SHARES, registry=registry)
        for reason in RejectReason:
            self.rejected.labels(reason.value)
        for outcome in ("loaded", "flipped_back", "failed"):
            self.swaps.labels(outcome)

    def answered(
        self,
        stages: Mapping[str, float],
        flags: Iterable[str],
        cached_age: float | None,
        event_age: float | None,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """Count an answer; the exemplar names its trace."""
        for stage, seconds in stages.items():
            self.stage.labels(stage).observe(seconds, exemplar)
        for flag in flags:
            self.flagged.labels(flag).inc()
        if cached_age is not None:
            self.cached_age.observe(cached_age)
        if event_age is not None:
            self.event_age.observe(event_age)

    def cached(self, cache: str, *, hit: bool) -> None:
        """Count a lookup."""
        self.lookups.labels(cache, "hit" if hit else "miss").inc()

    def failed(self, stage: str) -> None:
        """Count a failed stage."""
        self.failures.labels(stage).inc()

    def queued(self, requests: int, rows: int) -> None:
        """Tell how much waits."""
        self.waiting.set(requests)
        self.queue_rows.set(rows)

    def batch(self, requests: int, rows: int) -> None:
        """Count a batch."""
        self.batch_requests.observe(requests)
        self.batch_rows.observe(rows)

    def live(self, now: tuple[str, str, str], before: tuple[str, str, str] | None) -> None:
        """Name, version and sha256 of the bundle that answers now, and of the one before."""
        if before is not None:
            self.model.labels(*before).set(0)
        self.model.labels(*now).set(1)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics in the text format that a scraper accepts, and its media type; of all worker processes, where there are several.

        Exemplars are in OpenMetrics alone, and in that of a single process.
        """
        write, media_type = choose_encoder(accept)
        folder = os.environ.get(FOLDER)
        if folder is None:
            return write(self.registry), media_type
        _forget_the_dead(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        return write(registry), media_type


def _forget_the_dead(folder: Path) -> None:
    """Gauges of a process count while it lives; one that was killed could not take its own away."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not psutil.pid_exists(pid):
            mark_process_dead(pid, str(folder))
