"""Which object store a process uses, from its settings; and the key that signs blob URLs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cffa_core import tracing
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.kept_secret import kept_secret
from cffa_core.storage.local import LocalStore

if TYPE_CHECKING:
    from cffa_core.storage.s3 import S3Store

SECRET_FILE = "blob.key"


def open_store(settings: Settings) -> ObjectStore:
    """The object store of these settings; nothing is asked of a server yet."""
    return tracing.traced(open_local(settings) if settings.mode == "embedded" else open_s3(settings))


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
    """The key of signed blob URLs: the one given, or one made at the first start and kept in ``home``."""
    given = settings.blob_secret.get_secret_value()
    return given.encode() if given else kept_secret(settings.home, SECRET_FILE)
