"""Ids, tokens, names and bodies that were made to reach something else: refused with a problem, on every route."""

from __future__ import annotations

import itertools
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.security.conftest import MAX_RSS, Watched

ELSEWHERE = (
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "....//....//etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/passwd",
    "file:///etc/passwd",
    "job_0000000000000000000/../../x",
    "job_00000000000000000000\0",
    "ds_00000000000000000000/../../secret",
    "' OR 1=1 --",
    "${jndi:ldap://127.0.0.1/a}",
    "{{7*7}}",
    "\u202e\ud7ff\ufeff",
    "x" * 3000,
    "0" * 25,
    "-1",
    "9" * 40,
)
# What a base or hub name must never make a worker open or fetch.
NOT_BASES = (
    "http://169.254.169.254/latest/meta-data",
    "https://127.0.0.1:8008/v1/jobs",
    "file:///etc/passwd",
    "//attacker.example/x",
    "s3://other-bucket/bases/x",
    "../../etc",
    "/etc",
    "~/secrets",
    "tiny/..",
    "a/../../b",
    "a/b/c",
    "a/.git",
    "127.0.0.1:6379/x",
    "user@host/x",
    "a/b?revision=x",
    "a/b#x",
    "hf://owner/name",
    "a\nb/c",
    "a/b%2f..",
    "",
)
WANTED = {400, 401, 403, 404, 405, 409, 410, 413, 414, 415, 422}
OTHER_ID = "ds_00000000000000000000"
EACH = 4


def operations(http: httpx.Client) -> list[tuple[str, str, dict[str, Any]]]:
    document = http.get("/openapi.json").json()
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in ("get", "head", "post", "put", "patch", "delete")
    ]


def refused(answer: httpx.Response, what: object) -> None:
    assert answer.status_code in WANTED, (what, answer.status_code, answer.text[:500])
    if answer.request.method != "HEAD":
        assert answer.headers["content-type"] == "application/problem+json", (what, answer.text[:500])
        assert "root:" not in answer.text, what


def test_no_path_parameter_leads_elsewhere(http: httpx.Client) -> None:
    """Escaped, so that it reaches the route as one segment, and as it stands; each route gets some, all are used."""
    values = itertools.cycle(ELSEWHERE)
    sent = set()
    for method, path, operation in operations(http):
        names = [item["name"] for item in operation.get("parameters", []) if item["in"] == "path"]
        for name, value in itertools.product(names, itertools.islice(values, EACH)):
            others = {other: {"modality": "cf", "index": "0", "number": "0"}.get(other, OTHER_ID) for other in names}
            for shown in {quote(value, safe=""), quote(value, safe="/%:")}:
                url = path
                for other, plain in (others | {name: shown}).items():
                    url = url.replace(f"{{{other}}}", plain)
                refused(
                    http.request(method, url, json={} if method in ("post", "put", "patch") else None), (method, url)
                )
                sent.add(value)
    assert sent == set(ELSEWHERE)


def test_no_query_parameter_leads_elsewhere(http: httpx.Client) -> None:
    values = itertools.cycle(ELSEWHERE)
    for method, path, operation in operations(http):
        for item in operation.get("parameters", []):
            if method == "get" and "{" not in path and item["in"] == "query":
                for value in itertools.islice(values, EACH):
                    answer = http.get(path, params={item["name"]: value})
                    assert answer.status_code < 500, (path, item["name"], value, answer.text[:300])
                    assert "root:" not in answer.text


@pytest.mark.parametrize("route", ["training-jobs", "evaluation-jobs", "edit-jobs"])
@pytest.mark.parametrize("base", NOT_BASES)
def test_bases_are_names_and_no_addresses(http: httpx.Client, route: str, base: str) -> None:
    ids = {"dataset_id": OTHER_ID} if route != "evaluation-jobs" else {
        "reference_dataset_id": OTHER_ID, "generation_job_id": "job_00000000000000000000"
    }  # fmt: skip
    answer = http.post(f"/v1/{route}", json=ids | {"base": base})
    refused(answer, base)
    assert answer.status_code == 422 and "/base" in {item["pointer"] for item in answer.json()["errors"]}


def test_ids_in_bodies_are_ids(http: httpx.Client) -> None:
    for value in ELSEWHERE:
        for route, name in (
            ("training-jobs", "dataset_id"),
            ("generation-jobs", "model_id"),
            ("evaluation-jobs", "reference_dataset_id"),
            ("evaluation-jobs", "generation_job_id"),
            ("attention-jobs", "model_id"),
            ("captioned-training-jobs", "dataset_id"),
            ("captioned-jobs", "model_id"),
            ("captioned-jobs", "dataset_id"),
            ("edit-jobs", "dataset_id"),
            ("edit-jobs", "generation_job_id"),
            ("edit-jobs", "model_id"),
        ):
            answer = http.post(f"/v1/{route}", json={name: value})
            refused(answer, (name, value))
            assert answer.status_code == 422


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"a":' * 150_000,
        b'{"dataset_id": "' + b"x" * 1_000_000 + b'"}',
        b'{"steps": ' + b"9" * 100_000 + b"}",
        b'{"steps": 1e999}',
        b'{"learning_rate": NaN, "dataset_id": Infinity}',
        b'{"dataset_id": "\\ud800"}',
        b"\xff\xfe\x00",
        b'{"dataset_id": null, "dataset_id": {}}' * 3,
        b"\x80\x04\x95cos\nsystem\n",
    ],
    ids=["lists", "objects", "long", "digits", "huge", "nan", "surrogate", "bytes", "twice", "pickle"],
)
def test_bodies_that_break_parsers(api: Watched, http: httpx.Client, body: bytes) -> None:
    before = api.cpu_seconds()
    answer = http.post("/v1/training-jobs", content=body, headers={"Content-Type": "application/json"})
    refused(answer, body[:40])
    assert api.cpu_seconds() - before < 5 and api.api_peak() < MAX_RSS
    assert http.get("/livez").status_code == 200


def test_a_body_that_says_it_is_packed_is_not_unpacked(http: httpx.Client) -> None:
    import gzip

    packed = gzip.compress(bytes(64 << 20))
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refused(http.post("/v1/training-jobs", content=packed, headers=headers), "gzip")
