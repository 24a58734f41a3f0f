"""Who a request speaks for: the bearer key it carries, checked before anything else of the application runs.

One function decides, :meth:`Keys.owner_of`. Routes are closed unless they are named in :data:`OPEN`, so that a new
route needs a key without anybody thinking of it. Embedded mode on loopback has no keys and does not use this module.
"""

from __future__ import annotations

import hashlib
import hmac

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cffa_core.errors import InvalidSettings
from cffa_core.settings import Settings
from services.api import problems, web

ADMIN = "admin"
OPEN = frozenset({"/", "/livez", "/readyz", "/metrics", "/openapi.json", *(f"/web/{name}" for name in web.TYPES)})
_ASKED = "send the key of this service as `Authorization: Bearer KEY`"
_WRONG = "the key is not one of this service's"


class Keys:
    """The keys of this service; in this version there is one, ``CFFA_BOOTSTRAP_KEY``, and its owner is ``admin``."""

    def __init__(self, settings: Settings) -> None:
        key = settings.bootstrap_key.get_secret_value()
        if not key:
            raise InvalidSettings(
                "the API of a cluster needs a key for its users: set CFFA_BOOTSTRAP_KEY, or put it into the file "
                "cffa_bootstrap_key of CFFA_SECRETS_DIR (e.g. the output of `openssl rand -hex 24`)"
            )
        self._bootstrap = _digest(key.encode())

    def owner_of(self, key: str) -> str | None:
        """Owner whose key this is, or None; takes as long for a wrong key as for the right one."""
        return ADMIN if hmac.compare_digest(_digest(key.encode()), self._bootstrap) else None


class KeyGate:
    """Wraps ``app``: a request to a closed path passes only with a key, and carries its owner in ``scope["state"]``."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            key = _bearer(Headers(scope=scope).get("authorization", ""))
            owner = self._keys.owner_of(key) if key else None
            if owner is None:
                refused = problems.Unauthorized(_WRONG if key else _ASKED)
                await problems.from_typed(Request(scope, receive), refused)(scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)


def _bearer(header: str) -> str:
    """The key in ``Bearer KEY`` (RFC 6750, section 2.1); empty for anything else."""
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
