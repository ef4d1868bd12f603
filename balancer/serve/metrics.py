"""What Prometheus is told, by its conventions: names with unit and `_total`, few labels, none that a client can fill.

One registry for each process; with several workers the client library keeps the samples in files that all share
(PROMETHEUS_MULTIPROC_DIR), so that whichever worker is asked answers for all.

A request only notes what happened. The client library, with its locks and files, is told by `settle`: once a second,
and when this process is asked; what other workers tell is a second old at most.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST.encode()

_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATIO = (0.25, 0.5, 0.75, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4)


class Metrics:
    """The samples of one replica for one pool."""

    def __init__(self, pool: str) -> None:
        self._shared = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        self.registry = prometheus.CollectorRegistry()
        self._pool = pool
        self.policy = ""
        counter = partial(prometheus.Counter, registry=self.registry)
        histogram = partial(prometheus.Histogram, labelnames=("pool",), registry=self.registry)
        gauge = partial(prometheus.Gauge, labelnames=("pool",), registry=self.registry, multiprocess_mode="livesum")
        self._decisions = counter(
            "balancer_decisions_total",
            "Requests placed, by how it came about and by rank (empty where none was given).",
            ("pool", "policy", "rank", "outcome"),
        )
        self._requests = counter(
            "balancer_http_requests_total", "Requests answered, by class of status.", ("pool", "endpoint", "code")
        )
        self._retries = counter("balancer_retries_total", "Further tries, by reason.", ("pool", "reason"))
        self._ratio = prometheus.Histogram(
            "balancer_prompt_tokens_ratio",
            "Tokens booked for a prompt over those that the engine counted (1 is exact).",
            ("pool", "source"),
            buckets=_RATIO,
            registry=self.registry,
        )
        self._gone = counter("balancer_client_gone_total", "Clients that left before the end.", ("pool",))
        self._gone.labels(pool)
        self.fallback = gauge("balancer_falling_back", "Replicas that take Redis to be away.").labels(pool)
        self.connections = gauge("balancer_client_connections", "Open client connections.").labels(pool)
        self._in_flight = gauge("balancer_in_flight_requests", "Requests under way.").labels(pool)
        self.dispatch = histogram(
            "balancer_dispatch_seconds", "Time for a decision, Redis included.", buckets=_FAST
        ).labels(pool)
        self.first_byte = histogram(
            "balancer_first_byte_seconds", "From a request's last byte to its answer's first.", buckets=_FIRST
        ).labels(pool)
        self.duration = histogram(
            "balancer_stream_seconds", "From a request's last byte to its answer's last.", buckets=_SLOW
        ).labels(pool)
        self.in_flight = 0
        """Requests under way; whoever begins and ends one counts it."""
        self._events: Counter[tuple[Any, ...]] = Counter()
        self._values: list[tuple[prometheus.Histogram, float]] = []

    def observe(self, histogram: prometheus.Histogram, value: float) -> None:
        """A value for one of the histograms."""
        self._values.append((histogram, value))

    def decided(self, rank: str, outcome: str) -> None:
        """A decision has been made."""
        self._events[self._decisions, self.policy, rank, outcome] += 1

    def answered(self, endpoint: str, status: int) -> None:
        """A request has been answered; `endpoint` is one of ours, or `other`."""
        self._events[self._requests, endpoint, f"{status // 100}xx" if status else "none"] += 1

    def retried(self, reason: str) -> None:
        """Another try is made."""
        self._events[self._retries, reason] += 1

    def gone(self) -> None:
        """A client has left before the end."""
        self._events[(self._gone,)] += 1

    def counted(self, source: str, booked: int, actual: int) -> None:
        """The engine has told how many tokens a prompt had."""
        self.observe(self._ratio.labels(self._pool, source), booked / actual)

    def settle(self) -> None:
        """Tell the client library what has been noted."""
        self._in_flight.set(self.in_flight)
        for (family, *labels), number in self._events.items():
            family.labels(self._pool, *labels).inc(number)
        for histogram, value in self._values:
            histogram.observe(value)
        self._events.clear()
        self._values.clear()

    def text(self) -> bytes:
        """All samples, of all workers."""
        self.settle()
        registry = self.registry
        if self._shared:
            registry = prometheus.CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return prometheus.generate_latest(registry)
