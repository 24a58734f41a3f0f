"""A TCP proxy whose connections can fall silent without closing, as behind a firewall that forgot them."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self


class FrozenProxy:
    """Forwards ``port`` on loopback to ``target``; :meth:`freeze` silences what is connected, not what comes later."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._all: list[socket.socket] = []

    def freeze(self) -> int:
        """Forward nothing more on the connections of now; returns how many there are."""
        with self._lock:
            frozen = len(self._live) // 2
            self._live.clear()
        return frozen

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for end in self._all:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # closed
                return
            with self._lock:
                self._live |= {near, far}
                self._all += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                with self._lock:
                    if source not in self._live:
                        return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one end is gone
            return
