"""Evaluation jobs over HTTP: what may be posted, and the report with its files."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import Kind
from cffa_core.storage.base import result_key
from services.api.access import Backend
from tests.api.driving import Worker, png, problem

NO_DATASET = "ds_" + "0" * 20
NO_JOB = "job_" + "0" * 20
FILES = {
    "report.json": json.dumps({"format": "cffa-evaluation/1", "pairs": {"pairs": 5}}).encode(),
    "report.md": b"# Evaluation of pairs\n",
    "pairs.png": png(1),
}


def other_dataset(backend: Backend) -> str:
    """A second data set of the same owner."""
    dataset_id = backend.store.new_id("ds")
    backend.store.add_dataset(
        "local", dataset_id=dataset_id, name="B", digest="1" * 64, pairs=3, report={}, stored=StoredFiles()
    )
    return dataset_id


def measure(worker: Worker) -> StoredFiles:
    """Claim the unit that measures and commit a report; the finalize unit is left."""
    claim = worker.claim(Kind.EVALUATION)
    stored = {
        name: worker.objects.put_bytes(result_key(claim.job_id, "evaluate", claim.attempt, name), data)
        for name, data in FILES.items()
    }
    worker.store.commit(claim, StoredFiles(stored), {"sets": {}})
    return StoredFiles(stored)


@pytest.fixture
def evaluation(client: TestClient, backend: Backend, dataset_id: str) -> str:
    """A queued evaluation of one data set against another."""
    body = {"pairs_dataset_id": dataset_id, "reference_dataset_id": other_dataset(backend)}
    response = client.post("/v1/evaluation-jobs", json=body)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


@pytest.fixture
def measured(worker: Worker, evaluation: str) -> str:
    """That evaluation, succeeded."""
    measure(worker)
    worker.store.commit(worker.claim(Kind.EVALUATION), StoredFiles(), {}, job_result={"files": 3})
    return evaluation


def test_a_posted_evaluation_of_generated_pairs_is_queued(
    client: TestClient, backend: Backend, worker: Worker, generation: str, dataset_id: str
) -> None:
    reference = other_dataset(backend)
    body = {"generation_job_id": generation, "reference_dataset_id": reference, "max_pairs": 50, "priority": 2}
    found = problem(client.post("/v1/evaluation-jobs", json=body), 422, "invalid_spec")
    assert [(item["pointer"], item["code"]) for item in found["errors"]] == [("/generation_job_id", "not_succeeded")]
    for _ in range(3):
        worker.make_part()
    worker.finish_job(worker.claim())
    response = client.post("/v1/evaluation-jobs", json=body, headers={"Idempotency-Key": "k"})
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["priority"], job["queue_position"]) == ("evaluation", "queued", 2, 1)
    assert job["links"]["report"] == f"/v1/jobs/{job['id']}/report"
    assert (job["spec"]["max_pairs"], job["spec"]["extractor"]) == (50, "filters")
    assert job["spec"]["train_dataset_id"] == dataset_id, "its model was trained on it"
    again = client.post("/v1/evaluation-jobs", json=body, headers={"Idempotency-Key": "k"})
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (job["id"], "true")
    other = client.post("/v1/evaluation-jobs", json=body | {"seed": 1}, headers={"Idempotency-Key": "k"})
    assert problem(other, 422, "idempotency_key_reused")
    assert [item["id"] for item in client.get("/v1/jobs", params={"kind": "evaluation"}).json()["items"]] == [job["id"]]


@pytest.mark.parametrize(
    ("change", "pointers"),
    [
        ({"max_pairs": 1}, ["/max_pairs"]),
        ({"extractor": "magic"}, ["/extractor"]),
        ({"extractor_model": "../secrets"}, ["/extractor_model"]),
        ({"base": "../secrets"}, ["/base"]),
        ({"reference_dataset_id": None}, ["/reference_dataset_id"]),
        ({"reference_dataset_id": "mine"}, ["/reference_dataset_id"]),
        ({"colour": "red"}, ["/colour"]),
        ({"kind": "training"}, ["/kind"]),
        ({"extractor": "vit"}, [""]),
        ({"extractor_model": "dinov2"}, [""]),
        ({"generation_job_id": NO_JOB}, [""]),
        ({"pairs_dataset_id": None}, [""]),
        ({"pairs_dataset_id": "ds_" + "1" * 20}, [""]),
        ({"train_dataset_id": "ds_" + "1" * 20}, [""]),
        ({}, ["/pairs_dataset_id", "/reference_dataset_id"]),
    ],
)
def test_impossible_evaluations(plain_client: TestClient, change: dict[str, Any], pointers: list[str]) -> None:
    body = {"pairs_dataset_id": NO_DATASET, "reference_dataset_id": "ds_" + "1" * 20} | change
    found = problem(plain_client.post("/v1/evaluation-jobs", json=body), 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == pointers


def test_there_is_no_report_before_the_job_has_succeeded(
    client: TestClient, worker: Worker, evaluation: str, generation: str
) -> None:
    path = f"/v1/jobs/{evaluation}/report"
    problem(client.get(path), 409, "conflict")
    measure(worker)
    assert client.get(f"/v1/jobs/{evaluation}").json()["state"] == "finalizing"
    for unfinished in (path, f"{path}/report.md"):
        problem(client.get(unfinished), 409, "conflict")
    client.post(f"/v1/jobs/{evaluation}:cancel")
    problem(client.get(path), 404, "not_found")
    problem(client.get(f"/v1/jobs/{generation}/report"), 409, "conflict")
    problem(client.get(f"/v1/jobs/{NO_JOB}/report"), 404, "not_found")
    problem(client.get(f"/v1/jobs/{evaluation}/pairs"), 409, "conflict")


def test_a_report_comes_with_all_its_files(client: TestClient, measured: str) -> None:
    found = client.get(f"/v1/jobs/{measured}/report").json()
    assert found["report"] == json.loads(FILES["report.json"])
    assert [file["name"] for file in found["files"]] == sorted(FILES)
    for file in found["files"]:
        data = FILES[file["name"]]
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert client.get(file["url"]).content == data


def test_a_file_is_shown_in_place(client: TestClient, measured: str) -> None:
    path = f"/v1/jobs/{measured}/report"
    for name, kind in (("pairs.png", "image/png"), ("report.md", "text/markdown"), ("report.json", "application/json")):
        answer = client.get(f"{path}/{name}")
        assert (answer.status_code, answer.content) == (200, FILES[name])
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-disposition"].startswith("inline")
        assert answer.headers["etag"] == f'"{hashlib.sha256(FILES[name]).hexdigest()}"'
    part = client.get(f"{path}/pairs.png", headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")
    assert client.head(f"{path}/pairs.png").headers["content-length"] == str(len(FILES["pairs.png"]))
    found = problem(client.get(f"{path}/other.png"), 404, "not_found")
    assert "pairs.png" in found["detail"]


def test_a_damaged_file_is_not_shown(client: TestClient, backend: Backend, measured: str) -> None:
    for key in backend.objects.list(f"jobs/{measured}/evaluate/"):
        path = backend.settings.objects_dir / key
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    for name in ("report", "report/pairs.png"):
        problem(client.get(f"/v1/jobs/{measured}/{name}"), 500, "corrupt_artifact")


def test_a_deleted_evaluation_leaves_no_file(client: TestClient, backend: Backend, measured: str) -> None:
    assert client.delete(f"/v1/jobs/{measured}").status_code == 204
    assert list(backend.objects.list(f"jobs/{measured}/")) == []
