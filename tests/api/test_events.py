"""A job's history: pages, the live stream and its replay, metrics, checkpoints."""

from __future__ import annotations

import json
import threading
from typing import Any

from fastapi.testclient import TestClient

from services.api.access import Backend
from tests.api.driving import Worker, problem

STREAM = {"Accept": "text/event-stream"}


def messages(text: str) -> list[dict[str, Any]]:
    """Parse an event stream as the HTML standard says: blank lines end messages, a leading colon is a comment."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            found.append(fields)
    return found


def test_events_are_paged_in_order(client: TestClient, generation: str) -> None:
    for verb in ("pause", "resume", "cancel"):
        client.post(f"/v1/jobs/{generation}:{verb}")
    path = f"/v1/jobs/{generation}/events"
    whole = client.get(path).json()
    assert whole["next_after"] is None
    assert [event["seq"] for event in whole["items"]] == list(range(1, len(whole["items"]) + 1))
    assert len(whole["items"]) >= 4
    first = client.get(path, params={"page_size": 2}).json()
    rest = client.get(path, params={"after": first["next_after"]}).json()
    assert first["items"] + rest["items"] == whole["items"]


def test_a_stream_of_a_finished_job_replays_everything_and_ends(client: TestClient, generation: str) -> None:
    client.post(f"/v1/jobs/{generation}:cancel")
    path = f"/v1/jobs/{generation}/events"
    listed = client.get(path).json()["items"]
    answer = client.get(path, headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = messages(answer.text)
    assert [json.loads(message["data"]) for message in found] == listed
    assert [message["id"] for message in found] == [str(event["seq"]) for event in listed]
    assert [message["event"] for message in found] == [event["type"] for event in listed]


def test_last_event_id_replays_only_what_was_missed(client: TestClient, generation: str) -> None:
    client.post(f"/v1/jobs/{generation}:cancel")
    path = f"/v1/jobs/{generation}/events"
    everything = messages(client.get(path, headers=STREAM).text)
    missed = messages(client.get(path, headers=STREAM | {"Last-Event-ID": everything[0]["id"]}).text)
    assert missed == everything[1:]
    done = client.get(path, headers=STREAM | {"Last-Event-ID": everything[-1]["id"]})
    assert (done.status_code, done.content) == (204, b"")


def test_after_an_event_that_never_was_everything_is_replayed(client: TestClient, generation: str) -> None:
    """The record was restored from a backup: it has fewer events than a client has seen."""
    client.post(f"/v1/jobs/{generation}:cancel")
    path = f"/v1/jobs/{generation}/events"
    everything = messages(client.get(path, headers=STREAM).text)
    assert messages(client.get(path, headers=STREAM | {"Last-Event-ID": "9999"}).text) == everything


def test_a_stream_follows_the_job_until_it_ends(client: TestClient, backend: Backend, generation: str) -> None:
    ending = threading.Timer(0.6, lambda: backend.store.cancel_job("local", generation))
    ending.start()
    found = messages(client.get(f"/v1/jobs/{generation}/events", headers=STREAM).text)
    ending.join()
    listed = client.get(f"/v1/jobs/{generation}/events").json()["items"]
    assert [json.loads(message["data"]) for message in found] == listed
    assert len(listed) >= 2


def test_a_stream_ends_when_the_server_stops(client: TestClient, backend: Backend, generation: str) -> None:
    threading.Timer(0.4, backend.stopping.set).start()
    answer = client.get(f"/v1/jobs/{generation}/events", headers=STREAM)
    assert answer.status_code == 200
    assert client.get(f"/v1/jobs/{generation}").json()["state"] == "queued"


def test_events_of_unknown_jobs(client: TestClient) -> None:
    path = "/v1/jobs/job_00000000000000000000/events"
    problem(client.get(path), 404, "not_found")
    problem(client.get(path, headers=STREAM), 404, "not_found")


def test_metrics_by_key_and_step(client: TestClient, model_id: str) -> None:
    job = client.get(f"/v1/models/{model_id}").json()["job_id"]
    path = f"/v1/jobs/{job}/metrics"
    whole = client.get(path).json()
    assert whole["items"] == [
        {"step": 1, "values": {"loss_cf": 0.9, "loss_fa": 0.8}},
        {"step": 2, "values": {"loss_cf": 0.7, "loss_fa": 0.6}},
    ]
    assert client.get(path, params={"key": "loss_fa", "since_step": 2}).json()["items"] == [
        {"step": 2, "values": {"loss_fa": 0.6}}
    ]
    newer = client.get(path, params={"since_step": whole["next_since_step"]}).json()
    assert newer == {"items": [], "next_since_step": 3}


def test_checkpoints(client: TestClient, worker: Worker, model_id: str) -> None:
    job = client.get(f"/v1/models/{model_id}").json()["job_id"]
    items = client.get(f"/v1/jobs/{job}/checkpoints").json()["items"]
    assert [(item["step"], item["files"], item["bytes"]) for item in items] == [(2, 1, 23)]
