"""Signed links: what they serve, in which pieces, until when; and the byte ranges under them."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from fastapi.testclient import TestClient

from services.api.access import Backend
from services.api.problems import RangeNotSatisfiable
from services.api.ranges import parse_range
from tests.api.driving import problem, sha256

DATA = bytes(range(256)) * 40
KEY = "jobs/job_0/parts/00000/a1/pairs.zip"


@pytest.fixture
def url(backend: Backend) -> str:
    info = backend.objects.put_bytes(KEY, DATA)
    return backend.objects.download_url(KEY, expires_seconds=60, filename='p a"i.zip', sha256=info.sha256)


def test_a_link_serves_the_whole_object(client: TestClient, url: str) -> None:
    answer = client.get(url)
    assert answer.content == DATA
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["etag"] == f'"{sha256(DATA)}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"p_a_i.zip\"; filename*=UTF-8''p%20a%22i.zip"
    )


@pytest.mark.parametrize(("name", "kind"), [("p.zip", "application/zip"), ("card.json", "application/json")])
def test_an_object_is_of_a_kind_that_the_document_allows(
    client: TestClient, backend: Backend, name: str, kind: str
) -> None:
    info = backend.objects.put_bytes(KEY, DATA)
    answer = client.get(backend.objects.download_url(KEY, expires_seconds=60, filename=name, sha256=info.sha256))
    assert answer.headers["content-type"] == kind
    described = client.get("/openapi.json").json()["paths"]["/v1/blobs/{token}"]
    for method in ("get", "head"):
        allowed = described[method]["responses"]["200"]["content"]
        assert any(fnmatchcase(kind, pattern) for pattern in allowed), (method, list(allowed))


def test_head_serves_no_bytes(client: TestClient, url: str) -> None:
    answer = client.head(url)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["etag"] == f'"{sha256(DATA)}"'


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=100-199", 100, 199),
        ("bytes=10000-", 10000, len(DATA) - 1),
        ("bytes=-5", len(DATA) - 5, len(DATA) - 1),
        ("bytes=5-999999", 5, len(DATA) - 1),
        ("BYTES=1-2", 1, 2),
    ],
)
def test_a_range_serves_its_bytes(client: TestClient, url: str, asked: str, first: int, last: int) -> None:
    answer = client.get(url, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == DATA[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(DATA)}"
    assert answer.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes=5-1", "bytes=-", "lines=1-2", "bytes=0-1,5-6", "bytes=a-b", "bytes = 1-2"])
def test_ranges_that_are_none_serve_everything(client: TestClient, url: str, asked: str) -> None:
    answer = client.get(url, headers={"Range": asked})
    assert (answer.status_code, len(answer.content)) == (200, len(DATA))


@pytest.mark.parametrize("asked", [f"bytes={len(DATA)}-", "bytes=99999-999999", "bytes=-0"])
def test_ranges_outside_the_object(client: TestClient, url: str, asked: str) -> None:
    answer = client.get(url, headers={"Range": asked})
    problem(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


def test_a_broken_download_resumes_only_the_same_object(client: TestClient, url: str) -> None:
    same = {"Range": "bytes=7-", "If-Range": f'"{sha256(DATA)}"'}
    assert client.get(url, headers=same).content == DATA[7:]
    other = {"Range": "bytes=7-", "If-Range": f'"{sha256(b"other")}"'}
    answer = client.get(url, headers=other)
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_known_object_is_not_sent_again(client: TestClient, url: str) -> None:
    answer = client.get(url, headers={"If-None-Match": f'"x", W/"{sha256(DATA)}"'})
    assert (answer.status_code, answer.content) == (304, b"")


def test_an_expired_link_is_gone(client: TestClient, backend: Backend, url: str) -> None:
    token = backend.objects.token(KEY, "GET", "pairs.zip", -1)
    problem(client.get(f"/v1/blobs/{token}"), 410, "gone")


def test_a_deleted_object_is_gone(client: TestClient, backend: Backend, url: str) -> None:
    backend.objects.delete(KEY)
    problem(client.get(url), 410, "gone")


def test_forged_links_lead_nowhere(client: TestClient, backend: Backend, url: str) -> None:
    token = url.rsplit("/", 1)[1]
    body, signature = token.split(".")
    upload = backend.objects.token(KEY, "PUT", "pairs.zip", 60)
    forged = [
        upload,
        body,
        f"{body}.",
        f"{body}.{signature[:-4]}AAAA",
        f"{body[:-4]}AAAA.{signature}",
        "a.b.c",
        "é.ü",
        "x",
    ]
    for wrong in forged:
        problem(client.get(f"/v1/blobs/{wrong}"), 404, "not_found")


def test_links_are_read_only(client: TestClient, url: str) -> None:
    problem(client.put(url, content=b"x"), 404, "not_found")
    problem(client.post(url, content=b"x"), 405, "method_not_allowed")


def test_an_empty_object(client: TestClient, backend: Backend) -> None:
    backend.objects.put_bytes("jobs/job_0/empty", b"")
    empty = backend.objects.download_url("jobs/job_0/empty", expires_seconds=60, filename="empty")
    answer = client.get(empty)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
    assert "etag" not in answer.headers
    problem(client.get(empty, headers={"Range": "bytes=0-"}), 416, "range_not_satisfiable")


def test_ranges_of_huge_objects_do_not_overflow() -> None:
    terabyte = 2**40
    assert parse_range(f"bytes={terabyte - 1}-", terabyte) == (terabyte - 1, 1)
    assert parse_range("bytes=" + "9" * 19 + "-", terabyte) is None
    with pytest.raises(RangeNotSatisfiable):
        parse_range("bytes=" + "9" * 18 + "-", terabyte)
