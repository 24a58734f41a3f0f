"""Keys on the client's side: where they come from, whom they are sent to, and that they are never shown."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from services.client.cli import app
from services.client.client import CffaClient
from services.client.demo import DemoPlan
from services.client.problems import ApiError

KEY = "abcdef0123456789" * 3
JOB = "job_00000000000000000000"
REFUSED = b'{"code": "unauthorized", "detail": "the key is not one of this service\'s", "request_id": "r1"}'


class Service(ThreadingHTTPServer):
    """Knows one key; redirects `/v1/models/elsewhere` to ``elsewhere``. Notes the keys it was sent by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str | None]] = []
        self.elsewhere = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.path.endswith("elsewhere"):
            self.send_response(307)
            self.send_header("Location", self.server.elsewhere)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        known = self.headers.get("Authorization") == f"Bearer {KEY}"
        body = b'{"items": [], "next_page_token": null}' if known else REFUSED
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json" if known else "application/problem+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def jobs(service: Service, *arguments: str, **variables: str) -> Result:
    cleared = {"CFFA_API_KEY": None, "CFFA_API_KEY_FILE": None, "CFFA_URL": service.url}
    return CliRunner(env=cleared | variables).invoke(app, ["jobs", "--json", *arguments])


def test_the_key_comes_from_an_option_a_variable_or_a_file(service: Service, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "wrong").write_text("x" * 40)
    wrong = str(tmp_path / "wrong")
    for result in (
        jobs(service, "--api-key", KEY, CFFA_API_KEY="x" * 40),
        jobs(service, CFFA_API_KEY=KEY, CFFA_API_KEY_FILE=wrong),
        jobs(service, CFFA_API_KEY_FILE=str(tmp_path / "key")),
    ):
        assert (result.exit_code, result.stdout) == (0, "[]\n"), result.stderr
    assert jobs(service, CFFA_API_KEY_FILE=wrong).exit_code == 1


def test_a_refusal_says_how_to_give_a_key_and_not_which(service: Service) -> None:
    result = jobs(service, CFFA_API_KEY="x" * 40)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the key is not one of this service's; give it with CFFA_API_KEY_FILE")
    assert "x" * 40 not in result.output


@pytest.mark.parametrize("content", [None, "", "two words", "schlüssel", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_key_is_named(service: Service, tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = jobs(service, CFFA_API_KEY_FILE=str(path))
    assert result.exit_code == 1
    assert str(path) in result.stderr and "Traceback" not in result.stderr
    assert "two words" not in result.stderr
    assert service.seen == []


def test_the_key_does_not_follow_a_redirect_to_another_host(service: Service) -> None:
    with Service() as stranger:
        thread = threading.Thread(target=stranger.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        service.elsewhere = f"{stranger.url}/v1/stolen"
        try:
            with CffaClient(service.url, api_key=KEY) as client, pytest.raises(ApiError, match="key"):
                client.model("elsewhere")
        finally:
            stranger.shutdown()
            thread.join()
        assert stranger.seen == [("/v1/stolen", None)]
    assert service.seen == [("/v1/models/elsewhere", f"Bearer {KEY}")]


def test_the_key_is_in_no_log_and_no_description(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), CffaClient(service.url, api_key=KEY) as client:
        assert list(client.jobs()) == []
    assert "GET" in caplog.text
    assert KEY not in caplog.text
    assert KEY not in repr(DemoPlan(url=service.url, api_key=KEY))
