"""Receivers of web hooks for tests: real servers on loopback, with and without TLS, polite and hostile ones."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cffa_core.settings import Settings

LOOPBACK = {"webhook_allow_http": True, "webhook_allow_networks": "127.0.0.0/8", "webhook_poll_seconds": 0.05}
NAME = "receiver.test"


def loopback_settings(home: Path, **more: object) -> Settings:
    """Settings under which receivers of tests may be reached."""
    return Settings(home=home, **(LOOPBACK | more))  # type: ignore[arg-type]


@dataclass
class Message:
    """What arrived: path, headers in lower case, body."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass
class Receiver:
    """Keeps every message; ``answers`` are statuses and headers of the next answers, afterwards it is always 204."""

    address: str
    port: int
    messages: list[Message] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    before_answer: Callable[[], None] = lambda: None
    sni: list[str | None] = field(default_factory=list)

    def url(self, host: str | None = None, scheme: str = "http", path: str = "/hook") -> str:
        return f"{scheme}://{host or self.address}:{self.port}{path}"

    def wait(self, number: int, seconds: float = 90.0) -> list[Message]:
        """The messages, once there are so many."""
        end = time.monotonic() + seconds
        while len(self.messages) < number:
            assert time.monotonic() < end, f"{len(self.messages)} of {number} messages came"
            time.sleep(0.01)
        return self.messages


@contextlib.contextmanager
def receiver(address: str = "127.0.0.1", port: int = 0, *, tls: Path | None = None) -> Iterator[Receiver]:
    """A receiver; ``tls`` is the folder of a certificate that :func:`certificate` made."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            running.messages.append(Message(self.path, headers, body))
            running.before_answer()
            status, extra = running.answers.pop(0) if running.answers else (204, {})
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            return  # a client that does not trust the certificate, or was killed

    server = Server((address, port), Handler)
    running = Receiver(address, server.server_address[1])
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
        context.sni_callback = lambda connection, name, context: running.sni.append(name)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def raw_receiver(speak: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that takes the request and then speaks as it likes; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    speak(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def certificate(folder: Path, name: str = NAME) -> Path:
    """Make ``ca.pem``, and ``cert.pem`` with ``key.pem`` for ``name``, in ``folder``; return it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program: apt-get install -y --no-install-recommends openssl")
    folder.mkdir(parents=True, exist_ok=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    authority = ["-subj", "/CN=authority", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    own = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-addext", "basicConstraints=CA:FALSE"]
    for command in (
        ["req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", *authority],
        ["req", "-x509", *key, "-keyout", "key.pem", "-out", "cert.pem", "-CA", "ca.pem", "-CAkey", "ca.key", *own],
    ):
        done = subprocess.run(["openssl", *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder
