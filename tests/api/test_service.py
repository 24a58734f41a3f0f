"""The frame around the routes: errors of the framework, health, request ids, log, origin checks, page, start."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from cffa_core.errors import InvalidSettings, StorageUnavailable
from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import create_app
from tests.api.conftest import fresh_home
from tests.api.driving import URL, Worker, problem


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_unknown_routes_and_methods_are_problems(plain_client: TestClient) -> None:
    problem(plain_client.get("/v1/nonsense"), 404, "no_such_route")
    refused = plain_client.put("/v1/jobs")
    problem(refused, 405, "method_not_allowed")
    assert "GET" in refused.headers["allow"]


def test_unexpected_errors_say_nothing(client: TestClient, backend: Backend, monkeypatch: Any, caplog: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(backend.store, "list_jobs", broken)
    answer = client.get("/v1/jobs")
    body = problem(answer, 500, "internal")
    assert "hunter2" not in answer.text and "Traceback" not in answer.text
    logged = [record for record in caplog.records if record.exc_info and body["request_id"] in record.getMessage()]
    assert "hunter2" in str(logged[0].exc_info[1])


def test_health(client: TestClient, backend: Backend, monkeypatch: Any) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok", "checks": {"record": "ok", "storage": "ok"}}
    assert list(backend.objects.list("health/")) == []

    def down(*_: Any) -> None:
        raise StorageUnavailable("/somewhere/record.sqlite is on fire")

    monkeypatch.setattr(backend.store, "ping", down)
    monkeypatch.setattr(backend.objects, "put_bytes", down)
    answer = client.get("/readyz")
    body = problem(answer, 503, "storage_unavailable")
    assert [item["pointer"] for item in body["errors"]] == ["record", "storage"]
    assert "retry-after" in answer.headers and "somewhere" not in answer.text
    assert client.get("/livez").status_code == 200


def test_queue_and_workers(client: TestClient, worker: Worker, generation: str) -> None:
    worker.store.register_worker("worker-1", {"device": "cpu"})
    queue = client.get("/v1/queue").json()
    assert (queue["waiting"], queue["running"], queue["workers"]) == (1, 0, 1)
    assert queue["kinds"]["generation"]["waiting_units"] == 3
    worker.claim()
    assert client.get("/v1/queue").json()["running"] == 1
    items = client.get("/v1/workers").json()["items"]
    assert [(item["id"], item["info"]) for item in items] == [("worker-1", {"device": "cpu"})]


def test_the_sweeper_returns_the_work_of_a_lost_worker(client: TestClient, backend: Backend, generation: str) -> None:
    assert backend.store.claim("gone", [Kind.GENERATION], lease_seconds=0.2) is not None
    wait_until(lambda: client.get(f"/v1/jobs/{generation}").json()["reason"] == "worker_lost")
    events = client.get(f"/v1/jobs/{generation}/events").json()["items"]
    assert any("worker_lost" in json.dumps(event) for event in events)


def test_a_job_of_a_newer_version_is_said_to_be_one(client: TestClient, backend: Backend, generation: str) -> None:
    with closing(sqlite3.connect(backend.settings.home / "record.sqlite")) as record, record:
        record.execute("UPDATE jobs SET spec_version = 99")
    for path in (f"/v1/jobs/{generation}", "/v1/jobs"):
        answer = client.get(path)
        assert "a newer version of the service wrote this" in problem(answer, 503, "version_too_old")["detail"]
        assert "retry-after" in answer.headers


def test_request_ids(plain_client: TestClient) -> None:
    assert plain_client.get("/livez", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [plain_client.get("/livez", headers={"X-Request-ID": "no good\t"}).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(len(value) == 32 for value in made)


def test_one_structured_line_per_request(plain_client: TestClient, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "cffa.api.access"):
        plain_client.get("/v1/jobs?kind=training", headers={"X-Request-ID": "line-1"})
        plain_client.get("/v1/blobs/very.secret.token")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "cffa.api.access"]
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/jobs", 200), ("/v1/blobs/...", 404)]
    assert lines[0]["request_id"] == "line-1" and lines[0]["ms"] >= 0 and lines[0]["method"] == "GET"


def test_other_host_names_are_refused(plain_client: TestClient) -> None:
    problem(plain_client.get("/v1/jobs", headers={"Host": "rebound.example.org"}), 403, "forbidden")
    for host in ("localhost:8008", "127.0.0.1", "[::1]:8008"):
        assert plain_client.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example.org"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_other_sites_may_not_change_anything(client: TestClient, generation: str, headers: dict[str, str]) -> None:
    problem(client.post(f"/v1/jobs/{generation}:cancel", headers=headers), 403, "forbidden")
    assert client.get(f"/v1/jobs/{generation}", headers=headers).json()["state"] == "queued"


def test_the_own_page_may(client: TestClient, generation: str) -> None:
    headers = {"Origin": URL, "Sec-Fetch-Site": "same-origin"}
    assert client.post(f"/v1/jobs/{generation}:cancel", headers=headers).status_code == 200


def test_the_page_is_served_under_a_strict_policy(plain_client: TestClient) -> None:
    page = plain_client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")):
        assert f"web/{name}" in page.text
        answer = plain_client.get(f"/web/{name}")
        assert answer.headers["content-type"].startswith(kind)
        assert plain_client.get(f"/web/{name}", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert "://" not in page.text and "onclick=" not in page.text and "style=" not in page.text
    problem(plain_client.get("/web/..%2fapi%2fapp.py"), 404, "no_such_route")
    problem(plain_client.get("/web/index.htm"), 404, "not_found")


def test_security_headers_are_on_every_answer(plain_client: TestClient) -> None:
    for path in ("/", "/v1/jobs", "/v1/nonsense", "/openapi.json"):
        headers = plain_client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_keyless_api_listens_on_loopback_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidSettings, match="CFFA_ALLOW_REMOTE"):
        create_app(Settings(home=tmp_path, host=host))
    create_app(Settings(home=tmp_path, host=host, allow_remote=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_no_permission(tmp_path: Path, host: str) -> None:
    create_app(Settings(home=tmp_path, host=host))


def test_the_public_address_is_answered_under_and_linked_to(settings: Settings) -> None:
    public = settings.model_copy(update={"public_url": "https://cffa.example.org/"})
    with TestClient(create_app(public), base_url="https://cffa.example.org") as client:
        backend = client.app.state.backend  # type: ignore[attr-defined]
        backend.objects.put_bytes("jobs/x", b"data")
        link = backend.objects.download_url("jobs/x", expires_seconds=60, filename="x")
        assert link.startswith("https://cffa.example.org/v1/blobs/")
        assert client.get(link).content == b"data"
        problem(client.get("/livez", headers={"Host": "other.example.org"}), 403, "forbidden")


def test_creating_the_application_touches_nothing(tmp_path: Path) -> None:
    create_app(Settings(home=tmp_path / "home"))
    assert list(tmp_path.iterdir()) == []


def test_importing_the_api_brings_no_torch() -> None:
    code = (
        "import sys, services.api.app, services.api.__main__\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_process_starts_serves_and_ends_cleanly(tmp_path: Path, migrated: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = fresh_home(tmp_path, migrated).home
    environment = os.environ | {"CFFA_HOME": str(home), "CFFA_PORT": str(port)}
    command = [sys.executable, "-m", "services.api"]
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
    ):
        try:
            wait_until(lambda: answers(http) or process.poll() is not None)
            assert http.get("/readyz").status_code == 200
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert '"path": "/readyz", "status": 200' in log


def answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/livez").status_code == 200
    except httpx2.TransportError:
        return False


def test_the_process_refuses_to_listen_beyond_loopback(tmp_path: Path) -> None:
    environment = os.environ | {"CFFA_HOME": str(tmp_path / "home"), "CFFA_HOST": "0.0.0.0"}
    done = subprocess.run(
        [sys.executable, "-m", "services.api"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "CFFA_ALLOW_REMOTE" in done.stderr and "Traceback" not in done.stderr
