"""Exports over HTTP: posted, watched, listed, downloaded in ranges, refused; the work is that of a real worker."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import Kind
from services.api.access import Backend
from services.worker import loop
from tests.api.driving import Worker, png, problem
from tests.worker.world import running_worker

FILES = [
    {"name": "pairs-000000.tar", "pairs": 2, "size": 3, "sha256": "ab" * 32},
    {"name": "pairs-000001.tar", "pairs": 1, "size": 3, "sha256": "cd" * 32},
]


@pytest.fixture
def half(client: TestClient, worker: Worker, generation: str) -> str:
    """A running job of 5 pairs of which 0 to 3 are made."""
    for _ in range(2):
        worker.make_part()
    return generation


@pytest.fixture
def exporting(backend: Backend) -> Iterator[None]:
    """A real worker that takes exports, and leaves the generation job alone."""
    with running_worker(loop.Worker(backend.settings, kinds=[Kind.EXPORT])):
        yield


def post(client: TestClient, job_id: str, **body: Any) -> str:
    answer = client.post(f"/v1/jobs/{job_id}/exports", json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return str(job["id"])


def finished(client: TestClient, job_id: str) -> dict[str, Any]:
    end = time.monotonic() + 90
    while not (job := client.get(f"/v1/jobs/{job_id}").json())["terminal"]:
        assert time.monotonic() < end, job
        time.sleep(0.1)
    return dict(job)


@pytest.mark.usefixtures("exporting")
def test_a_running_job_is_exported_and_downloaded_in_ranges(client: TestClient, half: str) -> None:
    job = finished(client, post(client, half, form="webdataset", shard_size=3))
    assert (job["kind"], job["state"], job["error"]) == ("export", "succeeded", None)
    assert (job["result"]["pairs"], job["result"]["files"]) == (4, 2)
    listed = client.get(job["links"]["archives"]).json()
    assert [(part["number"], part["filename"], part["pairs"]) for part in listed["parts"]] == [
        (0, "pairs-000000.tar", 3),
        (1, "pairs-000001.tar", 1),
    ]
    assert (listed["whole"], listed["next_page_token"]) == (None, None)
    shard = client.get(f"/v1/jobs/{job['id']}/archives/0").json()
    whole = client.get(shard["url"])
    assert hashlib.sha256(whole.content).hexdigest() == shard["sha256"] == listed["parts"][0]["sha256"]
    assert 'filename="pairs-000000.tar"' in whole.headers["content-disposition"]
    # Broken off and gone on with, as the client does.
    begin = client.get(shard["url"], headers={"Range": "bytes=0-9999"})
    rest = client.get(shard["url"], headers={"Range": "bytes=10000-"})
    assert (begin.status_code, rest.status_code) == (206, 206)
    assert begin.content + rest.content == whole.content
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as tar:
        image = tar.extractfile("000002.fa.png")
        assert image is not None and image.read() == png(2, colour=False)
    manifest = client.get(listed["manifest"]["url"])
    assert hashlib.sha256(manifest.content).hexdigest() == job["result"]["manifest"]["sha256"]
    assert [file["sha256"] for file in manifest.json()["files"]] == [part["sha256"] for part in listed["parts"]]


@pytest.mark.usefixtures("exporting")
def test_old_archives_have_no_scores_to_select_by(client: TestClient, half: str) -> None:
    job = finished(client, post(client, half, selection={"min_alignment": 0.1}))
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid_spec")
    assert "no recorded ridge_correlation" in job["error"]["message"]
    problem(client.get(f"/v1/jobs/{job['id']}/archives/0"), 404, "not_found")


def test_the_stored_spec_names_the_finished_parts(client: TestClient, half: str) -> None:
    job = client.get(f"/v1/jobs/{post(client, half, form='dicom', selection={'last': 1})}").json()
    assert job["spec"]["parts"] == [[0, 0]] and job["spec"]["generation_job_id"] == half
    assert (job["state"], job["queue_position"], job["links"]["archives"]) == (
        "queued",
        1,
        f"/v1/jobs/{job['id']}/archives",
    )
    assert [item["id"] for item in client.get("/v1/jobs", params={"kind": "export"}).json()["items"]] == [job["id"]]


def test_the_same_key_makes_one_export(client: TestClient, half: str) -> None:
    first, again, other = (
        client.post(f"/v1/jobs/{half}/exports", json={"form": form}, headers={"Idempotency-Key": "k"})
        for form in ("zip", "zip", "dicom")
    )
    assert first.json()["id"] == again.json()["id"] and again.headers["idempotency-replayed"] == "true"
    problem(other, 422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"form": "rar"}, "/form"),
        ({"shard_size": 0}, "/shard_size"),
        ({"selection": {"indices": [1, 1]}}, "/selection"),
        ({"selection": {"first": 3, "last": 2}}, "/selection"),
        ({"selection": {"indices": [4]}}, "/selection/indices"),
        ({"selection": {"indices": [5]}}, "/selection/indices"),
        ({"selection": {"first": 4}}, "/selection"),
        ({"selection": {"accepted_only": True}}, "/selection/accepted_only"),
        ({"parts": [[0, 99]]}, "/parts"),
        ({"generation_job_id": "job_" + "0" * 20}, "/generation_job_id"),
        ({"colour": "red"}, "/colour"),
    ],
)
def test_bad_bodies_are_refused_when_posted(client: TestClient, half: str, body: dict[str, Any], pointer: str) -> None:
    refused = problem(client.post(f"/v1/jobs/{half}/exports", json=body), 422, "invalid_spec")
    assert [item["pointer"] for item in refused["errors"]] == [pointer]


def test_what_cannot_be_exported(client: TestClient, generation: str, model_id: str) -> None:
    training = client.get(f"/v1/models/{model_id}").json()["job_id"]
    for job_id, status, code in (
        ("job_00000000000000000000", 404, "not_found"),
        ("job_x", 404, "not_found"),
        (training, 409, "conflict"),
        (generation, 409, "conflict"),
    ):
        problem(client.post(f"/v1/jobs/{job_id}/exports", json={}), status, code)
    assert client.get("/v1/jobs", params={"kind": "export"}).json()["items"] == []


def by_hand(worker: Worker, files: list[dict[str, Any]]) -> None:
    """Finish an export with stored bytes that nobody looks at."""
    claim = worker.claim(Kind.EXPORT)
    stored = {
        file["name"]: worker.objects.put_bytes(f"jobs/{claim.job_id}/export/a1/{file['name']}", b"abc")
        for file in files
    }
    worker.store.commit(claim, StoredFiles(stored), {"files": files})


def test_archives_of_an_export_are_paged_and_come_with_its_end(client: TestClient, worker: Worker, half: str) -> None:
    job = post(client, half)
    path = f"/v1/jobs/{job}/archives"
    empty = client.get(path).json()
    assert (empty["parts"], empty["manifest"]) == ([], None)
    problem(client.get(f"{path}/0"), 409, "conflict")
    problem(client.get(f"{path}/all"), 409, "conflict")
    by_hand(worker, FILES)
    first = client.get(path, params={"page_size": 1}).json()
    rest = client.get(path, params={"page_size": 1, "page_token": first["next_page_token"]}).json()
    assert [part["filename"] for part in first["parts"] + rest["parts"]] == [file["name"] for file in FILES]
    assert rest["next_page_token"] is None
    problem(client.get(f"{path}/2"), 404, "not_found")
    assert "archives/0 to archives/1" in problem(client.get(f"{path}/all"), 404, "not_found")["detail"]
    final = worker.claim(Kind.EXPORT)
    stored = worker.objects.put_bytes(f"jobs/{job}/finalize/a1/manifest.json", json.dumps({}).encode())
    worker.store.commit(final, StoredFiles({"manifest.json": stored}), {}, job_result={})
    assert client.get(path).json()["manifest"]["name"] == "manifest.json"


def test_an_only_archive_is_the_whole(client: TestClient, worker: Worker, half: str) -> None:
    job = post(client, half)
    by_hand(worker, FILES[:1])
    assert client.get(f"/v1/jobs/{job}/archives/all").json()["filename"] == "pairs-000000.tar"


def test_an_export_has_no_pairs_of_its_own(client: TestClient, half: str) -> None:
    job = post(client, half)
    for path in ("pairs", "pairs/0", "report"):
        problem(client.get(f"/v1/jobs/{job}/{path}"), 409, "conflict")
    problem(client.post(f"/v1/jobs/{job}/exports", json={}), 409, "conflict")


def test_a_deleted_export_takes_its_archives_along(
    client: TestClient, worker: Worker, backend: Backend, half: str
) -> None:
    job = post(client, half)
    by_hand(worker, FILES)
    client.post(f"/v1/jobs/{job}:cancel")
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    assert list(backend.objects.list(f"jobs/{job}/")) == []
    assert client.get(f"/v1/jobs/{half}/pairs/0/cf.png").content == png(0)
