"""Gates over HTTP: what is refused when posted, scores and refused pairs of a job, and one pair regenerated."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.records import Claim, StoredFiles
from cffa_core.jobs.spec import GenerationSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import reject_stem, write_part_archive
from cffa_core.rng import pair_seed
from cffa_core.storage.base import part_key
from services.api.access import Backend
from services.client.client import CffaClient
from tests.api.driving import URL, Worker, png, problem, sha256
from tests.record_cases import trained_model

KEY = "cpu/one/torch-2/diffusers-0/fp32/threads-1/batch-4"


def entry_of(worker: Worker, folder: str, spec: GenerationSpec, index: int, attempt: int, stem: str) -> dict[str, Any]:
    """One pair with its files below ``folder``."""
    entry: dict[str, Any] = {"index": index, "seed": pair_seed(spec.seed, index, attempt), "try": attempt}
    entry |= {"alignment": {"ridge_correlation": 0.4}, "novelty": {"similarity": 0.25, "nearest": "m001"}}
    for modality in ("cf", "fa"):
        data = png(100 * index + attempt, colour=modality == "cf")
        path = worker.folder / folder / modality / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entry[modality] = {"name": f"{modality}/{stem}.png", "size": len(data), "sha256": sha256(data)}
    return entry | {"fa_chroma": 0.5}


def finish_gated_part(worker: Worker, claim: Claim) -> None:
    """Even slots are filled at their second try, odd ones never, of three."""
    spec = claim.spec
    assert isinstance(spec, GenerationSpec)
    pairs, refused, empty = [], [], []
    for index in spec.part_range(claim.index):
        tries = 1 if index % 2 == 0 else 3
        for k in range(tries):
            entry = entry_of(worker, f"{claim.unit_id}/rejects", spec, index, k, reject_stem(index, k))
            refused.append(entry | {"reasons": ["too_little_aligned"]})
        if tries == 1:
            pairs.append(entry_of(worker, claim.unit_id, spec, index, 1, f"{index:06d}"))
        else:
            empty.append({"index": index, "tries": 3, "best_alignment": 0.4, "least_similarity": 0.25})
    stored = {}
    for folder, zip_name, listing, description in (
        (claim.unit_id, "pairs.zip", "part.json", {"pairs": pairs, "exhausted": empty}),
        (f"{claim.unit_id}/rejects", "rejects.zip", "rejects.json", {"pairs": refused}),
    ):
        place = worker.folder / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "part.json").write_text(json.dumps(description))
        index_of_zip = write_part_archive(place, place / zip_name, {}, rejects=zip_name == "rejects.zip")
        for name, raw in ((zip_name, (place / zip_name).read_bytes()), (listing, json.dumps(index_of_zip).encode())):
            key = part_key(claim.job_id, claim.index, claim.attempt, name)
            stored[name] = worker.objects.put_bytes(key, raw)
    info = {"pairs": [p["index"] for p in pairs], "gate": {"rejected": len(refused), "exhausted": len(empty)}}
    worker.store.pin_numerics(claim, KEY)
    worker.store.commit(claim, StoredFiles(stored), info)


@pytest.fixture
def gated(client: TestClient, worker: Worker, model_id: str) -> str:
    """A gated job of 5 slots in parts of 2, with all parts done: pairs 0, 2 and 4."""
    body = {"model_id": model_id, "count": 5, "part_size": 2, "gate": {"min_alignment": 0.5, "max_tries": 3}}
    response = client.post("/v1/generation-jobs", json=body)
    assert response.status_code == 202, response.text
    while (claim := worker.claim()).kind is UnitKind.PART:
        finish_gated_part(worker, claim)
    return str(response.json()["id"])


@pytest.fixture
def typed(client: TestClient) -> CffaClient:
    """The Python client, talking to the same application."""

    def forward(request: httpx.Request) -> httpx.Response:
        url, headers = str(request.url), dict(request.headers)
        answer = client.request(request.method, url, content=request.read(), headers=headers)
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    return CffaClient(URL, transport=httpx.MockTransport(forward))


def test_a_gate_without_known_training_pairs_is_refused_when_posted(client: TestClient, model_id: str) -> None:
    body = {"model_id": model_id, "count": 5, "gate": {"max_similarity_to_training": 0.9}}
    body = problem(client.post("/v1/generation-jobs", json=body), 422, "invalid_spec")
    assert [error["pointer"] for error in body["errors"]] == ["/gate/max_similarity_to_training"]
    assert body["errors"][0]["code"] == "training_unknown"


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"gate": {}}, "/gate"),
        ({"gate": {"min_alignment": 2}}, "/gate/min_alignment"),
        ({"gate": {"min_alignment": 0.1, "max_tries": 101}}, "/gate/max_tries"),
        ({"only": [[5, 0]]}, ""),
        ({"only": [[1, 0], [0, 0]]}, ""),
        ({"only": [[1, 0]], "gate": {"min_alignment": 0.1}}, ""),
    ],
)
def test_impossible_gates_are_named(client: TestClient, model_id: str, fields: dict[str, Any], pointer: str) -> None:
    body = problem(
        client.post("/v1/generation-jobs", json={"model_id": model_id, "count": 5} | fields), 422, "invalid_spec"
    )
    assert [error["pointer"] for error in body["errors"]] == [pointer]


def test_pairs_carry_try_and_scores_and_an_empty_slot_says_why(client: TestClient, gated: str) -> None:
    listed = client.get(f"/v1/jobs/{gated}/pairs").json()["items"]
    assert [(pair["index"], pair["part"], pair["try"]) for pair in listed] == [(0, 0, 1), (2, 1, 1), (4, 2, 1)]
    assert listed[0]["alignment"] == {"ridge_correlation": 0.4}
    assert listed[0]["novelty"] == {"similarity": 0.25, "nearest": "m001"}
    body = problem(client.get(f"/v1/jobs/{gated}/pairs/3"), 404, "not_found")
    assert [error["code"] for error in body["errors"]] == ["exhausted"]
    assert client.get(f"/v1/jobs/{gated}").json()["counts"] == {
        "requested": 5, "generated": 12, "accepted": 3, "rejected": 9, "failed": 2,
    }  # fmt: skip


def test_refused_pairs_and_empty_slots_are_listed_page_by_page(
    client: TestClient, typed: CffaClient, gated: str
) -> None:
    tries = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0)]
    found, token = [], None
    for _ in range(3):
        query = {"page_size": 4} | ({"page_token": token} if token else {})
        page = client.get(f"/v1/jobs/{gated}/rejects", params=query).json()
        found += [(item["index"], item["try"]) for item in page["items"]]
        token = page["next_page_token"]
    assert found == tries and token is None
    refused = list(typed.rejects(gated))
    assert [(entry.index, entry.attempt, entry.part) for entry in refused] == [(i, k, i // 2) for i, k in tries]
    assert {tuple(entry.reasons) for entry in refused} == {("too_little_aligned",)}
    assert [(slot.index, slot.tries, slot.best_alignment) for slot in typed.exhausted(gated)] == [
        (1, 3, 0.4),
        (3, 3, 0.4),
    ]
    one = client.get(f"/v1/jobs/{gated}/exhausted", params={"page_size": 1}).json()
    assert [slot["index"] for slot in one["items"]] == [1] and one["next_page_token"] == "3"


def test_the_archive_of_refused_pairs(client: TestClient, gated: str, generation: str) -> None:
    archive = client.get(f"/v1/jobs/{gated}/archives/1/rejects").json()
    assert archive["pairs"] == 4 and archive["filename"] == f"{gated}-rejects-00001.zip"
    assert sha256(client.get(archive["url"].removeprefix(URL)).content) == archive["sha256"]
    assert client.get(f"/v1/jobs/{gated}/archives/1").json()["pairs"] == 1
    problem(client.get(f"/v1/jobs/{gated}/archives/9/rejects"), 404, "not_found")
    problem(client.get(f"/v1/jobs/{generation}/archives/0/rejects"), 409, "conflict")
    assert client.get(f"/v1/jobs/{generation}/rejects").json()["items"] == []


def test_a_pair_is_regenerated_by_a_job_of_its_own(
    client: TestClient, typed: CffaClient, backend: Backend, gated: str
) -> None:
    original = client.get(f"/v1/jobs/{gated}/pairs/2").json()
    key = {"Idempotency-Key": "once"}
    response = client.post(f"/v1/jobs/{gated}/pairs/2:regenerate", headers=key)
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["spec"]["only"], job["spec"]["gate"], job["counts"]["requested"]) == ([[2, 1]], None, 1)
    assert job["spec"]["regenerates"] == {
        "job_id": gated, "cf": original["cf"]["sha256"], "fa": original["fa"]["sha256"],
    }  # fmt: skip
    assert job["numerics_key"] == KEY
    again = client.post(f"/v1/jobs/{gated}/pairs/2:regenerate", headers=key)
    assert again.json()["id"] == job["id"] and again.headers["idempotency-replayed"] == "true"
    assert typed.regenerate(gated, 2).id != job["id"]
    # Its only pair keeps its index: part 0 holds pair 2.
    problem(client.get(f"/v1/jobs/{job['id']}/pairs/0"), 404, "not_found")
    problem(client.get(f"/v1/jobs/{job['id']}/pairs/2"), 409, "conflict")


def test_what_cannot_be_regenerated(client: TestClient, gated: str, generation: str, model_id: str) -> None:
    problem(client.post(f"/v1/jobs/{gated}/pairs/1:regenerate"), 404, "not_found")
    problem(client.post(f"/v1/jobs/{gated}/pairs/99:regenerate"), 404, "not_found")
    problem(client.post(f"/v1/jobs/{gated}/pairs/x:regenerate"), 422, "invalid_spec")
    problem(client.post(f"/v1/jobs/{generation}/pairs/0:regenerate"), 409, "conflict")
    trained = client.get("/v1/jobs", params={"kind": "training"}).json()["items"][0]["id"]
    problem(client.post(f"/v1/jobs/{trained}/pairs/0:regenerate"), 409, "conflict")


def test_only_its_owner_sees_what_a_gate_refused(client: TestClient, backend: Backend, worker: Worker) -> None:
    dataset_id = backend.store.new_id("ds")
    backend.store.add_dataset(
        "other", dataset_id=dataset_id, name="B", digest="0" * 64, pairs=1, report={}, stored=StoredFiles()
    )
    model = trained_model(backend.store, "other")
    spec = GenerationSpec(model_id=model, count=2)
    job, _ = backend.store.create_job("other", spec)
    assert job.state is JobState.QUEUED and job.kind is Kind.GENERATION
    for path in ("rejects", "exhausted", "archives/0/rejects"):
        problem(client.get(f"/v1/jobs/{job.id}/{path}"), 404, "not_found")
    problem(client.post(f"/v1/jobs/{job.id}/pairs/0:regenerate"), 404, "not_found")
