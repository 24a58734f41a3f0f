"""Signatures of web hooks as Standard Webhooks defines them (https://www.standardwebhooks.com, version 1.0).

``webhook-signature`` is ``v1,`` + base64 of HMAC-SHA256 over ``id.timestamp.body``, once per secret, separated by
spaces. Secrets are ``whsec_`` + base64 of 32 random bytes. Sends nothing and knows neither HTTP nor the record.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping

from cffa_core.errors import CffaError

PREFIX = "whsec_"
SECRET_BYTES = 32
SHORTEST, LONGEST = 24, 64
"""Bytes of a secret that the standard allows."""
TOLERANCE_SECONDS = 300
"""How far a receiver lets the time of a message be from its own."""


class BadSignature(CffaError):
    """A message that this secret did not sign, or whose time is too far from now; it must not be acted on."""

    code = "bad_signature"


def new_secret() -> str:
    """A new secret of 256 random bits."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def headers(of: Iterable[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a message, signed once with each secret of ``of``; ``timestamp`` is seconds since 1970."""
    signatures = " ".join(f"v1,{_signature(secret, message_id, timestamp, body)}" for secret in of)
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signatures}


def verify(secret: str, given: Mapping[str, str], body: bytes, *, now: float) -> None:
    """Raise :class:`BadSignature` unless one signature in the headers ``given`` (lower case) is right and recent.

    ``now`` is seconds since 1970; :data:`TOLERANCE_SECONDS` on either side are let pass.
    """
    message_id, timestamp = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    if not (message_id and timestamp.isascii() and timestamp.isdecimal() and len(timestamp) < 16):
        raise BadSignature("a message without webhook-id and webhook-timestamp is none of this service")
    if abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        raise BadSignature(
            f"the message is from {timestamp}, more than {TOLERANCE_SECONDS} s from now: check the clock"
        )
    right = f"v1,{_signature(secret, message_id, int(timestamp), body)}".encode()
    found = given.get("webhook-signature", "").split(" ")
    if not any(hmac.compare_digest(right, item.encode("utf-8", "replace")) for item in found):
        raise BadSignature("no signature of the message was made with this secret")


def _signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    return base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise BadSignature(f"a secret is {PREFIX} and base64 after it") from error
    if not SHORTEST <= len(key) <= LONGEST:
        raise BadSignature(f"a secret holds {SHORTEST} to {LONGEST} bytes, this one {len(key)}")
    return key
