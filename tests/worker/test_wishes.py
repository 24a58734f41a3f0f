"""A training that is asked for something while it runs, from the record to the recipe and back; and what can be seen
of that from outside: lines and spans of the worker's process and of its child's."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from PIL import Image

from cffa_core import tracing
from cffa_core.jobs.records import Job
from cffa_core.jobs.state import JobState
from tests.worker.world import OWNER, World

STEPS = 4000
EVER = {"steps": STEPS, "checkpoint_every": STEPS, "preview_every": STEPS, "validate_every": STEPS}


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Address of an OTLP collector on loopback, and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def posted_in_a_trace(world: World) -> tuple[Job, bytes]:
    """A training, posted inside a span; and the id of its trace."""
    spans = InMemorySpanExporter()
    tracing.configure(world.settings, "test", spans)
    try:
        with tracing.span("HTTP POST"):
            job = world.training(world.add_dataset(), **EVER)
    finally:
        tracing.shut_down()
    (span,) = (span for span in spans.get_finished_spans() if span.name == "HTTP POST")
    assert span.context is not None
    return job, span.context.trace_id.to_bytes(16, "big")


def test_a_running_training_does_what_it_is_asked_for(tmp_path: Path, models_dir: Path) -> None:
    with collector() as (endpoint, received):
        world = World(tmp_path / "home", models_dir, log_format="json", otel_endpoint=endpoint)
        job, trace_id = posted_in_a_trace(world)
        command = [sys.executable, "-m", "services.worker"]
        with (tmp_path / "log").open("wb") as log:
            worker = subprocess.Popen(command, env=world.environment, stderr=log, start_new_session=True)
            world.workers.append(worker)
            try:
                world.wait(lambda: world.job(job.id).progress.stage == "training", 180, "the first step")
                world.store.ask(OWNER, job.id, "checkpoint")
                world.store.ask(OWNER, job.id, "sample")
                world.wait(lambda: not world.job(job.id).wishes, 180, "the end of the wishes")
                assert world.job(job.id).state is JobState.RUNNING
                world.store.cancel_job(OWNER, job.id)
                world.wait_terminal(job.id)
                worker.terminate()
                assert worker.wait(60) == 0
                fulfilled = [wish for data in world.events(job.id, "checkpoint") for wish in data["fulfilled"]]
                last = world.store.checkpoints(OWNER, job.id)[-1]
                sheet = world.objects.get_bytes(last.stored.files["sample/sheet.png"].key)
            finally:
                world.close()
    assert sorted(fulfilled) == ["checkpoint", "sample"]
    assert 0 < last.step < STEPS
    assert Image.open(io.BytesIO(sheet)).size[1] == 160

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    about = [line for line in lines if line.get("job_id") == job.id]
    assert about and all(line["unit"] == "train 0" and line["attempt"] == 1 and line["worker"] for line in about)

    spans = [
        (resource.resource.attributes[i].value.string_value, span)
        for request in received
        for resource in request.resource_spans
        for i in range(len(resource.resource.attributes))
        if resource.resource.attributes[i].key == "service.name"
        for scope in resource.scope_spans
        for span in scope.spans
        if span.trace_id == trace_id
    ]
    names = {(service, span.name) for service, span in spans}
    assert {("cffa-worker", "unit"), ("cffa-child", "compute"), ("cffa-child", "stage training")} <= names
    assert ("cffa-child", "object store put_file") in names
