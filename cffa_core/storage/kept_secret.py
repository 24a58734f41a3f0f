"""Secrets that an embedded service makes for itself at its first start and keeps in its home folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from cffa_core.errors import StorageUnavailable
from cffa_core.storage.local import link_new

SECRET_BYTES = 32


def kept_secret(home: Path, name: str) -> bytes:
    """The 32 bytes in the file ``name`` of ``home``, made if there is none (0600).

    Processes that start together agree: the first to link its secret into place wins, the others read it. Raises
    :class:`StorageUnavailable` for a file that cannot be read or written, or that is damaged.
    """
    path = home / name
    try:
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True)
            mine = home / f".{name}.{secrets.token_hex(8)}"
            descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as handle:
                    handle.write(secrets.token_bytes(SECRET_BYTES))
                    handle.flush()
                    os.fsync(handle.fileno())
                with contextlib.suppress(FileExistsError):  # another process was first; its secret counts
                    link_new(mine, path)
            finally:
                mine.unlink(missing_ok=True)
        secret = path.read_bytes()
    except OSError as error:
        raise StorageUnavailable(f"the secret {name} in {home} cannot be read or written: {error}") from error
    if len(secret) != SECRET_BYTES:
        raise StorageUnavailable(f"{path} is damaged: {len(secret)} bytes; remove it to have a new one made")
    return secret
