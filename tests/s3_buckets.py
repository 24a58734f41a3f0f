"""Stores in buckets of their own on the tests' S3 server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cffa_core.storage.s3 import S3Store
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, Server


@contextmanager
def s3_store(server: Server, **options: Any) -> Iterator[S3Store]:
    """A store in a new bucket, unless ``options`` (those of :class:`S3Store`) name one that exists."""
    with unprepared_store(server, **options) as store:
        if "bucket" not in options:
            store.ensure_bucket()
        yield store


@contextmanager
def unprepared_store(server: Server, **options: Any) -> Iterator[S3Store]:
    """A store that may not work: wrong keys, another address, a bucket that is missing."""
    usual = {
        "endpoint": server.url,
        "bucket": f"test-{secrets.token_hex(8)}",
        "access_key": S3_ACCESS_KEY,
        "secret_key": S3_SECRET_KEY,
    }
    store = S3Store(**(usual | options))
    try:
        yield store
    finally:
        store.close()
