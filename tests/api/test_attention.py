"""Attention jobs over HTTP: what may be posted, and their report under the addresses that every report has."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.schema import jobs
from cffa_core.jobs.spec import Kind
from services.api import reports
from services.api.access import Backend
from tests.api.driving import Worker, png, problem

FILES = {
    "report.json": json.dumps({"format": "cffa-attention/1"}).encode(),
    "report.md": b"# Attention\n\n![vessels](overlays/cf vessels.png)\n",
    "overlays/cf vessels.png": png(1),
    "maps.safetensors": b"\x00" * 64,
}


@pytest.fixture
def captured(client: TestClient, worker: Worker, model_id: str) -> str:
    """A succeeded attention job."""
    answer = client.post("/v1/attention-jobs", json={"model_id": model_id})
    assert answer.status_code == 202, answer.text
    return worker.compute(Kind.ATTENTION, FILES)


def test_a_posted_attention_job_is_queued_once(client: TestClient, model_id: str) -> None:
    body = {"model_id": model_id, "index": 3, "tokens": ["vessels"], "priority": 2}
    answer = client.post("/v1/attention-jobs", json=body, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["priority"], job["queue_position"]) == ("attention", "queued", 2, 1)
    assert job["links"]["report"] == f"/v1/jobs/{job['id']}/report"
    again = client.post("/v1/attention-jobs", json=body, headers={"Idempotency-Key": "k"})
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (job["id"], "true")
    other = client.post("/v1/attention-jobs", json=body | {"seed": 1}, headers={"Idempotency-Key": "k"})
    assert problem(other, 422, "idempotency_key_reused")
    for query in ({"kind": "attention"}, {"model_id": model_id, "state": "queued"}):
        assert [item["id"] for item in client.get("/v1/jobs", params=query).json()["items"]] == [job["id"]]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"model_id": None}, "/model_id"),
        ({"model_id": "mdl_" + "0" * 20}, "/model_id"),
        ({"kinds": []}, ""),
        ({"kinds": ["cross", "cross"]}, ""),
        ({"places": ["top"]}, "/places/0"),
        ({"tokens": []}, "/tokens"),
        ({"points": []}, "/points"),
        ({"steps": [50]}, ""),
        ({"map_resolution": 2}, "/map_resolution"),
        ({"colour": "red"}, "/colour"),
    ],
)
def test_impossible_attention_jobs(plain_client: TestClient, change: dict[str, Any], pointer: str) -> None:
    body = {"model_id": "mdl_" + "1" * 20} | change
    found = problem(plain_client.post("/v1/attention-jobs", json=body), 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == [pointer]


def test_a_model_that_draws_on_structures_needs_some_and_no_other_takes_any(client: TestClient, model_id: str) -> None:
    found = problem(
        client.post("/v1/attention-jobs", json={"model_id": model_id, "structures": "procedural"}), 422, "invalid_spec"
    )
    assert [(item["pointer"], item["code"]) for item in found["errors"]] == [("/structures", "structures")]


def test_the_report_has_files_in_folders(client: TestClient, captured: str) -> None:
    path = f"/v1/jobs/{captured}/report"
    found = client.get(path).json()
    assert found["report"] == {"format": "cffa-attention/1"}
    assert [file["name"] for file in found["files"]] == sorted(FILES)
    for name, kind in (("overlays/cf%20vessels.png", "image/png"), ("maps.safetensors", "application/octet-stream")):
        answer = client.get(f"{path}/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert client.get(f"{path}/overlays%2Fcf%20vessels.png").content == FILES["overlays/cf vessels.png"]
    problem(client.get(f"{path}/overlays"), 404, "not_found")
    problem(client.get(f"/v1/jobs/{captured}/pairs"), 409, "conflict")


def test_a_large_file_is_not_read_into_memory_to_be_shown(
    client: TestClient, captured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MAX_SHOWN", 63)
    path = f"/v1/jobs/{captured}/report"
    found = problem(client.get(f"{path}/maps.safetensors"), 409, "conflict")
    assert "by its link" in found["detail"]
    link = next(file["url"] for file in client.get(path).json()["files"] if file["name"] == "maps.safetensors")
    assert client.get(link).content == FILES["maps.safetensors"]


def test_a_deleted_job_leaves_no_file(client: TestClient, backend: Backend, captured: str) -> None:
    assert client.delete(f"/v1/jobs/{captured}").status_code == 204
    assert list(backend.objects.list(f"jobs/{captured}/")) == []


def test_an_expired_report_is_gone(client: TestClient, backend: Backend, captured: str) -> None:
    over = jobs.update().where(jobs.c.id == captured).values(expires_at=1.0)
    backend.store._db.write(lambda connection: connection.execute(over))
    end = time.monotonic() + 20
    while list(backend.objects.list(f"jobs/{captured}/")):  # the service itself removes them
        assert time.monotonic() < end
        time.sleep(0.05)
    for path in ("report", "report/report.md", "report/overlays/cf%20vessels.png"):
        problem(client.get(f"/v1/jobs/{captured}/{path}"), 410, "expired")
