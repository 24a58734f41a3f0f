"""Uploads: what is taken in, what is refused and how, and that a refusal leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from cffa_core.errors import StorageUnavailable
from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import create_app
from tests.api.driving import good_upload, png, problem, zipped


def post(client: TestClient, data: bytes, **fields: str) -> Any:
    form = {"name": "clinic A"} | fields
    return client.post("/v1/datasets", files={"file": ("set.zip", data, "application/zip")}, data=form)


def everything_stored(backend: Backend) -> list[str]:
    files = [path for path in backend.settings.objects_dir.rglob("*") if path.is_file()]
    uploads = backend.settings.scratch_dir / "uploads"
    return [str(path) for path in [*files, *(uploads.rglob("*") if uploads.exists() else [])]]


def assert_nothing_taken_in(client: TestClient, backend: Backend) -> None:
    assert client.get("/v1/datasets").json()["items"] == []
    assert everything_stored(backend) == []


def test_a_good_upload_becomes_a_data_set(client: TestClient) -> None:
    response = post(client, good_upload(3))
    assert response.status_code == 201
    body = response.json()
    assert response.headers["location"] == f"/v1/datasets/{body['id']}"
    assert (body["name"], body["pairs"]) == ("clinic A", 3)
    assert client.get(response.headers["location"]).json() == body
    report = client.get(body["links"]["report"]).json()
    assert report["ok"] is True and report["counts"]["pairs"] == 3


def with_masks(side: int = 48) -> bytes:
    """A zip of three pairs with vessel masks, the last of which has this side."""
    members = {f"masks/vessel/m{i:03d}.png": png(9 + i, colour=False, side=side if i == 2 else 48) for i in range(3)}
    members |= {f"cf/m{i:03d}.png": png(i) for i in range(3)}
    return zipped(members | {f"fa/m{i:03d}.png": png(i, colour=False) for i in range(3)})


def test_vessel_masks_are_stored_with_their_pairs(client: TestClient, backend: Backend) -> None:
    body = post(client, with_masks()).json()
    report = client.get(body["links"]["report"]).json()
    assert [pair["masks"] for pair in report["pairs"]] == [["vessel"]] * 3
    stored = backend.store.get_dataset("local", body["id"]).stored.files
    assert {f"masks/vessel/m{i:03d}.png" for i in range(3)} <= set(stored)


def test_a_mask_of_another_size_is_named(client: TestClient, backend: Backend) -> None:
    body = problem(post(client, with_masks(side=40)), 422, "invalid_dataset")
    assert [(item["pointer"], item["code"]) for item in body["errors"]] == [("masks/vessel/m002.png", "mask_size")]
    assert_nothing_taken_in(client, backend)


def test_pairs_link_to_the_images_that_were_sent(client: TestClient) -> None:
    dataset_id = post(client, good_upload(3)).json()["id"]
    page = client.get(f"/v1/datasets/{dataset_id}/pairs", params={"page_size": 2}).json()
    rest = client.get(
        f"/v1/datasets/{dataset_id}/pairs", params={"page_size": 2, "page_token": page["next_page_token"]}
    ).json()
    assert [pair["name"] for pair in page["items"] + rest["items"]] == ["m000", "m001", "m002"]
    assert rest["next_page_token"] is None
    served = client.get(page["items"][1]["cf_url"]).content
    pixels = cv2.imdecode(np.frombuffer(served, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(pixels, cv2.imdecode(np.frombuffer(png(1), np.uint8), cv2.IMREAD_COLOR))


def test_listing_is_newest_first_and_paged(client: TestClient) -> None:
    made = [post(client, good_upload(2), name=f"set {n}").json()["id"] for n in range(3)]
    first = client.get("/v1/datasets", params={"page_size": 2}).json()
    second = client.get("/v1/datasets", params={"page_size": 2, "page_token": first["next_page_token"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == made[::-1]


def test_eye_pattern_groups_pairs(client: TestClient) -> None:
    members = {}
    for name in ("p1_a", "p1_b", "p2_a"):
        members |= {f"cf/{name}.png": png(len(members)), f"fa/{name}.png": png(len(members), colour=False)}
    made = post(client, zipped(members), eye_pattern="^p[0-9]+").json()
    pairs = client.get(f"/v1/datasets/{made['id']}/pairs").json()["items"]
    assert [pair["eye"] for pair in pairs] == ["p1", "p1", "p2"]


def test_patient_pattern_tells_patients(client: TestClient) -> None:
    members = {}
    for name in ("p1_OD", "p1_OS", "p2_OD"):
        members |= {f"cf/{name}.png": png(len(members)), f"fa/{name}.png": png(len(members), colour=False)}
    made = post(client, zipped(members), patient_pattern="^(p[0-9]+)_").json()
    pairs = client.get(f"/v1/datasets/{made['id']}/pairs").json()["items"]
    assert [(pair["eye"], pair["patient"]) for pair in pairs] == [("p1_OD", "p1"), ("p1_OS", "p1"), ("p2_OD", "p2")]
    report = client.get(made["links"]["report"]).json()
    assert (report["counts"]["patients"], [pair["patient"] for pair in report["pairs"]]) == (2, ["p1", "p1", "p2"])
    plain = post(client, zipped(members)).json()
    assert {pair["patient"] for pair in client.get(f"/v1/datasets/{plain['id']}/pairs").json()["items"]} == {None}
    assert plain["digest"] != made["digest"]


def test_every_problem_is_named_at_once_and_nothing_is_taken_in(client: TestClient, backend: Backend) -> None:
    members = {f"{m}/good{n}.png": png(n, colour=m == "cf") for n in range(3) for m in ("cf", "fa")}
    members["cf/orphan.png"] = png(9)
    members["cf/text.png"] = b"this is not an image"
    members["fa/text.png"] = png(10, colour=False)
    members["cf/unequal.png"] = png(11, side=48)
    members["fa/unequal.png"] = png(12, side=40, colour=False)
    members["cf/cut.png"] = png(13)[:400]
    members["fa/cut.png"] = png(13, colour=False)
    members["cf/dot.png"] = png(14, side=1)
    members["fa/dot.png"] = png(14, side=1, colour=False)
    members["../outside.png"] = png(15)
    members["/absolute.png"] = png(16)
    body = problem(post(client, zipped(members)), 422, "invalid_dataset")
    named = {item["pointer"] for item in body["errors"]}
    expected = {"cf/orphan.png", "cf/text.png", "fa/unequal.png", "cf/cut.png", "cf/dot.png", "fa/dot.png"}
    assert expected <= named
    assert any("outside.png" in pointer for pointer in named)
    assert any("absolute.png" in pointer for pointer in named)
    assert not any("good" in pointer for pointer in named)
    assert all(item["code"] and item["message"] for item in body["errors"])
    assert body["retryable"] is False
    assert_nothing_taken_in(client, backend)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty file"),
        pytest.param(b"PK\x03\x04 not a zip at all" * 10, id="broken zip"),
        pytest.param(zipped({}), id="empty archive"),
    ],
)
def test_archives_without_a_data_set_in_them(client: TestClient, backend: Backend, data: bytes) -> None:
    body = problem(post(client, data), 422, "invalid_dataset")
    assert body["errors"]
    assert_nothing_taken_in(client, backend)


def test_a_zip_bomb_is_refused(client: TestClient, backend: Backend) -> None:
    buffer = BytesIO(good_upload(2))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cf/bomb.png", bytes(40 << 20))
    body = problem(post(client, buffer.getvalue()), 422, "invalid_dataset")
    assert any(item["pointer"] == "cf/bomb.png" for item in body["errors"])
    assert_nothing_taken_in(client, backend)


def test_the_size_cap_holds_while_the_body_streams(client: TestClient, backend: Backend) -> None:
    sent = 0

    def body() -> Any:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="set.zip"\r\n\r\n'
        for _ in range(64):
            sent += 1 << 20
            yield bytes(1 << 20)
        yield b"\r\n--x--\r\n"

    response = client.post("/v1/datasets", content=body(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    problem(response, 413, "payload_too_large")
    assert_nothing_taken_in(client, backend)


def test_a_declared_size_over_the_cap_is_refused_unread(client: TestClient, backend: Backend) -> None:
    problem(post(client, bytes(5 << 20)), 413, "payload_too_large")
    assert_nothing_taken_in(client, backend)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"abc", "multipart/form-data"),
        (b"garbage", "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf',
            "multipart/form-data; boundary=x",
        ),
        (b"--" + b"y" * 300, f"multipart/form-data; boundary={'y' * 300}"),
    ],
)
def test_bodies_that_are_no_multipart(client: TestClient, backend: Backend, body: bytes, kind: str) -> None:
    problem(client.post("/v1/datasets", content=body, headers={"Content-Type": kind}), 400, "bad_request")
    assert_nothing_taken_in(client, backend)


def test_a_body_of_another_kind_is_another_matter(client: TestClient, backend: Backend) -> None:
    response = client.post("/v1/datasets", content=b"{}", headers={"Content-Type": "application/json"})
    problem(response, 415, "unsupported_media_type")
    assert_nothing_taken_in(client, backend)


def test_form_problems_are_named_together(client: TestClient, backend: Backend) -> None:
    response = client.post("/v1/datasets", files={"other": ("x.zip", b"x")}, data={"colour": "red"})
    body = problem(response, 422, "invalid_spec")
    assert {item["pointer"] for item in body["errors"]} == {"/file", "/name", "/other", "/colour"}
    assert_nothing_taken_in(client, backend)


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"name": " "}, "/name"),
        ({"name": "a" * 201}, "/name"),
        ({"name": "bell\x07"}, "/name"),
        ({"eye_pattern": "a" * 201}, "/eye_pattern"),
        ({"patient_pattern": "a" * 201}, "/patient_pattern"),
        ({"patient_pattern": "bell\x07"}, "/patient_pattern"),
    ],
)
def test_bad_form_fields(client: TestClient, fields: dict[str, str], pointer: str) -> None:
    body = problem(post(client, good_upload(2), **fields), 422, "invalid_spec")
    assert [item["pointer"] for item in body["errors"]] == [pointer]


@pytest.mark.parametrize("field", ["eye_pattern", "patient_pattern"])
def test_a_bad_pattern_is_named(client: TestClient, backend: Backend, field: str) -> None:
    body = problem(post(client, good_upload(2), **{field: "(unclosed"}), 422, "invalid_dataset")
    assert [(item["pointer"], item["code"]) for item in body["errors"]] == [(f"/{field}", f"bad_{field}")]
    assert_nothing_taken_in(client, backend)


def test_what_a_full_disk_leaves_is_removed(client: TestClient, backend: Backend, monkeypatch: Any) -> None:
    real = backend.objects.put_file
    stored: list[str] = []

    def filling(key: str, path: Path) -> Any:
        if len(stored) == 3:
            raise StorageUnavailable(f"no space left for {path}")
        stored.append(key)
        return real(key, path)

    monkeypatch.setattr(backend.objects, "put_file", filling)
    response = post(client, good_upload(3))
    body = problem(response, 503, "storage_unavailable")
    assert body["retryable"] is True and int(response.headers["retry-after"]) > 0
    assert str(backend.settings.home) not in response.text
    assert len(stored) == 3
    assert_nothing_taken_in(client, backend)


def test_the_same_idempotency_key_takes_a_data_set_in_once(client: TestClient) -> None:
    def send(data: bytes, key: str = "k1") -> httpx2.Response:
        files = {"file": ("set.zip", data)}
        return client.post("/v1/datasets", files=files, data={"name": "A"}, headers={"Idempotency-Key": key})

    first, again, other = send(good_upload(2)), send(good_upload(2)), send(good_upload(2), "k2")
    assert again.status_code == first.status_code == 201
    assert again.json() == first.json()
    assert other.json()["id"] != first.json()["id"]
    problem(send(good_upload(3)), 422, "idempotency_key_reused")
    assert len(client.get("/v1/datasets").json()["items"]) == 2


def test_one_upload_sent_twice_at_once_is_taken_in_once(client: TestClient, backend: Backend) -> None:
    def send(_: int) -> Any:
        files = {"file": ("set.zip", good_upload(2))}
        return client.post("/v1/datasets", files=files, data={"name": "A"}, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(send, range(2)))
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    kept = set(backend.objects.list("datasets/"))
    (made,) = backend.store.list_datasets("local").items
    assert kept == {info.key for info in made.stored.files.values()}


def test_abandoned_uploads_are_removed_at_the_next_start(settings: Settings) -> None:
    uploads = settings.scratch_dir / "uploads"
    for name, age in (("old", 2 * 86_400), ("new", 60)):
        (uploads / name).mkdir(parents=True)
        os.utime(uploads / name, (time.time() - age, time.time() - age))
    with TestClient(create_app(settings)):
        assert [path.name for path in uploads.iterdir()] == ["new"]


def test_unknown_data_sets(client: TestClient) -> None:
    unknown = "ds_" + hashlib.sha256(b"x").hexdigest()[:20]
    for path in (f"/v1/datasets/{unknown}", f"/v1/datasets/{unknown}/pairs", f"/v1/datasets/{unknown}/report"):
        problem(client.get(path), 404, "not_found")
    bad = client.get(f"/v1/datasets/{post(client, good_upload(2)).json()['id']}/pairs", params={"page_token": "-1"})
    assert problem(bad, 422, "invalid_spec")["errors"][0]["pointer"] == "?page_token"
