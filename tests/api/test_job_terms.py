"""Deadlines, retention, wishes and filters over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.schema import jobs
from cffa_core.jobs.spec import Kind
from cffa_core.storage.base import checkpoint_key
from services.api.access import Backend
from tests.api.driving import Worker, problem


def until(client: TestClient, job_id: str, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Poll a job; the server's own sweep brings the change."""
    end = time.monotonic() + 20.0
    while not what(job := client.get(f"/v1/jobs/{job_id}").json()):
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return dict(job)


def post(client: TestClient, model_id: str, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/generation-jobs", json={"model_id": model_id, "count": 2, "part_size": 2, **body})
    assert response.status_code == 202, response.text
    return dict(response.json())


def test_a_missed_deadline_fails_the_job(client: TestClient, model_id: str) -> None:
    job = post(client, model_id, deadline_seconds=0.3)
    assert job["deadline_at"] is not None and job["expires_at"] is None
    failed = until(client, job["id"], lambda found: found["state"] == "failed")
    assert failed["error"]["code"] == "deadline_exceeded"
    retried = client.post(f"/v1/jobs/{job['id']}:retry").json()
    assert (retried["state"], retried["deadline_at"]) == ("queued", None)


def test_terms_are_checked_when_they_are_posted(client: TestClient, model_id: str) -> None:
    body = {"model_id": model_id, "count": 2}
    past = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    for wrong, pointer in (
        ({"deadline_seconds": 0}, "/deadline_seconds"),
        ({"deadline_at": past}, "/deadline_at"),
        ({"deadline_at": "2026-12-01T12:00:00"}, "/deadline_at"),
        ({"deadline_at": 1795262400}, "/deadline_at"),
        ({"deadline_at": "1795262400"}, "/deadline_at"),
        ({"retention_days": -1}, "/retention_days"),
    ):
        found = problem(client.post("/v1/generation-jobs", json={**body, **wrong}), 422, "invalid_spec")
        assert [item["pointer"] for item in found["errors"]] == [pointer]


def test_expired_products_are_gone_and_the_job_is_not(
    client: TestClient, backend: Backend, worker: Worker, model_id: str
) -> None:
    job_id = post(client, model_id, retention_days=1)["id"]
    worker.make_part()
    worker.make_part()
    done = client.get(f"/v1/jobs/{job_id}").json()
    kept = datetime.fromisoformat(done["expires_at"]) - datetime.fromisoformat(done["entered"]["succeeded"])
    assert kept == timedelta(days=1)
    assert client.get(f"/v1/jobs/{job_id}/archives/all").status_code == 200
    over = jobs.update().where(jobs.c.id == job_id).values(expires_at=1.0)
    backend.store._db.write(lambda connection: connection.execute(over))
    until(client, job_id, lambda found: found["state"] == "expired")
    for path in ("pairs", "pairs/0", "pairs/0/cf.png", "archives", "archives/0", "archives/all"):
        problem(client.get(f"/v1/jobs/{job_id}/{path}"), 410, "expired")
    problem(client.post(f"/v1/jobs/{job_id}:retry"), 410, "expired")
    dataset = client.get("/v1/datasets").json()["items"][0]["id"]
    evaluation = {"generation_job_id": job_id, "reference_dataset_id": dataset}
    refused = problem(client.post("/v1/evaluation-jobs", json=evaluation), 422, "invalid_spec")
    assert refused["errors"][0]["code"] == "expired"
    assert client.get(f"/v1/jobs/{job_id}/events").json()["items"][-1]["data"]["after"] == "expired"
    assert not list(backend.objects.list(f"jobs/{job_id}/"))
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204


def test_an_expired_training_has_no_checkpoints_and_its_model_stays(
    client: TestClient, backend: Backend, model_id: str
) -> None:
    (job,) = client.get("/v1/jobs", params={"kind": "training"}).json()["items"]
    assert client.get(f"/v1/jobs/{job['id']}/checkpoints").status_code == 200
    over = jobs.update().where(jobs.c.id == job["id"]).values(expires_at=1.0)
    backend.store._db.write(lambda connection: connection.execute(over))
    until(client, job["id"], lambda found: found["state"] == "expired")
    problem(client.get(f"/v1/jobs/{job['id']}/checkpoints"), 410, "expired")
    problem(client.get(f"/v1/jobs/{job['id']}/previews"), 410, "expired")
    (file,) = client.get(f"/v1/models/{model_id}").json()["files"]
    assert client.get(file["url"]).status_code == 200


def test_a_running_training_is_asked_and_shows_what_it_drew(
    client: TestClient, backend: Backend, worker: Worker, dataset_id: str
) -> None:
    job_id = client.post("/v1/training-jobs", json={"dataset_id": dataset_id, "steps": 9}).json()["id"]
    problem(client.post(f"/v1/jobs/{job_id}:sample"), 409, "conflict")
    claim = worker.claim(Kind.TRAINING)
    for verb in ("sample", "sample", "checkpoint"):
        asked = client.post(f"/v1/jobs/{job_id}:{verb}")
        assert asked.status_code == 202, asked.text
    assert asked.json()["wishes"] == ["checkpoint", "sample"]
    names = ("step_000002_random_pairs/sheet.png", "sample/sheet.png", "sample/cf/000000.png", "state.json")
    stored = {name: backend.objects.put_bytes(checkpoint_key(job_id, 3, 1, name), name.encode()) for name in names}
    backend.store.add_checkpoint(claim, 3, StoredFiles(stored))
    assert client.get(f"/v1/jobs/{job_id}").json()["wishes"] == []
    drawn = client.get(f"/v1/jobs/{job_id}/previews").json()["items"]
    shown = [(item["step"], item["asked"], [file["name"] for file in item["files"]]) for item in drawn]
    assert shown == [(2, False, ["sheet.png"]), (3, True, ["cf/000000.png", "sheet.png"])]
    assert client.get(drawn[1]["files"][1]["url"]).content == b"sample/sheet.png"


@pytest.mark.parametrize("verb", ["checkpoint", "sample"])
def test_only_a_training_can_be_asked(client: TestClient, generation: str, verb: str) -> None:
    problem(client.post(f"/v1/jobs/{generation}:{verb}"), 409, "conflict")
    problem(client.post(f"/v1/jobs/job_{'0' * 20}:{verb}"), 404, "not_found")
    problem(client.get(f"/v1/jobs/{generation}/previews"), 409, "conflict")


def test_jobs_are_found_by_time_model_and_data_set(client: TestClient, model_id: str, dataset_id: str) -> None:
    job = post(client, model_id)

    def found(**query: str) -> list[str]:
        response = client.get("/v1/jobs", params=query)
        assert response.status_code == 200, response.text
        return [item["kind"] for item in response.json()["items"]]

    assert found(model_id=model_id) == ["generation"]
    assert found(dataset_id=dataset_id) == ["training"]
    assert found(created_after=job["created_at"]) == ["generation"]
    assert found(created_before=job["created_at"]) == ["training"]
    problem(client.get("/v1/jobs", params={"created_after": "yesterday"}), 422, "invalid_spec")
