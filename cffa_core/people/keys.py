"""API keys: how one is made, told from a typing error, and kept. Who holds which key is in ``accounts``.

A key is ``cffa_``, 32 random characters of ``[0-9A-Za-z]`` (190 bits) and a checksum of six. The checksum (CRC-32 in
base 62) says without any question to the record that a key was mistyped or cut off; it protects nothing. The record
keeps HMAC-SHA256 of the key under a secret of the service, so that a stolen record opens no door.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import zlib
from dataclasses import dataclass
from enum import StrEnum

from cffa_core.settings import Settings
from cffa_core.storage.kept_secret import kept_secret

PREFIX = "cffa_"
RANDOM = 32
CHECKSUM = 6
SHOWN = len(PREFIX) + 6
SECRET_FILE = "keys.key"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase


class Scope(StrEnum):
    """What a key may do: read; also change what belongs to its account; also look after accounts and the audit log."""

    VIEWER = "viewer"
    RESEARCHER = "researcher"
    ADMIN = "admin"

    def covers(self, needed: Scope) -> bool:
        """Whether a key of this scope may do what needs ``needed``."""
        order = list(Scope)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Caller:
    """Who a request speaks for; ``key_id`` is None where no key was needed."""

    owner: str
    scope: Scope
    key_id: str | None = None


def new_key() -> str:
    """Mint a key."""
    random = "".join(secrets.choice(ALPHABET) for _ in range(RANDOM))
    return f"{PREFIX}{random}{_checksum(random)}"


def key_of_post(secret: bytes, post_key: str, mark: str) -> str:
    """The key that a post with an idempotency key makes, and makes again for whoever repeats that post.

    Its random part is HMAC-SHA256 in base 62 under the service's secret, over ``mark``, 32 random bytes that the record
    keeps for a day, and the idempotency key, of which it keeps a digest alone. All three are needed to know it.
    """
    number = int.from_bytes(hmac.digest(secret, f"key of a post\0{mark}\0{post_key}".encode(), hashlib.sha256), "big")
    random = _base62(number % len(ALPHABET) ** RANDOM, RANDOM)  # of 256 bits 190 are kept: no letter is likelier
    return f"{PREFIX}{random}{_checksum(random)}"


def is_well_formed(key: str) -> bool:
    """Whether this can be a key at all: right form, right checksum."""
    random, checksum = key[len(PREFIX) : -CHECKSUM], key[-CHECKSUM:]
    return (
        key.startswith(PREFIX)
        and len(random) == RANDOM
        and all(letter in ALPHABET for letter in random)
        and checksum == _checksum(random)
    )


def shown(key: str) -> str:
    """The beginning of a key, by which people recognise it in a list."""
    return f"{key[:SHOWN]}..."


def digest(key: str, secret: bytes) -> str:
    """What the record keeps of a key: HMAC-SHA256 in hexadecimal."""
    return hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()


def key_secret(settings: Settings) -> bytes:
    """The secret of :func:`digest`: the one given, or (embedded) one made at the first start and kept in ``home``."""
    given = settings.key_secret.get_secret_value()
    return given.encode() if given else kept_secret(settings.home, SECRET_FILE)


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), CHECKSUM)


def _base62(number: int, length: int) -> str:
    digits = ""
    for _ in range(length):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits
