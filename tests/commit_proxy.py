"""A proxy in front of PostgreSQL that cuts the connection at the COMMIT of a transaction that writes.

``before`` the server heard it, so that the transaction is undone; or ``after`` the server has answered, so that it took
effect and nobody knows. Transactions that only read pass.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

When = Literal["before", "after"]


@dataclass
class _Pair:
    """One connection: the client's end and the server's."""

    client: socket.socket
    server: socket.socket
    writes: bool = False
    cut_at_answer: bool = False

    def cut(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class CommitProxy:
    """Listens on ``port``; after :meth:`arm` it cuts so many commits and then lets everything pass."""

    target: int
    cuts: int = 0
    when: When = "before"
    made: int = 0
    _pairs: list[_Pair] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, when: When, cuts: int = 1) -> None:
        """Cut the next ``cuts`` commits."""
        self.when, self.cuts, self.made = when, cuts, 0

    def close(self) -> None:
        """Stop listening and end all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self._pairs:
            pair.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                pair = _Pair(client, socket.create_connection(("127.0.0.1", self.target)))
                self._pairs.append(pair)
                for pump in (self._ask, self._answer):
                    threading.Thread(target=pump, args=(pair,), daemon=True).start()

    def _ask(self, pair: _Pair) -> None:
        with contextlib.suppress(OSError):
            while data := pair.client.recv(1 << 16):
                if b"BEGIN" in data:
                    pair.writes = b"READ ONLY" not in data
                if pair.writes and b"COMMIT\0" in data and self.made < self.cuts:
                    self.made += 1
                    if self.when == "before":
                        break
                    pair.cut_at_answer = True
                pair.server.sendall(data)
        self._end(pair)

    def _answer(self, pair: _Pair) -> None:
        with contextlib.suppress(OSError):
            while data := pair.server.recv(1 << 16):
                if pair.cut_at_answer:
                    break
                pair.client.sendall(data)
        self._end(pair)

    @staticmethod
    def _end(pair: _Pair) -> None:
        pair.cut()
        for end in (pair.client, pair.server):
            end.close()


@contextlib.contextmanager
def commit_proxy(target: int) -> Iterator[CommitProxy]:
    """A proxy to ``target`` on loopback, closed afterwards."""
    proxy = CommitProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
