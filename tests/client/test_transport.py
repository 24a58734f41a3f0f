"""What the client makes of answers that are none of CFFA's, and of refusals that no repetition helps against."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from typer.testing import CliRunner

from services.client.cli import app
from services.client.client import CffaClient
from services.client.problems import ApiError, ApiQuotaExceeded, UnexpectedAnswer

PAGE = (200, "text/html", b"<html>log in first</html>")
QUOTA = b'{"code": "quota_exceeded", "detail": "2 of 2 unfinished jobs are there", "retryable": true}'


class Other(ThreadingHTTPServer):
    """Answers everything alike; ``asked`` are the paths."""

    answer = PAGE

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Other

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status, kind, body = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "5")
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing to standard error."""


@pytest.fixture
def other() -> Iterator[Other]:
    with Other() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def client(other: Other) -> Iterator[CffaClient]:
    with CffaClient(other.url) as opened:
        yield opened


@pytest.mark.parametrize("answer", [PAGE, (200, "application/json", b'{"status": "ok"}')])
def test_what_is_no_answer_of_the_service_is_a_typed_error(
    client: CffaClient, other: Other, answer: tuple[int, str, bytes]
) -> None:
    other.answer = answer
    with pytest.raises(UnexpectedAnswer, match="in place of a Job is no answer of CFFA"):
        client.job("job_1")
    with pytest.raises(UnexpectedAnswer, match="in place of a Page is no answer of CFFA"):
        list(client.jobs())


def test_a_page_in_place_of_a_document_is_a_typed_error(client: CffaClient, other: Other) -> None:
    with pytest.raises(UnexpectedAnswer, match=f"{other.url}/v1/datasets/ds_1/report is no answer of CFFA"):
        client.dataset_report("ds_1")


def test_the_command_line_says_it_in_one_line(other: Other) -> None:
    result = CliRunner().invoke(app, ["jobs", "--url", other.url])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: what came in place of a Page") and "Traceback" not in result.stderr


def test_an_error_with_a_broken_document_is_still_an_api_error(client: CffaClient, other: Other) -> None:
    other.answer = (500, "application/json", b"oops")
    with pytest.raises(ApiError, match="HTTP 500") as caught:
        client.job("job_1")
    assert caught.value.status == 500


def test_a_full_quota_is_said_at_once(client: CffaClient, other: Other) -> None:
    other.answer = (429, "application/problem+json", QUOTA)
    with pytest.raises(ApiQuotaExceeded, match="2 of 2 unfinished") as caught:
        client.job("job_1")
    assert caught.value.may_retry and caught.value.retry_after == 5
    assert len(other.asked) == 1
