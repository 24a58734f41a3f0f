"""Keys of a cluster's API: which routes are open, what a wrong key gets, and that no server is asked before the key."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.errors import InvalidSettings
from cffa_core.settings import Settings
from services.api.app import create_app
from services.api.keys import OPEN, Keys
from tests.api.driving import URL, problem

KEY = "k" * 40
NOWHERE: dict[str, Any] = {
    "mode": "cluster",
    "database_url": "postgresql+psycopg://cffa@127.0.0.1:9/cffa",
    "broker_url": "redis://127.0.0.1:9/0",
    "s3_endpoint": "http://127.0.0.1:9",
    "s3_access_key": "cffa",
    "s3_secret_key": "only-for-servers-on-loopback",
    "sweep_seconds": 3600.0,
}
# Routes that are no operation of the API: the page.
PAGE = {("get", "/"), ("get", "/web/index.html"), ("get", "/web/page.js"), ("get", "/openapi.json")}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A cluster's API whose servers do not answer."""
    settings = Settings(home=tmp_path_factory.mktemp("keyed"), bootstrap_key=KEY, **NOWHERE)
    with TestClient(create_app(settings), base_url=URL, raise_server_exceptions=False) as opened:
        yield opened


@cache
def closed_operations() -> list[tuple[str, str]]:
    app = create_app(Settings(home=Path("unused"), bootstrap_key=KEY, **NOWHERE))
    listed = {(method, path) for path, item in app.openapi()["paths"].items() for method in item}
    return sorted((method, re.sub(r"\{[^}]*\}", "0", path)) for method, path in listed if path not in OPEN)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), closed_operations())
def test_every_operation_needs_the_key(keyed: TestClient, method: str, path: str) -> None:
    wrong = ({}, bearer("x" * 40), bearer(KEY[:-1]), bearer(""), {"Authorization": KEY}, {"Authorization": "Basic a"})
    for headers in wrong:
        answer = keyed.request(method, path, headers=headers)
        if method == "head":
            assert (answer.status_code, "www-authenticate" in answer.headers) == (401, True)
            continue
        problem(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="cffa"'


def test_there_are_operations_to_close() -> None:
    assert len(closed_operations()) > 25
    assert ("post", "/v1/datasets") in closed_operations()
    assert not [path for _, path in closed_operations() if "blobs" in path]


@pytest.mark.parametrize("path", ["/v1/blobs/token", "/v1/nonsense", "/docs", "/web/%2e%2e/v1/jobs"])
def test_unknown_paths_are_closed_too(keyed: TestClient, path: str) -> None:
    problem(keyed.get(path), 401, "unauthorized")
    problem(keyed.get(path, headers=bearer(KEY)), 404, "no_such_route")


@pytest.mark.parametrize("path", sorted(OPEN - {"/readyz", "/metrics"}))
def test_open_paths_need_none(keyed: TestClient, path: str) -> None:
    assert keyed.get(path).status_code == 200


def test_readiness_and_metrics_need_no_key_to_say_no(keyed: TestClient) -> None:
    body = problem(keyed.get("/readyz"), 503, "storage_unavailable")
    assert [item["pointer"] for item in body["errors"]] == ["record", "storage"]
    problem(keyed.get("/metrics"), 503, "storage_unavailable")


def test_the_right_key_comes_as_far_as_the_record(keyed: TestClient) -> None:
    for headers in (bearer(KEY), {"Authorization": f"bearer  {KEY} "}):
        problem(keyed.get("/v1/jobs", headers=headers), 503, "storage_unavailable")


def test_the_document_says_so(keyed: TestClient) -> None:
    document = keyed.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in document["paths"].items():
        for operation in item.values():
            assert ("401" in operation["responses"], "security" in operation) == (path not in OPEN,) * 2, path


def test_other_host_names_and_pages_are_fine_with_a_key(keyed: TestClient) -> None:
    headers = bearer(KEY) | {"Host": "cffa.example.org", "Origin": "https://proxy.example.org"}
    problem(keyed.post("/v1/jobs/job_00000000000000000000:cancel", headers=headers), 503, "storage_unavailable")


def test_the_key_is_in_no_log(keyed: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        keyed.get("/v1/jobs", headers=bearer(KEY))
        keyed.get("/v1/jobs", headers=bearer("wrong" * 8))
    assert "/v1/jobs" in caplog.text
    assert KEY not in caplog.text and "wrong" * 8 not in caplog.text


def test_a_cluster_without_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="CFFA_BOOTSTRAP_KEY"):
        create_app(Settings(home=tmp_path, **NOWHERE))


def test_an_owner_per_key() -> None:
    keys = Keys(Settings(bootstrap_key=KEY, **NOWHERE))
    assert keys.owner_of(KEY) == "admin"
    assert [keys.owner_of(key) for key in ("", KEY + "x", KEY.upper(), "ä" * 40)] == [None] * 4
