"""What one worker measures, and the small HTTP server that shows it to Prometheus. Knows no record and no broker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cffa_core.errors import InvalidSettings
from cffa_core.jobs.records import Claim
from cffa_core.jobs.state import UnitKind
from services.worker.live_unit import Outcome
from services.worker.protocol import Beat

STEP_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
"""Seconds: from a stage that counts files to a step of a large model without a GPU."""


class WorkerMetrics:
    """Counters of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._units = Counter(
            "cffa_worker_units", "Units that left this worker.", ["kind", "outcome"], registry=self._registry
        )
        self._parts = Counter("cffa_worker_parts", "Parts of generation and edit jobs made.", registry=self._registry)
        self._steps = Histogram(
            "cffa_worker_step_seconds",
            "Mean duration of a step within one report of the child (about two a second), by kind of job.",
            ["kind"],
            buckets=STEP_BUCKETS,
            registry=self._registry,
        )
        self._losses = Counter(
            "cffa_worker_lease_losses", "Units abandoned because the lease was or may be lost.", registry=self._registry
        )
        self._gpu_memory = Gauge(
            "cffa_worker_gpu_memory_bytes", "GPU memory that the child has reserved.", registry=self._registry
        )
        self._busy = Gauge("cffa_worker_busy", "1 while a unit is in hand.", registry=self._registry)
        self._last: tuple[Beat, float] | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around the work on one unit."""
        self._last = None
        self._busy.set(1)
        try:
            yield
        finally:
            self._busy.set(0)

    def heard(self, claim: Claim, beat: Beat) -> None:
        """A report of the child. Steps are timed within one stage: loading says nothing about sampling."""
        now = time.monotonic()
        self._gpu_memory.set(beat.gpu_memory)
        if self._last is not None:
            before, then = self._last
            if beat.stage == before.stage and beat.steps > before.steps:
                self._steps.labels(claim.spec.kind.value).observe((now - then) / (beat.steps - before.steps))
        self._last = (beat, now)

    def ended(self, claim: Claim, outcome: Outcome) -> None:
        """What became of a unit."""
        self._units.labels(claim.spec.kind.value, outcome.kind).inc()
        if outcome.kind == "done" and claim.kind is UnitKind.PART:
            self._parts.inc()
        if outcome.kind == "lost":
            self._losses.inc()

    def child_gone(self) -> None:
        """The child ended, and what it held on the GPU with it."""
        self._gpu_memory.set(0)

    @contextlib.contextmanager
    def served(self, host: str, port: int) -> Iterator[None]:
        """Serve ``/metrics`` on a thread meanwhile; port 0 serves nothing. :class:`InvalidSettings` if it is taken."""
        if port == 0:
            yield
            return
        try:
            server: WSGIServer
            server, thread = start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise InvalidSettings(f"metrics cannot be served on {host}:{port} (CFFA_METRICS_PORT): {error}") from error
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
