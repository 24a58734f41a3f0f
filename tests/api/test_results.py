"""What jobs made: pairs one by one, archives while the job runs and at its end, models."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from io import BytesIO
from zipfile import ZipFile

import pytest
from fastapi.testclient import TestClient

from cffa_core.rng import pair_seed
from services.api.access import Backend
from tests.api.driving import Worker, png, problem, sha256


def test_pairs_appear_as_parts_finish(client: TestClient, worker: Worker, generation: str) -> None:
    path = f"/v1/jobs/{generation}/pairs"
    assert client.get(path).json() == {"items": [], "next_page_token": None}
    worker.make_part()
    assert [pair["index"] for pair in client.get(path).json()["items"]] == [0, 1]
    worker.make_part()
    worker.make_part()
    pairs = client.get(path).json()["items"]
    assert [pair["index"] for pair in pairs] == [0, 1, 2, 3, 4]
    assert [pair["part"] for pair in pairs] == [0, 0, 1, 1, 2]
    assert [pair["seed"] for pair in pairs] == [pair_seed(7, index) for index in range(5)]
    assert [pair["cf"]["sha256"] for pair in pairs] == [sha256(png(index)) for index in range(5)]


def test_parts_may_finish_out_of_order(client: TestClient, worker: Worker, generation: str) -> None:
    first, second = worker.claim(), worker.claim()
    worker.finish_part(second)
    path = f"/v1/jobs/{generation}/pairs"
    assert [pair["index"] for pair in client.get(path).json()["items"]] == [2, 3]
    problem(client.get(f"{path}/0"), 409, "conflict")
    assert client.get(f"{path}/3").json()["index"] == 3
    archives = client.get(f"/v1/jobs/{generation}/archives").json()
    assert [archive["number"] for archive in archives["parts"]] == [1]
    worker.finish_part(first)
    assert [pair["index"] for pair in client.get(path).json()["items"]] == [0, 1, 2, 3]


def test_pairs_are_paged(client: TestClient, worker: Worker, model_id: str) -> None:
    body = {"model_id": model_id, "count": 21, "part_size": 2}
    job = client.post("/v1/generation-jobs", json=body).json()["id"]
    for _ in range(11):
        worker.make_part()
    found, token = [], None
    for _ in range(10):
        params = {"page_size": 5} | ({"page_token": token} if token else {})
        page = client.get(f"/v1/jobs/{job}/pairs", params=params).json()
        assert len(page["items"]) <= 5
        found += [pair["index"] for pair in page["items"]]
        token = page["next_page_token"]
        if token is None:
            break
    assert found == list(range(21))
    assert len(client.get(f"/v1/jobs/{job}/pairs", params={"page_size": 200}).json()["items"]) == 21


def test_an_image_is_the_bytes_the_worker_made(client: TestClient, worker: Worker, generation: str) -> None:
    for _ in range(3):
        worker.make_part()
    for index in range(5):
        pair = client.get(f"/v1/jobs/{generation}/pairs/{index}").json()
        for modality in ("cf", "fa"):
            answer = client.get(pair[modality]["url"])
            assert answer.content == png(index, colour=modality == "cf")
            assert answer.headers["content-type"] == "image/png"
            assert answer.headers["etag"] == f'"{pair[modality]["sha256"]}"'
            assert answer.headers["content-disposition"].startswith("inline")


def test_an_image_has_ranges_head_and_304(client: TestClient, worker: Worker, generation: str) -> None:
    worker.make_part()
    path, whole = f"/v1/jobs/{generation}/pairs/1/fa.png", png(1, colour=False)
    part = client.get(path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole)))
    assert client.get(path, headers={"If-None-Match": head.headers["etag"]}).status_code == 304
    problem(client.get(path, headers={"Range": f"bytes={len(whole)}-"}), 416, "range_not_satisfiable")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("pairs/5", 404, "not_found"),
        ("pairs/-1", 404, "not_found"),
        ("pairs/99999999999999999999", 404, "not_found"),
        ("pairs/one", 422, "invalid_spec"),
        ("pairs/4", 409, "conflict"),
        ("pairs/4/cf.png", 409, "conflict"),
        ("pairs/0/mri.png", 422, "invalid_spec"),
        ("archives/3", 404, "not_found"),
        ("archives/2", 409, "conflict"),
        ("archives/all", 409, "conflict"),
        ("archives/some", 422, "invalid_spec"),
        ("pairs?page_token=x", 422, "invalid_spec"),
        ("archives?page_token=x", 422, "invalid_spec"),
    ],
)
def test_results_that_are_not_there(
    client: TestClient, worker: Worker, generation: str, path: str, status: int, code: str
) -> None:
    worker.make_part()
    problem(client.get(f"/v1/jobs/{generation}/{path}"), status, code)


def test_a_canceled_job_keeps_its_finished_parts(client: TestClient, worker: Worker, generation: str) -> None:
    worker.make_part()
    client.post(f"/v1/jobs/{generation}:cancel")
    assert client.get(f"/v1/jobs/{generation}/pairs/1/cf.png").content == png(1)
    problem(client.get(f"/v1/jobs/{generation}/pairs/4"), 404, "not_found")
    problem(client.get(f"/v1/jobs/{generation}/archives/all"), 404, "not_found")
    archives = client.get(f"/v1/jobs/{generation}/archives").json()
    assert [archive["number"] for archive in archives["parts"]] == [0]
    assert archives["whole"] is None


def test_part_archives_download_while_the_job_runs(client: TestClient, worker: Worker, generation: str) -> None:
    worker.make_part()
    archive = client.get(f"/v1/jobs/{generation}/archives/0").json()
    listed = client.get(f"/v1/jobs/{generation}/archives").json()["parts"]
    assert [(item["sha256"], item["bytes"], item["pairs"]) for item in listed] == [
        (archive["sha256"], archive["bytes"], 2)
    ]
    answer = client.get(archive["url"])
    assert len(answer.content) == archive["bytes"]
    assert hashlib.sha256(answer.content).hexdigest() == archive["sha256"]
    assert f'filename="{generation}-part-00000.zip"' in answer.headers["content-disposition"]
    with ZipFile(BytesIO(answer.content)) as opened:
        assert opened.read("fa/000001.png") == png(1, colour=False)
    assert datetime.fromisoformat(archive["expires_at"]) > datetime.now(UTC)


def test_the_whole_archive_comes_with_success(client: TestClient, worker: Worker, generation: str) -> None:
    for _ in range(4):
        worker.make_part()
    assert client.get(f"/v1/jobs/{generation}").json()["state"] == "succeeded"
    listed = client.get(f"/v1/jobs/{generation}/archives").json()
    whole = client.get(f"/v1/jobs/{generation}/archives/all").json()
    assert [archive["pairs"] for archive in listed["parts"]] == [2, 2, 1]
    assert (whole["number"], whole["pairs"], whole["sha256"]) == (None, 5, listed["whole"]["sha256"])
    answer = client.get(whole["url"])
    assert hashlib.sha256(answer.content).hexdigest() == whole["sha256"]
    with ZipFile(BytesIO(answer.content)) as opened:
        assert opened.namelist()[-1] == "manifest.json" and len(opened.namelist()) == 11


def test_archives_are_paged(client: TestClient, worker: Worker, generation: str) -> None:
    for _ in range(3):
        worker.make_part()
    path = f"/v1/jobs/{generation}/archives"
    first = client.get(path, params={"page_size": 2}).json()
    rest = client.get(path, params={"page_size": 2, "page_token": first["next_page_token"]}).json()
    assert [item["number"] for item in first["parts"] + rest["parts"]] == [0, 1, 2]
    assert rest["next_page_token"] is None


def test_training_jobs_have_no_pairs(client: TestClient, model_id: str) -> None:
    job = client.get(f"/v1/models/{model_id}").json()["job_id"]
    for path in ("pairs", "pairs/0", "archives", "archives/all", "archives/0"):
        problem(client.get(f"/v1/jobs/{job}/{path}"), 409, "conflict")


def test_a_damaged_index_is_not_served(client: TestClient, worker: Worker, backend: Backend, generation: str) -> None:
    worker.make_part()
    part = backend.store.parts("local", generation)[0]
    (stored,) = [
        path
        for path in backend.settings.objects_dir.rglob("*")
        if path.is_file()
        and b'"pairs"' in path.read_bytes()
        and path.stat().st_size == part.stored.files["part.json"].size
    ]
    stored.chmod(0o644)
    stored.write_bytes(b"{")
    body = problem(client.get(f"/v1/jobs/{generation}/pairs"), 500, "corrupt_artifact")
    assert "objects" not in body["detail"]


def test_models_have_cards_and_files(client: TestClient, model_id: str) -> None:
    model = client.get(f"/v1/models/{model_id}").json()
    assert (model["method"], model["base"], model["step"]) == ("dual_unet", "tiny", 2)
    assert [file["name"] for file in model["files"]] == ["model/model.json"]
    answer = client.get(model["files"][0]["url"])
    assert sha256(answer.content) == model["files"][0]["sha256"]
    assert client.get(model["links"]["card"]).json()["base"]["name"] == "tiny"
    listed = client.get("/v1/models").json()["items"]
    assert [item["id"] for item in listed] == [model_id]
    assert client.get("/v1/models", params={"job_id": model["job_id"]}).json()["items"] == listed
    assert client.get("/v1/models", params={"job_id": "job_00000000000000000000"}).json()["items"] == []


def test_unknown_models(client: TestClient) -> None:
    for path in ("/v1/models/mdl_00000000000000000000", "/v1/models/mdl_00000000000000000000/card"):
        problem(client.get(path), 404, "not_found")
