"""An HTTP proxy for tests that breaks chosen requests: cuts them, loses their answers, answers itself, or hangs.

It sits between a client and one real server on loopback. ``plan(number, head)`` sees every request (numbered from 0,
with its head as text) and returns a :class:`Fault`, or None to let it pass.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What happens to one request; exactly one of these is set."""

    cut_request_after: int | None = None  # bytes of it (with its head) that reach the server, then a reset
    cut_answer_after: int | None = None  # bytes of the answer that reach the client, then the end; 0: it is lost
    answer: bytes | None = None  # sent in place of the server's, which hears nothing
    hang: bool = False  # nobody answers


Plan = Callable[[int, str], Fault | None]


class FaultyProxy:
    """Listens on a port of its own; ``heads`` are the requests that came, ``plan`` may be replaced at any time."""

    def __init__(self, target_port: int, plan: Plan) -> None:
        self.plan = plan
        self.heads: list[str] = []
        self._target = target_port
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The address to give to the client."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop listening and end all connections."""
        with self._lock:
            connections = list(self._open)
        for each in (self._listener, *connections):
            _end(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection: requests one after another, each with its answer, until either side ends."""
        server = socket.create_connection(("127.0.0.1", self._target))
        with self._lock:
            self._open |= {client, server}
        try:
            while self._one_request(client, server):
                pass
        except OSError:  # one side is gone, and so is the other then
            pass
        finally:
            with self._lock:
                self._open -= {client, server}
            for each in (client, server):
                _end(each)

    def _one_request(self, client: socket.socket, server: socket.socket) -> bool:
        first = _read_head(client)
        if first is None:
            return False
        head, length, rest = first
        with self._lock:
            number = len(self.heads)
            self.heads.append(head.decode("latin-1"))
        bodiless = head.startswith(b"HEAD ")  # its answer names a length and sends nothing
        fault = self.plan(number, self.heads[number])
        if fault is None:
            _send_body(server, head + rest, client, length - len(rest))
            return _relay_answer(server, client, bodiless=bodiless, at_most=None)
        if fault.hang:
            while client.recv(_CHUNK):
                pass
            return False
        if fault.answer is not None:
            _send_body(None, b"", client, length - len(rest))
            client.sendall(fault.answer)
            client.shutdown(socket.SHUT_WR)
            return False
        if fault.cut_request_after is not None:
            known = (head + rest)[: fault.cut_request_after]
            _send_body(server, known, client, min(length - len(rest), fault.cut_request_after - len(known)))
            for each in (client, server):  # no good-bye: a reset
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        _send_body(server, head + rest, client, length - len(rest))
        return _relay_answer(server, client, bodiless=bodiless, at_most=fault.cut_answer_after)


def _read_head(source: socket.socket) -> tuple[bytes, int, bytes] | None:
    """Head of the next message, its content length, and what came after it; None at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = source.recv(_CHUNK)
        if not more:
            return None
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return head + b"\r\n\r\n", int(lengths[0]) if lengths else 0, rest


def _send_body(target: socket.socket | None, known: bytes, source: socket.socket, left: int) -> None:
    """Send what is known and the ``left`` bytes that follow it; to nobody if the target is None."""
    if target is not None:
        target.sendall(known)
    while left > 0 and (data := source.recv(min(_CHUNK, left))):
        if target is not None:
            target.sendall(data)
        left -= len(data)


def _relay_answer(server: socket.socket, client: socket.socket, *, bodiless: bool, at_most: int | None) -> bool:
    """Pass on an answer, or its first bytes; returns whether the connection goes on."""
    answer = _read_head(server)
    if answer is None:
        return False
    head, length, rest = answer
    if at_most is not None:
        known = (head + rest)[:at_most]
        _send_body(client, known, server, 0 if bodiless else min(length - len(rest), at_most - len(known)))
        return False
    if b"\r\ntransfer-encoding: chunked" in head.lower():
        client.sendall(head + rest)
        while not rest.endswith(b"0\r\n\r\n") and (more := server.recv(_CHUNK)):
            client.sendall(more)
            rest = rest[-5:] + more
        return True
    _send_body(client, head + rest, server, 0 if bodiless else length - len(rest))
    return True


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextlib.contextmanager
def faulty_proxy(target_port: int, plan: Plan = lambda number, head: None) -> Iterator[FaultyProxy]:
    """A proxy for the length of a block."""
    proxy = FaultyProxy(target_port, plan)
    try:
        yield proxy
    finally:
        proxy.close()
