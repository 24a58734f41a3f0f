"""Posting, listing, watching and ending jobs over HTTP."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cffa_core.errors import InvalidSpec, NotFound
from cffa_core.jobs.spec import GenerationSpec, Kind, TrainingSpec
from services.api.access import Backend
from tests.api.driving import Worker, problem

NOBODYS_MODEL = "mdl_00000000000000000000"
NOBODYS_DATASET = "ds_00000000000000000000"
FIELDS = st.sampled_from([*TrainingSpec.model_fields, *GenerationSpec.model_fields])
NOBODYS_JOB = "job_00000000000000000000"


def test_a_posted_training_job_is_queued(client: TestClient, dataset_id: str) -> None:
    body = {"dataset_id": dataset_id, "steps": 10, "base": "tiny", "priority": 3}
    response = client.post("/v1/training-jobs", json=body)
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["kind"], job["state"], job["priority"], job["terminal"]) == ("training", "queued", 3, False)
    assert job["spec"]["steps"] == 10 and job["spec"]["lora"]["rank"] == 16
    assert client.get(response.headers["location"]).json() == job


def test_kind_may_be_given_if_it_is_right(client: TestClient, dataset_id: str) -> None:
    right = {"dataset_id": dataset_id, "kind": "training"}
    assert client.post("/v1/training-jobs", json=right).status_code == 202
    body = problem(client.post("/v1/training-jobs", json=right | {"kind": "generation"}), 422, "invalid_spec")
    assert [item["pointer"] for item in body["errors"]] == ["/kind"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"count": 0}, "/count"),
        ({"count": -3}, "/count"),
        ({"count": "many"}, "/count"),
        ({"count": 10**9}, "/count"),
        ({"count": None}, "/count"),
        ({"resolution": 500}, "/resolution"),
        ({"resolution": 0}, "/resolution"),
        ({"batch_size": 0}, "/batch_size"),
        ({"seed": -1}, "/seed"),
        ({"seed": 2**63}, "/seed"),
        ({"model_id": "../../etc"}, "/model_id"),
        ({"sampler": {"steps": 0}}, "/sampler/steps"),
        ({"sampler": {"scheduler": "magic"}}, "/sampler/scheduler"),
        ({"sampler": {"guidance_scale": 0.5}}, "/sampler/guidance_scale"),
        ({"colour": "red"}, "/colour"),
        ({"sampler": {"a/b~c": 1}}, "/sampler/a~1b~0c"),
        ({"priority": 1000}, "/priority"),
    ],
)
def test_impossible_generation_specs(plain_client: TestClient, change: dict[str, Any], pointer: str) -> None:
    body = {"model_id": NOBODYS_MODEL, "count": 5} | change
    found = problem(plain_client.post("/v1/generation-jobs", json=body), 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == [pointer]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"steps": 0}, "/steps"),
        ({"method": "controlnet9"}, "/method"),
        ({"method": "cffa_core.methods.evil"}, "/method"),
        ({"resolution": 513}, "/resolution"),
        ({"base": "../secrets"}, "/base"),
        ({"base": "https://example.org/x"}, "/base"),
        ({"base": "a/b/c"}, "/base"),
        ({"learning_rate": 0}, "/learning_rate"),
        ({"lora": {"rank": 0}}, "/lora/rank"),
        ({"lora": {"targets": ["to_q", "to_q"]}}, "/lora"),
        ({"modalities": []}, ""),
        ({"holdout": 1}, "/holdout"),
        ({"dataset_id": None}, "/dataset_id"),
        ({"cf_prompt": "half a pair \ud800"}, "/cf_prompt"),
        ({"cf_prompt": ""}, "/cf_prompt"),
        ({"half \ud800": 1}, ""),
    ],
)
def test_impossible_training_specs(plain_client: TestClient, change: dict[str, Any], pointer: str) -> None:
    raw = json.dumps({"dataset_id": NOBODYS_DATASET, "steps": 5} | change)
    response = plain_client.post("/v1/training-jobs", content=raw, headers={"Content-Type": "application/json"})
    found = problem(response, 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == [pointer]


def test_all_findings_are_named_at_once(plain_client: TestClient) -> None:
    body = {"model_id": "x", "count": 0, "resolution": 9, "nonsense": 1}
    found = problem(plain_client.post("/v1/generation-jobs", json=body), 422, "invalid_spec")
    assert {item["pointer"] for item in found["errors"]} == {"/model_id", "/count", "/resolution", "/nonsense"}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_none(client: TestClient, dataset_id: str, value: float) -> None:
    raw = json.dumps({"dataset_id": dataset_id, "weight_decay": value})
    response = client.post("/v1/training-jobs", content=raw, headers={"Content-Type": "application/json"})
    assert [item["pointer"] for item in problem(response, 422, "invalid_spec")["errors"]] == ["/weight_decay"]


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"{not json", 400, "malformed_json"),
        (b"", 422, "invalid_spec"),
        (b"[]", 422, "invalid_spec"),
        (b"[" * 50_000, 400, None),
        (b'{"count": 1e999}', 422, "invalid_spec"),
        (b'{"x": "' + b"a" * (2 << 20) + b'"}', 413, "payload_too_large"),
    ],
)
def test_bodies_that_are_no_spec(plain_client: TestClient, raw: bytes, status: int, code: str | None) -> None:
    response = plain_client.post("/v1/generation-jobs", content=raw, headers={"Content-Type": "application/json"})
    problem(response, status, code or response.json()["code"])


def test_references_must_exist(plain_client: TestClient) -> None:
    found = problem(
        plain_client.post("/v1/generation-jobs", json={"model_id": NOBODYS_MODEL, "count": 1}), 422, "invalid_spec"
    )
    assert [item["pointer"] for item in found["errors"]] == ["/model_id"]
    found = problem(plain_client.post("/v1/training-jobs", json={"dataset_id": NOBODYS_DATASET}), 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == ["/dataset_id"]


def test_an_idempotency_key_replays_the_same_body_only(client: TestClient, model_id: str) -> None:
    headers = {"Idempotency-Key": "abc"}
    body = {"model_id": model_id, "count": 2, "seed": 1}
    first = client.post("/v1/generation-jobs", json=body, headers=headers)
    again = client.post("/v1/generation-jobs", json={"count": 2, "seed": 1, "model_id": model_id}, headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    problem(client.post("/v1/generation-jobs", json=body | {"seed": 2}, headers=headers), 422, "idempotency_key_reused")
    fresh = client.post("/v1/generation-jobs", json=body, headers={"Idempotency-Key": "abd"})
    assert fresh.json()["id"] != first.json()["id"]


def test_fifty_posts_at_once_with_one_key_make_one_job(client: TestClient, model_id: str) -> None:
    def post(_: int) -> Any:
        body = {"model_id": model_id, "count": 2}
        return client.post("/v1/generation-jobs", json=body, headers={"Idempotency-Key": "once"})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert len(client.get("/v1/jobs", params={"kind": "generation"}).json()["items"]) == 1


@pytest.mark.parametrize("key", ["", "has space", "x" * 201])
def test_idempotency_keys_that_are_none(plain_client: TestClient, key: str) -> None:
    response = plain_client.post(
        "/v1/generation-jobs", json={"model_id": NOBODYS_MODEL, "count": 1}, headers={"Idempotency-Key": key}
    )
    assert "header:idempotency-key" in {item["pointer"] for item in problem(response, 422, "invalid_spec")["errors"]}


def test_listing_filters_and_pages(client: TestClient, model_id: str) -> None:
    made = [
        client.post("/v1/generation-jobs", json={"model_id": model_id, "count": n + 1}).json()["id"] for n in range(3)
    ]
    client.post(f"/v1/jobs/{made[0]}:cancel")
    first = client.get("/v1/jobs", params={"kind": "generation", "page_size": 2}).json()
    params = {"kind": "generation", "page_size": 2, "page_token": first["next_page_token"]}
    second = client.get("/v1/jobs", params=params).json()
    assert [job["id"] for job in first["items"] + second["items"]] == made[::-1]
    assert second["next_page_token"] is None
    canceled = client.get("/v1/jobs", params={"state": "canceled"}).json()["items"]
    assert [job["id"] for job in canceled] == [made[0]]
    trained = client.get("/v1/jobs", params={"kind": "training"}).json()["items"]
    assert [job["state"] for job in trained] == ["succeeded"]


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("kind=nonsense", "?kind"),
        ("state=asleep", "?state"),
        ("page_size=0", "?page_size"),
        ("page_size=100000", "?page_size"),
        ("page_token=", "?page_token"),
        ("page_token=-1", "?page_token"),
        ("created_after=0.5", "?created_after"),
        ("created_before=1795262400", "?created_before"),
        ("created_before=2026-11-21T12:00:00", "?created_before"),
        ("created_before=2026-11-21", "?created_before"),
    ],
)
def test_bad_list_queries(plain_client: TestClient, query: str, pointer: str) -> None:
    found = problem(plain_client.get(f"/v1/jobs?{query}"), 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == [pointer]


def test_bad_page_tokens(plain_client: TestClient) -> None:
    for path in ("/v1/jobs", "/v1/datasets", "/v1/models"):
        problem(plain_client.get(path, params={"page_token": "%00 or 1=1"}), 422, "invalid_spec")


def test_a_known_version_answers_304(client: TestClient, generation: str) -> None:
    path = f"/v1/jobs/{generation}"
    first = client.get(path)
    again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    client.post(f"{path}:cancel")
    changed = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200 and changed.json()["state"] == "canceled"
    assert changed.json()["version"] > first.json()["version"]
    assert changed.headers["etag"] != first.headers["etag"]


def test_a_long_poll_answers_as_soon_as_the_job_changes(client: TestClient, backend: Backend, generation: str) -> None:
    etag = client.get(f"/v1/jobs/{generation}").headers["etag"]
    changing = threading.Timer(0.5, lambda: backend.store.cancel_job("local", generation))
    changing.start()
    began = time.monotonic()
    answer = client.get(f"/v1/jobs/{generation}", params={"wait": 20}, headers={"If-None-Match": etag})
    took = time.monotonic() - began
    changing.join()
    assert answer.json()["state"] == "canceled"
    assert 0.3 < took < 8


def test_a_long_poll_ends_after_its_time(client: TestClient, generation: str) -> None:
    etag = client.get(f"/v1/jobs/{generation}").headers["etag"]
    began = time.monotonic()
    answer = client.get(f"/v1/jobs/{generation}", params={"wait": 1}, headers={"If-None-Match": etag})
    assert answer.status_code == 304
    assert 0.9 < time.monotonic() - began < 5
    assert client.get(f"/v1/jobs/{generation}", params={"wait": 1}).status_code == 200
    problem(client.get(f"/v1/jobs/{generation}", params={"wait": 31}), 422, "invalid_spec")


def test_a_finished_job_does_not_keep_a_poll_without_a_version(client: TestClient, generation: str) -> None:
    client.post(f"/v1/jobs/{generation}:cancel")
    began = time.monotonic()
    assert client.get(f"/v1/jobs/{generation}", params={"wait": 20}).json()["terminal"] is True
    assert time.monotonic() - began < 5


def test_cancel_waits_for_the_worker(client: TestClient, worker: Worker, generation: str) -> None:
    claim = worker.claim()
    assert client.post(f"/v1/jobs/{generation}:cancel").json()["state"] == "canceling"
    assert client.post(f"/v1/jobs/{generation}:cancel").json()["state"] == "canceling"
    worker.store.release(claim)
    assert client.get(f"/v1/jobs/{generation}").json()["state"] == "canceled"


def test_pause_resume_retry(client: TestClient, generation: str) -> None:
    path = f"/v1/jobs/{generation}"
    assert client.post(f"{path}:pause").json()["state"] == "paused"
    assert client.post(f"{path}:resume").json()["state"] == "queued"
    problem(client.post(f"{path}:retry"), 409, "conflict")
    assert client.post(f"{path}:cancel").json()["state"] == "canceled"
    problem(client.post(f"{path}:pause"), 409, "conflict")
    assert client.post(f"{path}:retry").json()["state"] == "queued"


def test_a_finished_job_cannot_be_cancelled(client: TestClient, worker: Worker, generation: str) -> None:
    for _ in range(4):
        worker.make_part()
    problem(client.post(f"/v1/jobs/{generation}:cancel"), 409, "conflict")


def test_only_finished_jobs_can_be_deleted(
    client: TestClient, worker: Worker, generation: str, backend: Backend
) -> None:
    path = f"/v1/jobs/{generation}"
    worker.make_part()
    problem(client.delete(path), 409, "conflict")
    client.post(f"{path}:cancel")
    kept = backend.settings.objects_dir
    assert any(generation in str(file) for file in kept.rglob("*")) or list(kept.rglob("*"))
    keys = [info.key for part in backend.store.parts("local", generation) for info in part.stored.files.values()]
    assert len(keys) == 2
    answer = client.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    problem(client.get(path), 404, "not_found")
    problem(client.delete(path), 404, "not_found")
    assert not set(keys) & set(backend.objects.list("jobs/"))


def test_deleting_a_training_job_keeps_its_model(client: TestClient, model_id: str) -> None:
    job = client.get(f"/v1/models/{model_id}").json()["job_id"]
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    model = client.get(f"/v1/models/{model_id}").json()
    assert client.get(model["files"][0]["url"]).content == b'{"method": "dual_unet"}'


@pytest.mark.parametrize(
    "job_id", ["x", "job_", "JOB_00000000000000000000", "job_%00", "job_" + "0" * 5000, "ds_00000000000000000000"]
)
def test_what_is_no_id_names_nothing(plain_client: TestClient, job_id: str) -> None:
    for path in ("", "/events", "/metrics", "/pairs", "/archives"):
        problem(plain_client.get(f"/v1/jobs/{job_id}{path}"), 404, "not_found")
    problem(plain_client.post(f"/v1/jobs/{job_id}:cancel"), 404, "not_found")
    problem(plain_client.get(f"/v1/models/{job_id}"), 404, "not_found")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("path", ["/v1/training-jobs", "/v1/generation-jobs"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=JSON)
def test_no_body_breaks_the_service(plain_client: TestClient, path: str, body: object) -> None:
    raw = json.dumps(body)
    answer = plain_client.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), raw
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["errors"] or answer.status_code == 400


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
def test_actions_on_unknown_jobs(plain_client: TestClient, verb: str) -> None:
    problem(plain_client.post(f"/v1/jobs/{NOBODYS_JOB}:{verb}"), 404, "not_found")


def test_another_owners_jobs_are_not_there(
    client: TestClient, backend: Backend, worker: Worker, generation: str
) -> None:
    spec = backend.store.get_job("local", generation).spec
    with pytest.raises(InvalidSpec) as refused:
        backend.store.create_job("somebody else", spec)
    assert [item.pointer for item in refused.value.problems] == ["/model_id"]
    with pytest.raises(NotFound):
        backend.store.get_job("somebody else", generation)
    assert backend.store.list_jobs("somebody else", Kind.GENERATION).items == ()
