"""Spans of requests, units, stages and stored objects belong to one trace; without an endpoint nothing happens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cffa_core import tracing
from cffa_core.errors import InvalidSettings
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store


@pytest.fixture
def spans(tmp_path: Path) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.configure(Settings(home=tmp_path), "test", exporter)
    yield exporter
    tracing.shut_down()


def test_without_an_endpoint_nothing_happens(tmp_path: Path) -> None:
    tracing.configure(Settings(home=tmp_path), "test")
    assert not tracing.active() and tracing.traceparent() is None
    stages = tracing.Stages()
    with tracing.span("outer", "no traceparent at all") as late:
        late["status"] = 1
        stages.enter("training")
        assert tracing.traceparent() is None
    stages.close()
    store = open_store(Settings(home=tmp_path))
    assert "put_bytes" not in vars(store)
    tracing.flush()
    tracing.shut_down()


def test_spans_of_several_processes_are_one_trace(spans: InMemorySpanExporter) -> None:
    with tracing.span("HTTP POST", request_id="r1") as late:
        carried = tracing.traceparent()
        late["status"] = 202
    with tracing.span("unit", carried, attempt=2, job_id=None):
        stages = tracing.Stages()
        for stage in ("loading", "training", "training", "storing"):
            stages.enter(stage)
        stages.close()
    request, loading, training, storing, unit = spans.get_finished_spans()
    assert [span.name for span in (loading, training, storing)] == ["stage loading", "stage training", "stage storing"]
    assert request.context is not None and unit.context is not None
    assert dict(request.attributes or {}) == {"cffa.request_id": "r1", "cffa.status": 202}
    assert dict(unit.attributes or {}) == {"cffa.attempt": 2}
    assert unit.parent is not None and unit.parent.span_id == request.context.span_id
    for stage in (loading, training, storing):
        assert stage.parent is not None and stage.parent.span_id == unit.context.span_id
    assert {span.context.trace_id for span in spans.get_finished_spans() if span.context} == {request.context.trace_id}


def test_stored_objects_are_spans_with_their_keys(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path))
    with tracing.span("unit"):
        info = store.put_bytes("jobs/a/x", b"x")
        store.fetch(info, tmp_path / "copy")
    found = [(span.name, (span.attributes or {}).get("cffa.key")) for span in spans.get_finished_spans()]
    assert ("object store put_bytes", "jobs/a/x") in found
    assert ("object store fetch", "jobs/a/x") in found


def test_a_failed_span_says_so(spans: InMemorySpanExporter) -> None:
    with pytest.raises(ValueError), tracing.span("unit"):
        raise ValueError("no")
    (unit,) = spans.get_finished_spans()
    assert not unit.status.is_ok and unit.events[0].name == "exception"


def test_an_endpoint_without_the_package_is_a_setting_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(InvalidSettings, match=r"cffa\[telemetry\]"):
        tracing.configure(Settings(home=tmp_path, otel_endpoint="http://collector:4318"), "test")
    assert not tracing.active()
