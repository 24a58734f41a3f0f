"""Keys of a cluster's API: which routes are open, what a wrong key gets, and that no server is asked before the key."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from cffa_core.errors import InvalidSettings
from cffa_core.people.keys import Scope, new_key
from cffa_core.settings import Settings
from services.api import keys
from services.api.app import create_app
from services.api.keys import OPEN
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
    "key_secret": "s" * 40,
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
            said = ["security" in operation, *(status in operation["responses"] for status in ("401", "403", "429"))]
            assert said == [path not in OPEN] * 4, path


def test_other_host_names_and_pages_are_fine_with_a_key(keyed: TestClient) -> None:
    headers = bearer(KEY) | {"Host": "cffa.example.org", "Origin": "https://proxy.example.org"}
    problem(keyed.post("/v1/jobs/job_00000000000000000000:cancel", headers=headers), 503, "storage_unavailable")


def test_the_key_is_in_no_log(keyed: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        keyed.get("/v1/jobs", headers=bearer(KEY))
        keyed.get("/v1/jobs", headers=bearer("wrong" * 8))
    assert "/v1/jobs" in caplog.text
    assert KEY not in caplog.text and "wrong" * 8 not in caplog.text


def test_a_well_formed_key_is_asked_about_and_a_mistyped_one_is_not(keyed: TestClient) -> None:
    key = new_key()
    problem(keyed.get("/v1/jobs", headers=bearer(key)), 503, "storage_unavailable")
    problem(keyed.get("/v1/jobs", headers=bearer(key[:-1] + "!")), 401, "unauthorized")
    problem(keyed.get("/v1/jobs", headers=bearer(key[:20] + key[21:])), 401, "unauthorized")


def test_a_cluster_without_a_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="CFFA_KEY_SECRET"):
        create_app(Settings(home=tmp_path, **(NOWHERE | {"key_secret": ""})))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_secret", "changeme"),
        ("key_secret", "x" * 31),
        ("bootstrap_key", "secret"),
        ("bootstrap_key", "x" * 31),
        ("s3_secret_key", "minioadmin"),
        ("s3_secret_key", "x" * 15),
    ],
)
def test_a_cluster_refuses_default_and_short_secrets(name: str, value: str) -> None:
    with pytest.raises(ValidationError, match=f"CFFA_{name.upper()} is a default or shorter") as caught:
        Settings(**(NOWHERE | {name: value}))
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"database_password": "Postgres"},
        {"database_url": "postgresql+psycopg://cffa:cffa@127.0.0.1:9/cffa"},
        {"broker_password": "changeme"},
        {"broker_url": "redis://:foobared@127.0.0.1:9/0"},
    ],
)
def test_a_cluster_refuses_default_passwords_of_its_servers(given: dict[str, str]) -> None:
    name = next(iter(given)).partition("_")[0]
    with pytest.raises(ValidationError, match=f"the password of CFFA_{name.upper()}_URL is one that everybody knows"):
        Settings(**(NOWHERE | given))


def test_embedded_with_keys_refuses_them_too(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="CFFA_BOOTSTRAP_KEY"):
        Settings(home=tmp_path, require_keys=True, bootstrap_key="short")


def test_the_bootstrap_key_is_compared_as_a_digest_in_constant_time(
    keyed: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def spy(given: Any, right: Any) -> bool:
        compared.append((given, right))
        return real(given, right)

    monkeypatch.setattr(keys.hmac, "compare_digest", spy)
    guesses = [KEY, "k", KEY[:-1] + "x", KEY * 3, "ä" * 40]
    for guess in guesses:
        keyed.get("/v1/jobs", headers={"Authorization": f"Bearer {guess}".encode()})
    assert len(compared) == len(guesses)
    assert {len(given) for given, _ in compared} == {32} and len({right for _, right in compared}) == 1


def test_scopes_by_method_and_path() -> None:
    for method, path, needed in (
        ("GET", "/v1/jobs", Scope.VIEWER),
        ("HEAD", "/v1/jobs/x/pairs/0/cf.png", Scope.VIEWER),
        ("POST", "/v1/jobs/x:cancel", Scope.RESEARCHER),
        ("DELETE", "/v1/jobs/x", Scope.RESEARCHER),
        ("PUT", "/v1/whatever-comes-next", Scope.RESEARCHER),
        ("GET", "/v1/me", Scope.VIEWER),
        ("GET", "/v1/api-keys", Scope.RESEARCHER),
        ("DELETE", "/v1/api-keys/x", Scope.RESEARCHER),
        ("GET", "/v1/accounts", Scope.ADMIN),
        ("GET", "/v1/accounts/anna", Scope.ADMIN),
        ("POST", "/v1/accounts/anna:disable", Scope.ADMIN),
        ("GET", "/v1/audit", Scope.ADMIN),
        ("GET", "/v1/accountsx", Scope.VIEWER),
    ):
        assert keys.needed_scope(method, path) is needed, (method, path)
