"""Which object store a process uses, from its settings; and the key that signs blob URLs."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

from cffa_core.errors import StorageUnavailable
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.local import LocalStore, link_new

if TYPE_CHECKING:
    from cffa_core.storage.s3 import S3Store

SECRET_FILE = "blob.key"
_SECRET_BYTES = 32


def open_store(settings: Settings) -> ObjectStore:
    """The object store of these settings; nothing is asked of a server yet."""
    return open_local(settings) if settings.mode == "embedded" else open_s3(settings)


def open_s3(settings: Settings) -> S3Store:
    """The S3 store of cluster mode; raises :class:`InvalidSettings` for an endpoint that is none.

    The one-shot set-up calls its ``ensure_bucket()``; no other process creates a bucket.
    """
    from cffa_core.storage.s3 import S3Store  # embedded mode does without the client

    return S3Store(
        endpoint=settings.s3_endpoint,
        public_endpoint=settings.s3_public_endpoint,
        bucket=settings.s3_bucket,
        region=settings.s3_region,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
    )


def open_local(settings: Settings) -> LocalStore:
    """The local store of embedded mode, with the token methods that the API needs to serve blobs."""
    store = LocalStore(settings.objects_dir, secret=blob_secret(settings), base_url=settings.url)
    store.remove_abandoned()
    return store


def blob_secret(settings: Settings) -> bytes:
    """The key of signed blob URLs: the one given, or one made at the first start and kept in ``home`` (0600).

    Processes that start together agree: the first to link its key into place wins, the others read it.
    """
    given = settings.blob_secret.get_secret_value()
    if given:
        return given.encode()
    path = settings.home / SECRET_FILE
    try:
        if not path.exists():
            settings.home.mkdir(parents=True, exist_ok=True)
            mine = settings.home / f".{SECRET_FILE}.{secrets.token_hex(8)}"
            descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as handle:
                    handle.write(secrets.token_bytes(_SECRET_BYTES))
                    handle.flush()
                    os.fsync(handle.fileno())
                with contextlib.suppress(FileExistsError):  # another process was first; its key counts
                    link_new(mine, path)
            finally:
                mine.unlink(missing_ok=True)
        secret = path.read_bytes()
    except OSError as error:
        raise StorageUnavailable(f"the blob key in {settings.home} cannot be read or written: {error}") from error
    if len(secret) != _SECRET_BYTES:
        raise StorageUnavailable(f"{path} is damaged: {len(secret)} bytes; remove it to have a new one made")
    return secret
