# SPDX-License-Identifier: Apache-2.0
"""What the server counts, for Prometheus. Labels have few values: routes, status classes and the fixed reasons of rejection."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from recsys.core.deadline import RejectReason

_SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("recsys_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.rejected = Counter("recsys_rejected", "Requests without a full answer", ["reason"], registry=self.registry)
        self.latency = Histogram("recsys_request_seconds", "From arrival to answer", ["route"], buckets=_SECONDS, registry=self.registry)
        self.waiting = Gauge("recsys_requests_waiting", "Requests queued or computed now", registry=self.registry)
        self.flagged = Counter("recsys_flagged", "Answers with a flag", ["flag"], registry=self.registry)
        self.model = Gauge("recsys_model_info", "The bundle that answers", ["name", "version", "sha256"], registry=self.registry)
        for reason in RejectReason:
            self.rejected.labels(reason.value)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
