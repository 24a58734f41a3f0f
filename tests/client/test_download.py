"""Downloads against a real HTTP server that breaks off, ignores ranges, or lies about the bytes."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from cffa_core.errors import CorruptArtifact
from services.client.download import fetch
from services.client.problems import ApiGone, ServiceUnreachable

DATA = bytes(n * 7 % 256 for n in range(700_000))
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``data``; closes the connection after ``cut_after`` bytes of a body, as often as ``cuts`` says."""

    data = DATA
    cuts = 0
    cut_after = 300_000
    ranges = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/archive.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.status != 200:
            body = b'{"code": "gone", "detail": "removed", "request_id": "r1", "errors": []}'
            self.send_response(self.server.status)
            self.send_header("Content-Type", "application/problem+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        rest = self.server.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(rest[: self.server.cut_after])
            self.close_connection = True
        else:
            self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client() as client:
        yield client


def get(http: httpx.Client, server: Server, target: Path) -> Path:
    return fetch(http, lambda: server.url, target, sha256=DIGEST, size=len(DATA))


def test_a_broken_download_goes_on_where_it_stopped(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    server.cuts = 2
    target = get(http, server, tmp_path / "out" / "archive.zip")
    assert target.read_bytes() == DATA
    starts = [int(asked.split("=")[1].rstrip("-")) if asked else 0 for asked in server.asked]
    assert starts == [0, 300_000, 600_000]
    assert [path.name for path in target.parent.iterdir()] == ["archive.zip"]


def test_a_later_call_uses_what_an_earlier_one_left(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    (tmp_path / f"archive.zip.{DIGEST[:16]}.part").write_bytes(DATA[:650_000])
    assert get(http, server, tmp_path / "archive.zip").read_bytes() == DATA
    assert server.asked == ["bytes=650000-"]


def test_the_rest_of_another_file_is_not_used(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    (tmp_path / f"archive.zip.{'0' * 16}.part").write_bytes(b"x" * 650_000)
    assert get(http, server, tmp_path / "archive.zip").read_bytes() == DATA
    assert server.asked == [None]


def test_a_server_without_ranges_starts_anew(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, 1
    assert get(http, server, tmp_path / "archive.zip").read_bytes() == DATA


def test_a_whole_file_is_not_fetched_again(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(DATA)
    get(http, server, tmp_path / "archive.zip")
    assert server.asked == []


def test_wrong_bytes_are_refused_and_removed(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    server.data = DATA[:-1] + b"!"
    with pytest.raises(CorruptArtifact, match=DIGEST):
        get(http, server, tmp_path / "archive.zip")
    assert list(tmp_path.iterdir()) == []


def test_too_many_bytes_are_refused(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    server.data = DATA * 5
    with pytest.raises(CorruptArtifact):
        get(http, server, tmp_path / "archive.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_raised_as_its_type(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    server.status = 410
    with pytest.raises(ApiGone, match="removed") as caught:
        get(http, server, tmp_path / "archive.zip")
    assert caught.value.request_id == "r1"
    assert len(server.asked) == 1


def test_no_progress_ends_after_six_tries(
    http: httpx.Client, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.client.download.time.sleep", lambda seconds: None)
    server.cuts, server.cut_after = 99, 0
    with pytest.raises(ServiceUnreachable, match="breaking off"):
        get(http, server, tmp_path / "archive.zip")
    assert len(server.asked) == 6


def test_answers_that_end_too_early_are_named(
    http: httpx.Client, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.client.download.time.sleep", lambda seconds: None)
    server.data, server.ranges = DATA[:10], False
    with pytest.raises(ServiceUnreachable, match="answers end before the last of its 700000 bytes"):
        get(http, server, tmp_path / "archive.zip")
