"""Uploads file by file and imports: what is announced, what arrives, what becomes of it, and what hostile ones get."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs import upload_sweep
from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import create_app
from tests.api.driving import URL, png, problem


def pair_bytes(count: int = 2, side: int = 48) -> dict[str, bytes]:
    members = {f"cf/m{index:03d}.png": png(index, side=side) for index in range(count)}
    return members | {f"fa/m{index:03d}.png": png(index, colour=False, side=side) for index in range(count)}


def announce(client: TestClient, members: dict[str, bytes], **fields: Any) -> Any:
    files = [{"path": path, "size": len(data)} for path, data in members.items()]
    return client.post("/v1/uploads", json={"name": "clinic A", "files": files} | fields)


def send(client: TestClient, upload: dict[str, Any], members: dict[str, bytes], most: int = 10_000) -> int:
    """PUT what is still to come, at most so many pieces; returns how many were sent."""
    sent = 0
    for file in upload["files"]:
        for put in file["puts"]:
            if sent == most:
                return sent
            piece = members[file["path"]][put["offset"] : put["offset"] + put["size"]]
            assert client.put(put["url"], content=piece).status_code == 200
            sent += 1
    return sent


def uploaded_objects(backend: Backend) -> list[str]:
    return list(backend.objects.list("uploads/"))


def test_a_folder_becomes_the_data_set_that_its_zip_would(client: TestClient, backend: Backend) -> None:
    from tests.api.driving import zipped

    members = pair_bytes()
    answer = announce(client, members)
    assert answer.status_code == 201, answer.text
    upload = answer.json()
    assert answer.headers["location"] == upload["links"]["self"]
    send(client, upload, members)
    done = client.post(upload["links"]["complete"])
    assert done.status_code == 201, done.text
    again = client.post(upload["links"]["complete"])
    assert again.json()["id"] == done.json()["id"]
    assert uploaded_objects(backend) == []
    view = client.get(upload["links"]["self"]).json()
    assert (view["state"], view["dataset_id"]) == ("done", done.json()["id"])
    zipped_one = client.post(
        "/v1/datasets", files={"file": ("s.zip", zipped(members), "application/zip")}, data={"name": "z"}
    )
    assert zipped_one.json()["digest"] == done.json()["digest"]


def test_a_broken_upload_goes_on_where_it_stopped(client: TestClient) -> None:
    members = pair_bytes()
    upload = announce(client, members).json()
    assert send(client, upload, members, most=3) == 3
    refused = problem(client.post(upload["links"]["complete"]), 409, "conflict")
    assert [item["code"] for item in refused["errors"]] == ["missing"]
    resumed = client.get(upload["links"]["self"]).json()
    assert [file["complete"] for file in resumed["files"]] == [True, True, True, False]
    assert send(client, resumed, members) == 1
    assert client.post(upload["links"]["complete"]).status_code == 201


@pytest.fixture
def small_parts(settings: Settings) -> Any:
    """An application whose parts have a few bytes, as the local store allows."""
    made = settings.model_copy(update={"upload_part_bytes": 2000})
    with TestClient(create_app(made), base_url=URL, raise_server_exceptions=False) as opened:
        yield opened


def test_a_large_file_comes_in_parts_and_only_missing_parts_come_again(small_parts: TestClient) -> None:
    members = pair_bytes()
    upload = announce(small_parts, members).json()
    parts = sum(len(file["puts"]) for file in upload["files"])
    assert parts == sum(-(-len(data) // 2000) for data in members.values()) > len(members)
    send(small_parts, upload, members, most=2)
    resumed = small_parts.get(upload["links"]["self"]).json()
    assert resumed["files"][0]["received"] == 4000
    assert send(small_parts, resumed, members) == parts - 2
    assert small_parts.post(upload["links"]["complete"]).status_code == 201


@pytest.mark.parametrize("data", [b"x", b"x" * 100_000], ids=["fewer", "more"])
def test_a_link_takes_the_announced_bytes_and_no_others(client: TestClient, backend: Backend, data: bytes) -> None:
    upload = announce(client, pair_bytes()).json()
    answer = client.put(upload["files"][0]["puts"][0]["url"], content=data)
    problem(answer, *((400, "bad_request") if len(data) == 1 else (413, "payload_too_large")))
    assert uploaded_objects(backend) == []


def test_a_link_to_put_does_not_read_and_one_to_read_does_not_put(client: TestClient, backend: Backend) -> None:
    url = announce(client, pair_bytes()).json()["files"][0]["puts"][0]["url"]
    problem(client.get(url), 404, "not_found")
    info = backend.objects.put_bytes("jobs/job_0/x", b"abc")
    reading = backend.objects.download_url(info.key, expires_seconds=60, filename="x")
    problem(client.put(reading, content=b"abc"), 404, "not_found")


def test_hostile_lists_are_refused_with_every_finding(client: TestClient, backend: Backend) -> None:
    files = [
        {"path": "../outside.png", "size": 5},
        {"path": "/etc/passwd", "size": 5},
        {"path": "cf\\a.png", "size": 5},
        {"path": "cf/a.png", "size": 5},
        {"path": "CF/A.png", "size": 5},
        {"path": "cf/large.png", "size": 2**39},
    ]
    body = problem(client.post("/v1/uploads", json={"name": "x", "files": files}), 422, "invalid_spec")
    found = {(item["pointer"], item["code"]) for item in body["errors"]}
    assert {(f"/files/{number}/path", "unsafe_name") for number in range(3)} <= found
    assert {(f"/files/{number}/path", "duplicate_name") for number in (3, 4)} <= found
    assert {("/files/5/size", "too_large"), ("/files", "too_large")} <= found
    for size in (0, -1, 2**70):
        problem(
            client.post("/v1/uploads", json={"name": "x", "files": [{"path": "a", "size": size}]}), 422, "invalid_spec"
        )
    assert client.get("/v1/uploads").json()["items"] == [] and uploaded_objects(backend) == []


def test_pairs_that_do_not_pass_are_named_and_the_upload_stays_open(client: TestClient, backend: Backend) -> None:
    members = pair_bytes() | {"cf/orphan.png": png(7), "cf/text.png": b"no image", "fa/text.png": png(8, colour=False)}
    upload = announce(client, members).json()
    send(client, upload, members)
    body = problem(client.post(upload["links"]["complete"]), 422, "invalid_dataset")
    assert {item["pointer"] for item in body["errors"]} == {"cf/orphan.png", "cf/text.png"}
    assert client.get("/v1/datasets").json()["items"] == []
    assert client.delete(upload["links"]["self"]).status_code == 204
    assert uploaded_objects(backend) == []
    problem(client.get(upload["links"]["self"]), 404, "not_found")


def test_a_link_dies_with_its_upload_and_the_sweep_takes_what_expired(client: TestClient, backend: Backend) -> None:
    members = pair_bytes()
    upload = announce(client, members).json()
    send(client, upload, members, most=1)
    backend.store.add_upload("local", "up_" + "e" * 20, "old", [], {}, seconds=-1)
    backend.objects.put_bytes("uploads/up_" + "e" * 20 + "/f00000", b"late")
    backend.objects.put_bytes("uploads/up_" + "s" * 20 + "/f00000", b"stray")
    assert upload_sweep.remove_expired(backend.store, backend.objects) == 1
    assert upload_sweep.remove_strays(backend.store, backend.objects) == 1
    assert len(uploaded_objects(backend)) == 1
    url = upload["files"][1]["puts"][0]["url"]
    client.delete(upload["links"]["self"])
    problem(client.put(url, content=members[upload["files"][1]["path"]]), 410, "gone")


def test_the_same_key_opens_one_upload(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k1"}
    files = [{"path": "cf/a.png", "size": 5}]
    made = [client.post("/v1/uploads", json={"name": "x", "files": files}, headers=headers) for _ in range(2)]
    assert made[0].json()["id"] == made[1].json()["id"]
    other = client.post("/v1/uploads", json={"name": "y", "files": files}, headers=headers)
    problem(other, 422, "idempotency_key_reused")


def test_objects_below_a_prefix_are_imported(client: TestClient, backend: Backend) -> None:
    for path, data in pair_bytes().items():
        backend.objects.put_bytes(f"imports/local/2026/a/{path}", data)
    made = client.post("/v1/datasets:import", json={"name": "from the bucket", "prefix": "2026/a"})
    assert made.status_code == 201, made.text
    assert made.json()["pairs"] == 2
    assert len(list(backend.objects.list("imports/"))) == 4


def test_patterns_come_by_every_way_in(client: TestClient, backend: Backend) -> None:
    members, patterns = pair_bytes(), {"eye_pattern": "^(.)", "patient_pattern": "^(m).*"}
    upload = announce(client, members, **patterns).json()
    send(client, upload, members)
    by_folder = client.post(upload["links"]["complete"]).json()
    for path, data in members.items():
        backend.objects.put_bytes(f"imports/local/a/{path}", data)
    by_prefix = client.post("/v1/datasets:import", json={"name": "A", "prefix": "a", **patterns}).json()
    assert by_folder["digest"] == by_prefix["digest"]
    pairs = client.get(f"/v1/datasets/{by_folder['id']}/pairs").json()["items"]
    assert {pair["patient"] for pair in pairs} == {"m"}
    for path, more in (
        ("/v1/uploads", {"files": [{"path": "a", "size": 1}]}),
        ("/v1/datasets:import", {"prefix": "a"}),
    ):
        body = problem(client.post(path, json={"name": "A", "patient_pattern": "a\x07", **more}), 422, "invalid_spec")
        assert [item["pointer"] for item in body["errors"]] == ["/patient_pattern"]


@pytest.mark.parametrize("prefix", ["..", "../other", "a/../../other", "a//b", ".hidden", "a\\b", "a\0"])
def test_a_prefix_cannot_leave_the_import_folder(client: TestClient, backend: Backend, prefix: str) -> None:
    for path, data in pair_bytes().items():
        backend.objects.put_bytes(f"imports/other/{path}", data)
    body = problem(client.post("/v1/datasets:import", json={"name": "x", "prefix": prefix}), 422, "invalid_spec")
    assert body["errors"][0]["pointer"] == "/prefix"
    problem(client.post("/v1/datasets:import", json={"name": "x", "prefix": "other"}), 404, "not_found")
