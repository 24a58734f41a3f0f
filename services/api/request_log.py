"""The outermost layer of every request: its id, its log line, its body limit, its origin, and the last resort.

A plain ASGI wrapper, so that streams pass through it untouched. It knows no route except that signed tokens in a
path are secrets and stay out of the log.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cffa_core import logs, tracing
from services.api import problems

UPLOAD_PATHS = frozenset({"/v1/datasets"})
BLOBS = "/v1/blobs/"  # what a signed link may bring, it says itself
MAX_JSON_BYTES = 1 << 20
# The page may load itself and nothing else; blob: is how it shows what it fetched with a key.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB = re.compile(r"/v1/jobs/(job_[0-9a-z]{20})(?:[/:]|$)")
_log = logging.getLogger("cffa.api")
_access = logging.getLogger("cffa.api.access")


class RequestLog:
    """Wraps ``app``.

    ``hosts`` are the names under which the API may be addressed (None: any). It is checked because a keyless API on
    loopback is otherwise open to every web page in the same browser: by DNS rebinding (the Host header) and by forged
    cross-site posts (the Origin header), which ``foreign_pages`` lets through. ``on_answer`` hears of each answer:
    method, template of the route (``none`` if there is no such route), status, seconds until it was sent whole.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None,
        foreign_pages: bool,
        on_answer: Callable[[str, str, int, float], None],
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._foreign_pages = foreign_pages
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        ids = {"request_id": request_id} | _job_of(scope["path"])
        name = f"HTTP {scope['method']}"
        with logs.about(**ids), tracing.span(name, headers.get("traceparent"), **ids) as traced:
            await self._serve(scope, receive, send, headers, request_id, traced)

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Headers,
        request_id: str,
        traced: dict[str, Any],
    ) -> None:
        seen = _Seen()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    out.setdefault(name, value)
            elif message["type"] == "http.response.body":
                seen.sent += len(message.get("body", b""))
            await send(message)

        request = Request(scope, receive)
        began = time.perf_counter()
        try:
            refused = self._refused(scope["method"], headers)
            if refused is not None:
                await problems.from_typed(request, refused)(scope, receive, sending)
            else:
                await self._app(scope, _limited(scope["path"], headers, receive), sending)
        except Exception:
            _log.exception("request %s failed", request_id)
            if seen.status is not None:
                raise
            await problems.unexpected(request)(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")
            self._on_answer(scope["method"], route, seen.status or 499, seconds)
            traced |= {"route": route, "status": seen.status}
            fields = {
                "event": "request",
                "request_id": request_id,
                "method": scope["method"],
                "path": _without_secrets(scope["path"]),
                "status": seen.status,
                "sent_bytes": seen.sent,
                "ms": round(seconds * 1000, 1),
                "client": scope["client"][0] if scope.get("client") else None,
            }
            _access.info(json.dumps(fields), extra={"fields": fields})

    def _refused(self, method: str, headers: Headers) -> problems.Forbidden | None:
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            return problems.Forbidden("this API does not answer under that host name; set CFFA_PUBLIC_URL to add one")
        if method in _SAFE_METHODS or self._foreign_pages:
            return None
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
        if foreign or headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            return problems.Forbidden("a page of another site may not change anything here")
        return None


class _Seen:
    status: int | None = None
    sent: int = 0


def _limited(path: str, headers: Headers, receive: Receive) -> Receive:
    """``receive`` that refuses a body over the limit while it arrives; uploads have a limit of their own."""
    if path in UPLOAD_PATHS or path.startswith(BLOBS):
        return receive
    declared = headers.get("content-length", "")
    refused = declared.isdecimal() and (len(declared) > 18 or int(declared) > MAX_JSON_BYTES)
    received = 0

    async def receiving() -> Message:
        nonlocal received
        if not refused:
            message = await receive()
            received += len(message.get("body", b""))
            if received <= MAX_JSON_BYTES:
                return message
        raise HTTPException(413, f"the body may have at most {MAX_JSON_BYTES} bytes")

    return receiving


def _host_name(host: str) -> str:
    """``[::1]:8008`` -> ``::1``; ``localhost:8008`` -> ``localhost``; empty if malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _job_of(path: str) -> dict[str, str]:
    """The id of the job that a path is about, for the log."""
    found = _JOB.match(path)
    return {"job_id": found[1]} if found else {}


def _without_secrets(path: str) -> str:
    return re.sub(r"^(/v1/blobs/).+", r"\1...", path)
