"""A TCP proxy that misbehaves on demand: slow, cut after so many bytes, reset, silent, or an HTTP error of its own.

It counts calls: requests of HTTP, otherwise whatever a client sends at once. A :class:`Trouble` strikes at the n-th
and as many after it as it says. It runs in threads of the test's process and knows neither S3 nor PostgreSQL.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

CHUNK = 1 << 14
NO_SERVICE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>made up by a test</Message></Error>"
METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")

What = Literal["latency", "reset", "cut_up", "cut_down", "http_503", "blackhole"]


@dataclass(frozen=True)
class Trouble:
    """What happens at calls number ``first`` to ``first + times - 1`` (from 1).

    ``seconds`` is the delay of ``latency``. ``after`` is how many bytes of the call (``cut_up``) or of its answer
    (``cut_down``) pass before its connection is reset; ``reset`` does that before any byte. ``blackhole`` swallows
    everything and stays silent.
    """

    what: What
    first: int = 1
    times: int = 1
    seconds: float = 0.2
    after: int = 0

    def strikes(self, call: int) -> bool:
        """Whether call number ``call`` is one of those."""
        return self.first <= call < self.first + self.times


class Proxy:
    """Forwards a free port of loopback to ``port``. Use as a context manager; ``trouble`` may be changed any time.

    ``calls`` counts since :meth:`begin`; ``http`` says how.
    """

    def __init__(self, port: int, *, http: bool) -> None:
        self.trouble: Trouble | None = None
        self.calls = 0
        self._target = port
        self._http = http
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)

    def begin(self, trouble: Trouble | None) -> None:
        """Start counting at 0 with new trouble."""
        with self._lock:
            self.trouble, self.calls = trouble, 0

    def cut_all(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            found = list(self._open)
        for end in found:
            _reset(end)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed by __exit__
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=10.0)
            except OSError:  # the server is down; so is this way to it
                _reset(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=_Link(self, client, server).run, name="proxy-link", daemon=True).start()

    def strike(self) -> Trouble | None:
        """Count a call; returns the trouble that strikes it."""
        with self._lock:
            self.calls += 1
            return self.trouble if self.trouble is not None and self.trouble.strikes(self.calls) else None

    def forget(self, *ends: socket.socket) -> None:
        """Close a finished link."""
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            end.close()

    @property
    def http(self) -> bool:
        """Whether requests are counted."""
        return self._http


class _Link:
    """One connection of a client and its counterpart to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._trouble: Trouble | None = None
        self._passed = {"cut_up": 0, "cut_down": 0}

    def run(self) -> None:
        """Forward both ways until either side ends."""
        down = threading.Thread(target=self._pump, args=(self._server, self._client, "cut_down"), daemon=True)
        down.start()
        self._pump(self._client, self._server, "cut_up")
        down.join()
        self._proxy.forget(self._client, self._server)

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if direction == "cut_up" and (not self._proxy.http or data.startswith(METHODS)):
                    self._new_call()
                if not self._pass(data, sink, direction):
                    return
            sink.shutdown(socket.SHUT_WR)

    def _new_call(self) -> None:
        self._trouble = self._proxy.strike()
        self._passed = {"cut_up": 0, "cut_down": 0}
        if self._trouble is not None and self._trouble.what == "latency":
            time.sleep(self._trouble.seconds)

    def _pass(self, data: bytes, sink: socket.socket, direction: str) -> bool:
        """Forward ``data`` as far as the trouble lets it; False if the link is over."""
        trouble = self._trouble
        if trouble is None or trouble.what == "latency":
            sink.sendall(data)
            return True
        if trouble.what == "blackhole":
            return True
        if trouble.what == "http_503":
            if direction == "cut_up":
                self._client.sendall(NO_SERVICE % (len(SLOW_DOWN), SLOW_DOWN))
                self._client.shutdown(socket.SHUT_WR)
                self._server.shutdown(socket.SHUT_RDWR)
            return False
        mine = "cut_up" if trouble.what == "reset" else trouble.what
        if direction != mine:
            sink.sendall(data)
            return True
        left = (0 if trouble.what == "reset" else trouble.after) - self._passed[direction]
        sink.sendall(data[: max(0, left)])
        self._passed[direction] += len(data)
        if left > 0 and len(data) < left:
            return True
        _reset(self._client)
        _reset(self._server)
        return False


def _reset(end: socket.socket) -> None:
    """End a connection with RST instead of FIN, and wake whoever reads from it."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)
    end.close()
