"""A request's id is in its log lines and in the events it causes; its trace is remembered with the job it posts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cffa_core import logs, tracing
from cffa_core.settings import Settings

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kept(logging.Handler):
    """Formats where a real handler would: on the thread that logs."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.setFormatter(logs.formatter(settings))
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


def test_the_id_of_a_request_is_in_every_line_and_in_the_job_s_history(
    client: TestClient, dataset_id: str, tmp_path: Path
) -> None:
    kept = Kept(Settings(home=tmp_path, log_format="json"))
    root = logging.getLogger("cffa")
    root.addHandler(kept)
    root.setLevel(logging.INFO)
    try:
        body = {"dataset_id": dataset_id, "steps": 2}
        answer = client.post("/v1/training-jobs", json=body, headers={"X-Request-ID": "from-a-proxy.1"})
        job_id = answer.json()["id"]
        client.post(f"/v1/jobs/{job_id}:cancel", headers={"X-Request-ID": "evil\nid"})
    finally:
        root.removeHandler(kept)
        root.setLevel(logging.NOTSET)
    assert answer.headers["X-Request-ID"] == "from-a-proxy.1"
    posted, canceled = (line for line in kept.lines if line["logger"] == "cffa.api.access")
    assert (posted["request_id"], posted["path"], posted["status"]) == ("from-a-proxy.1", "/v1/training-jobs", 202)
    assert canceled["job_id"] == job_id and canceled["request_id"] != "evil\nid"
    events = client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert [event["data"]["request_id"] for event in events] == ["from-a-proxy.1", canceled["request_id"]]


def test_a_job_remembers_the_trace_it_was_posted_in(client: TestClient, dataset_id: str, tmp_path: Path) -> None:
    spans = InMemorySpanExporter()
    tracing.configure(Settings(home=tmp_path), "test", spans)
    try:
        body = {"dataset_id": dataset_id, "steps": 2}
        job_id = client.post("/v1/training-jobs", json=body, headers={"traceparent": TRACE}).json()["id"]
    finally:
        tracing.shut_down()
    (request,) = (span for span in spans.get_finished_spans() if span.name == "HTTP POST")
    assert request.attributes is not None and request.context is not None
    assert request.attributes["cffa.route"] == "/v1/training-jobs" and request.attributes["cffa.status"] == 202
    created = client.get(f"/v1/jobs/{job_id}/events").json()["items"][0]["data"]
    version, trace_id, span_id, _ = created["traceparent"].split("-")
    assert (version, trace_id, int(span_id, 16)) == ("00", TRACE.split("-")[1], request.context.span_id)
