"""Traces for an OpenTelemetry collector, if there is one: spans of requests, units of jobs, stages, stored objects.

Off unless ``CFFA_OTEL_ENDPOINT`` is set; then the extra ``telemetry`` must be installed. A job remembers the trace of
the request that posted it (``traceparent`` of its event ``created``), so that the work of days later belongs to it.
Without an endpoint nothing is imported and every function here does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cffa_core.errors import InvalidSettings
from cffa_core.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

T = TypeVar("T")
FLUSH_SECONDS = 3.0
STORE_METHODS = ("put_file", "put_stream", "put_bytes", "get_bytes", "open", "fetch", "delete")
_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def configure(settings: Settings, service: str, exporter: SpanExporter | None = None) -> None:
    """Send spans of this process, named ``service``, to the settings' endpoint (or to ``exporter``); once per process.

    Raises :class:`InvalidSettings` if there is an endpoint and OpenTelemetry is not installed.
    """
    global _provider, _tracer
    if not settings.otel_endpoint and exporter is None:
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise InvalidSettings(
            f"CFFA_OTEL_ENDPOINT is set and OpenTelemetry is not installed ({error.name}); install cffa[telemetry], or "
            "leave it empty"
        ) from error
    _provider = TracerProvider(resource=Resource.create({"service.name": service}))
    if exporter is None:
        endpoint = f"{settings.otel_endpoint.rstrip('/')}/v1/traces"
        _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    else:
        _provider.add_span_processor(SimpleSpanProcessor(exporter))
    _tracer = _provider.get_tracer("cffa")


def active() -> bool:
    """Whether spans are sent anywhere."""
    return _tracer is not None


@contextmanager
def span(name: str, parent: str | None = None, **attributes: Any) -> Iterator[dict[str, Any]]:
    """A span around what happens inside; ``parent`` is a ``traceparent`` from elsewhere (default: the span outside).

    Yields attributes that may be added to until it ends.
    """
    if _tracer is None:
        yield {}
        return
    late: dict[str, Any] = {}
    with _tracer.start_as_current_span(name, context=_context(parent), attributes=_plain(attributes)) as current:
        try:
            yield late
        finally:
            current.set_attributes(_plain(late))


def traceparent() -> str | None:
    """The current span in the form of W3C Trace Context, to be its children's ``parent`` elsewhere."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


class Stages:
    """Spans of the stages that a recipe goes through, one after the other, below the span that is current."""

    def __init__(self) -> None:
        self._name = ""
        self._span: Span | None = None

    def enter(self, name: str) -> None:
        """The stage that is reported now; a span begins when it is another than before."""
        if _tracer is None or name == self._name:
            return
        self.close()
        self._name = name
        self._span = _tracer.start_span(f"stage {name}")

    def close(self) -> None:
        """End the last stage."""
        if self._span is not None:
            self._span.end()
        self._name, self._span = "", None


def traced(store: T) -> T:
    """An object store whose reads and writes are spans; the store itself if nobody listens."""
    if _tracer is None:
        return store
    for name in STORE_METHODS:
        setattr(store, name, _spanning(name, getattr(store, name)))
    return store


def flush() -> None:
    """Send what is kept, within some seconds: this process may be killed soon."""
    if _provider is not None:
        _provider.force_flush(int(FLUSH_SECONDS * 1000))


def shut_down() -> None:
    """Send what is kept and stop tracing."""
    global _provider, _tracer
    if _provider is not None:
        flush()
        _provider.shutdown()
    _provider = _tracer = None


def _spanning(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        about = args[0] if args else kwargs.get("key", kwargs.get("info", ""))
        with span(f"object store {name}", key=str(getattr(about, "key", about))):
            return method(*args, **kwargs)

    return call


def _context(parent: str | None) -> Any:
    """The context that a ``traceparent`` stands for; None, the current one, for none."""
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as OpenTelemetry takes them, named ``cffa.*``."""
    return {
        f"cffa.{name}": value if isinstance(value, bool | int | float) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
