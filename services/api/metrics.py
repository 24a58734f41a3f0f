"""``GET /metrics`` in Prometheus' text format: the load of the whole service, and this process's answers.

Load comes from the record, so that every API replica says the same (take one of them, not the sum); it names no ids.
Answers are counted here by the template of their route, never by path. What a worker measures it serves itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cffa_core.jobs.records import Load
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.store import JobStore
from cffa_core.webhooks.due import Ending
from cffa_core.webhooks.records import Backlog
from cffa_core.webhooks.store import Webhooks
from services.api.access import TheBackend
from services.api.problems import Answers, documented

REUSE_SECONDS = 1.0
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})
# Long polls and event streams are answers that are held on purpose: they land in the upper buckets of their routes.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
router = APIRouter(tags=["service"])
_TEXT: Answers = {
    200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


class Measured:
    """What one API process measures; safe to use from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "cffa_api_requests", "Answers by route.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "cffa_api_request_seconds",
            "Seconds until an answer was sent whole.",
            ["route"],
            registry=self._registry,
            buckets=BUCKETS,
        )
        self._sent = Counter(
            "cffa_webhook_tries",
            "Tries of web hook deliveries by what came of them.",
            ["ending"],
            registry=self._registry,
        )
        self._lock = threading.Lock()
        self._load: tuple[float, Load, Backlog] | None = None

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer; ``route`` is a template, since paths would be a new series each."""
        self._answers.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def sent(self, ending: Ending) -> None:
        """Count one try of a web hook's delivery."""
        self._sent.labels(ending).inc()

    def text(self, store: JobStore, hooks: Webhooks) -> bytes:
        """The whole page. The record is asked at most once a second, however many ask here."""
        with self._lock:
            if self._load is None or time.monotonic() - self._load[0] > REUSE_SECONDS:
                self._load = (time.monotonic(), store.load(), hooks.backlog())
            _, load, backlog = self._load
        shown = CollectorRegistry()
        shown.register(_Shown(load, backlog))
        return generate_latest(shown) + generate_latest(self._registry)


class _Shown(Collector):
    """The gauges of one look at the record."""

    def __init__(self, load: Load, backlog: Backlog) -> None:
        self._seen = load
        self._backlog = backlog

    def collect(self) -> Iterator[Metric]:
        seen = self._seen
        jobs = GaugeMetricFamily("cffa_jobs", "Jobs by kind and state.", labels=["kind", "state"])
        for (kind, job_state), number in seen.jobs.items():
            jobs.add_metric([kind, job_state], number)
        units = GaugeMetricFamily("cffa_units", "Units that wait or are worked on.", labels=["kind", "state"])
        load = GaugeMetricFamily("cffa_queue_load", "Units that wait or are worked on, in all.", labels=["kind"])
        age = GaugeMetricFamily("cffa_queue_age_seconds", "Age of the unit that waits longest.", labels=["kind"])
        for (kind, unit_state), number in seen.units.items():
            units.add_metric([kind, unit_state], number)
        for kind in Kind:
            load.add_metric([kind], sum(number for (of, _), number in seen.units.items() if of is kind))
            age.add_metric([kind], seen.oldest_seconds.get(kind, 0.0))
        workers = GaugeMetricFamily("cffa_workers", "Workers heard of within the last minute.", value=seen.workers)
        yield from (jobs, units, load, age, workers)
        hooks = GaugeMetricFamily("cffa_webhook_deliveries", "Deliveries that are not over.", labels=["state"])
        hooks.add_metric(["waiting"], self._backlog.waiting)
        hooks.add_metric(["sending"], self._backlog.sending)
        yield hooks
        late = "By how much the delivery that is due longest is late: nothing sends if this grows."
        yield GaugeMetricFamily("cffa_webhook_late_seconds", late, value=self._backlog.late_seconds)


@router.get(
    "/metrics",
    operation_id="getMetrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=_TEXT | documented(503),
)
def get_metrics(request: Request, backend: TheBackend) -> Response:
    """Jobs and units by state, age and load of the queues, live workers; answers of this process by route. Needs no
    key and names no ids."""
    measured: Measured = request.app.state.measured
    return Response(measured.text(backend.store, backend.hooks), media_type=CONTENT_TYPE_LATEST)
