"""The gate: who a request speaks for, whether that key may do it and how often, and the audit of what was changed.

It stands before every route and is decided by method and path alone, so that a new route needs a key, has a scope and
is audited without anybody thinking of it. Routes are closed unless they are named in :data:`OPEN`. Embedded mode on
loopback has no keys: everything there is done by ``local``.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from functools import partial

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cffa_core.errors import CffaError, InvalidSettings
from cffa_core.people.accounts import Accounts
from cffa_core.people.audit import AuditLog
from cffa_core.people.keys import Caller
from cffa_core.people.keys import Scope as KeyScope
from cffa_core.people.rows import ADMIN, LOCAL
from cffa_core.settings import Settings
from services.api import problems, web
from services.api.rate_limits import RateLimits

OPEN = frozenset({"/", "/livez", "/readyz", "/metrics", "/openapi.json", *(f"/web/{name}" for name in web.TYPES)})
BLOBS = "/v1/blobs/"
READING = frozenset({"GET", "HEAD", "OPTIONS"})
OF_ADMINS = ("/v1/accounts", "/v1/audit")
OF_RESEARCHERS = ("/v1/api-keys",)
BOOTSTRAP = Caller(ADMIN, KeyScope.ADMIN, "bootstrap")
NOBODY_ASKED = Caller(LOCAL, KeyScope.ADMIN)
_ASKED = "send a key of this service as `Authorization: Bearer KEY`"
_WRONG = "the key is not one of this service's"
_log = logging.getLogger("cffa.api")


def needed_scope(method: str, path: str) -> KeyScope:
    """What a key must be able to do for this request."""
    if _below(path, OF_ADMINS):
        return KeyScope.ADMIN
    if method in READING and not _below(path, OF_RESEARCHERS):
        return KeyScope.VIEWER
    return KeyScope.RESEARCHER


def require_secret(settings: Settings) -> None:
    """Raise :class:`InvalidSettings` for a cluster without the secret under which its keys are kept."""
    if settings.mode == "cluster" and not settings.key_secret.get_secret_value():
        raise InvalidSettings(
            "the API of a cluster needs the secret under which it keeps keys: set CFFA_KEY_SECRET, or put it into the "
            "file cffa_key_secret of CFFA_SECRETS_DIR (e.g. the output of `openssl rand -hex 32`), for every replica "
            "the same"
        )


class KeyGate:
    """Wraps ``app``: a request to a closed path passes only with a key that may do it; its :class:`Caller` is then in
    ``scope["state"]``. The application's backend says which keys there are."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._keyless = settings.mode == "embedded" and not settings.require_keys
        # The token of such a path is the whole permission; in a cluster the object store serves them.
        self._blobs_are_open = settings.mode == "embedded"
        given = settings.bootstrap_key.get_secret_value()
        self._bootstrap = _digest(given) if given else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        try:
            caller = await self._caller(scope, state.backend.accounts)
            require_scope(caller, scope["method"], scope["path"])
            limits: RateLimits = state.rate_limits
            await limits.require(caller.key_id or caller.owner, changing=scope["method"] not in READING)
        except CffaError as error:
            await problems.from_typed(Request(scope, receive), error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if scope["method"] not in READING:
            send = partial(_audited, scope, caller, state.backend.audit, send)
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in OPEN or (self._blobs_are_open and path.startswith(BLOBS))

    async def _caller(self, scope: Scope, accounts: Accounts) -> Caller:
        """Who the request speaks for; the bootstrap key is compared in a time that says nothing about it."""
        if self._keyless:
            return NOBODY_ASKED
        key = _bearer(Headers(scope=scope).get("authorization", ""))
        if not key:
            raise problems.Unauthorized(_ASKED)
        if self._bootstrap is not None and hmac.compare_digest(_digest(key), self._bootstrap):
            return BOOTSTRAP
        caller = accounts.remembered(key)
        if caller is None:
            caller = await run_in_threadpool(accounts.find, key)
        if caller is None:
            raise problems.Unauthorized(_WRONG)
        return caller


def require_scope(caller: Caller, method: str, path: str) -> None:
    """Raise :class:`problems.ScopeTooSmall` unless the caller may do this."""
    needed = needed_scope(method, path)
    if not caller.scope.covers(needed):
        raise problems.ScopeTooSmall(f"this needs a key of scope {needed.value}, and yours is {caller.scope.value}")


async def _audited(scope: Scope, caller: Caller, audit: AuditLog, send: Send, message: Message) -> None:
    """Note a change that succeeded, before its answer is sent; one that cannot be noted is logged and answered."""
    if message["type"] == "http.response.start" and message["status"] < 400:
        headers = Headers(raw=message["headers"])
        if "idempotency-replayed" not in headers:
            route = scope.get("route")
            named = list(scope.get("path_params", {}).values()) or [headers.get("location", "").rpartition("/")[2]]
            note = partial(
                audit.append,
                caller.owner,
                getattr(route, "operation_id", None) or f"{scope['method']} {getattr(route, 'path', '')}",
                key_id=caller.key_id,
                target=str(named[0]) or None,
                request_id=str(scope["state"].get("request_id", "")) or None,
                data={"status": message["status"], "path": scope["path"]},
            )
            try:
                await run_in_threadpool(note)
            except CffaError as error:
                _log.error("the audit log has no entry of %s %s: %s", scope["method"], scope["path"], error.message)
    await send(message)


def _below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith((f"{root}/", f"{root}:")) for root in roots)


def _bearer(header: str) -> str:
    """The key in ``Bearer KEY`` (RFC 6750, section 2.1); empty for anything else."""
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
