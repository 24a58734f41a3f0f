"""The proxy that other fault tests rely on: it does what it says, at the call it says, and nothing else."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.proxy import Proxy, Trouble

BODY = b"x" * 100_000


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers GET with a body and PUT with the size it received."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(BODY)

    def do_PUT(self) -> None:
        received = self.rfile.read(int(self.headers["Content-Length"]))
        if len(received) == int(self.headers["Content-Length"]):
            self.server.whole.append(len(received))  # type: ignore[attr-defined]
        self._answer(str(len(received)).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as made:
        made.whole = []  # type: ignore[attr-defined]
        made.handle_error = lambda *_: None  # type: ignore[method-assign]  # a reset connection is what we want
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def proxy(server: http.server.ThreadingHTTPServer) -> Iterator[Proxy]:
    with Proxy(server.server_address[1], http=True) as made:
        yield made


@pytest.fixture
def client(proxy: Proxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", timeout=2.0) as made:
        yield made


def test_without_trouble_everything_passes(proxy: Proxy, client: httpx.Client) -> None:
    assert [client.get("/").content == BODY for _ in range(3)] == [True] * 3
    assert client.put("/", content=BODY).text == str(len(BODY))
    assert proxy.calls == 4


def test_trouble_strikes_the_nth_call_only(proxy: Proxy, client: httpx.Client) -> None:
    proxy.begin(Trouble("http_503", first=2, times=2))
    assert [client.get("/").status_code for _ in range(4)] == [200, 503, 503, 200]


@pytest.mark.parametrize(("what", "after"), [("reset", 0), ("cut_down", 0), ("cut_down", 50_000)])
def test_a_cut_answer_is_an_error_for_the_client(proxy: Proxy, client: httpx.Client, what: str, after: int) -> None:
    proxy.begin(Trouble(what, after=after))  # type: ignore[arg-type]
    with pytest.raises(httpx.TransportError):
        client.get("/")
    assert client.get("/").content == BODY


def test_a_cut_upload_does_not_reach_the_server(
    proxy: Proxy, client: httpx.Client, server: http.server.ThreadingHTTPServer
) -> None:
    proxy.begin(Trouble("cut_up", after=60_000))
    with pytest.raises(httpx.TransportError):
        client.put("/", content=BODY)
    assert server.whole == []  # type: ignore[attr-defined]
    proxy.begin(Trouble("cut_down"))
    with pytest.raises(httpx.TransportError):
        client.put("/", content=BODY)
    assert server.whole == [len(BODY)]  # type: ignore[attr-defined]


def test_a_black_hole_lets_the_client_wait(proxy: Proxy, client: httpx.Client) -> None:
    proxy.begin(Trouble("blackhole"))
    with pytest.raises(httpx.ReadTimeout):
        client.get("/")


def test_a_dead_server_looks_like_one(proxy: Proxy, client: httpx.Client) -> None:
    with (
        Proxy(1, http=True) as to_nowhere,
        httpx.Client(base_url=f"http://127.0.0.1:{to_nowhere.port}") as other,
        pytest.raises(httpx.TransportError),
    ):
        other.get("/")
