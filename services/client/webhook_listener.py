"""A small receiver of web hooks for trying them out: checks every signature and hands on what came.

Not meant to face a network: one thread per connection, no TLS. Put a real receiver behind your own web server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cffa_core.errors import CffaError
from cffa_core.webhooks.signing import BadSignature, verify

LONGEST_MESSAGE = 1 << 20
SILENT_SECONDS = 15.0
OnMessage = Callable[[str, dict[str, Any]], None]
"""Hears the ``webhook-id`` and the message."""


class CannotListen(CffaError):
    """The address is taken, or not this machine's."""

    code = "cannot_listen"


class Listener(ThreadingHTTPServer):
    """Serves on ``host:port`` (0: any free one, see ``port``) until it is shut down.

    Messages signed with ``secret`` are answered with 204 and go to ``on_message``; all others get 401 and go as one
    line to ``on_refusal``.
    """

    daemon_threads = True

    def __init__(
        self, host: str, port: int, secret: str, *, on_message: OnMessage, on_refusal: Callable[[str], None]
    ) -> None:
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise CannotListen(f"nothing can listen on {host}:{port}: {error}") from error
        self.secret = secret
        self.on_message = on_message
        self.on_refusal = on_refusal

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: Listener
    timeout = SILENT_SECONDS

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 8 and int(length) <= LONGEST_MESSAGE):
            self._answer(413)
            return
        body = self.rfile.read(int(length))
        try:
            given = {name.lower(): value for name, value in self.headers.items()}
            verify(self.server.secret, given, body, now=time.time())
            message = json.loads(body)
        except (BadSignature, ValueError) as error:
            self.server.on_refusal(error.message if isinstance(error, BadSignature) else "the message is not JSON")
            self._answer(401)
            return
        self.server.on_message(given["webhook-id"], message)
        self._answer(204)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """What came is said by the callbacks."""
