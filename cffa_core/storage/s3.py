"""Objects in a bucket of any S3 server (cluster mode): write-once puts, verified reads, signed download links.

Plain S3 through the minio client, one part in memory at a time. That a stale worker's write never counts is the
record's part (keys carry the attempt); that a key is written once holds here as far as the server can: a look before
every write, and a conditional write where it honours ``If-None-Match``.
"""

from __future__ import annotations

import hashlib
import io
import mimetypes
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

from minio import Minio
from minio.datatypes import Object
from urllib3 import BaseHTTPResponse

from cffa_core.errors import Conflict, InvalidSettings, NotFound, StorageUnavailable
from cffa_core.storage.base import ObjectInfo, key_segments
from cffa_core.storage.s3_bucket import make_bucket
from cffa_core.storage.s3_direct import LONGEST_LINK_SECONDS, S3DirectUploads
from cffa_core.storage.s3_transport import (
    RETRIES,
    KeyTaken,
    PastEnd,
    ResumingBody,
    WriteOncePool,
    no_bucket,
    typed_errors,
)
from cffa_core.storage.upload_source import UploadSource, readable_source
from cffa_core.storage.verified import CHUNK, copy_verified

SMALLEST_PART = 5 << 20
# S3 takes 10,000 parts: 78 GiB an object. Three parts are in memory while one is sent (measured).
PART_BYTES = 8 << 20
_Headers = dict[str, str | list[str] | tuple[str]]


class S3Store:
    """An :class:`~cffa_core.storage.base.ObjectStore` in one bucket.

    ``endpoint`` is the server as this process reaches it, ``public_endpoint`` as the users do: download links are
    signed for that host (``http(s)://host[:port]``; empty: the same). Requests are tried 1 + ``retries`` times. Safe
    for threads; call :meth:`close` when done. Raises :class:`InvalidSettings` for an endpoint that is none.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        public_endpoint: str = "",
        bucket: str,
        access_key: str,
        secret_key: str,
        region: str = "us-east-1",
        part_bytes: int = PART_BYTES,
        connect_seconds: float = 5.0,
        read_seconds: float = 30.0,
        retries: int = RETRIES,
    ) -> None:
        if part_bytes < SMALLEST_PART:
            raise ValueError(f"S3 takes no parts below {SMALLEST_PART} bytes")
        self.bucket = bucket
        self._part = part_bytes
        self._pool = WriteOncePool(connect_seconds=connect_seconds, read_seconds=read_seconds, retries=retries)

        def client(url: str, name: str) -> Minio:
            host, secure = _host(url, name)
            # With the region given, signing asks nobody.
            return Minio(host, access_key, secret_key, secure=secure, region=region, http_client=self._pool)

        self._client = client(endpoint, "CFFA_S3_ENDPOINT")
        self._signer = client(public_endpoint or endpoint, "CFFA_S3_PUBLIC_ENDPOINT")

    def close(self) -> None:
        """Close idle connections; the store may still be used."""
        self._pool.clear()

    def ensure_bucket(self) -> bool:
        """Create the bucket if it is missing, and have uploads that were never finished removed after three days.

        May run at once in many places. Returns whether the server keeps such a rule (one that an operator made
        counts); if not, abandoned parts only cost space.
        """
        with typed_errors(self.bucket, "the bucket"):
            return make_bucket(self._client, self.bucket)

    def put_bytes(self, key: str, data: bytes) -> ObjectInfo:
        """Store a small object; an existing key raises :class:`Conflict` unless bytes are equal."""
        key_segments(key)
        info = ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest())
        if (found := self._look(key)) is not None:
            return self._settle(found, info)
        tags: _Headers = {"sha256": info.sha256}
        try:
            with typed_errors(self.bucket, key, writing=True):
                self._client.put_object(
                    self.bucket,
                    key,
                    io.BytesIO(data),
                    len(data),
                    metadata=tags,
                    part_size=max(self._part, len(data)),  # one request
                )
        except KeyTaken as error:
            return self._settle(self._look(key), info, error)
        return info

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Store a file; see :meth:`put_bytes`. A large one is read twice, first for its SHA-256."""
        with path.open("rb") as stream:
            if path.stat().st_size <= self._part:
                return self.put_stream(key, stream)
            with readable_source(key):
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                info = ObjectInfo(key, stream.tell(), digest)
                stream.seek(0)
            return self._put(key, stream, info)

    def put_stream(self, key: str, stream: BinaryIO) -> ObjectInfo:
        """Store a stream of unknown length with a few parts in memory; see :meth:`put_bytes`."""
        return self._put(key, stream, None)

    def _put(self, key: str, stream: BinaryIO, expected: ObjectInfo | None) -> ObjectInfo:
        key_segments(key)
        source = UploadSource(key, stream, expected, before_end=lambda: self._refuse_taken(key))
        head = source.peek(self._part + 1)
        if len(head) <= self._part:
            return self.put_bytes(key, head)
        del head  # the source gives it again
        if (found := self._look(key)) is not None:
            return self._settle(found, source.drain())
        # Tells our upload from one of the same size when the answer to its last request is lost.
        writer = uuid.uuid4().hex
        tags: _Headers = {"writer": writer}
        if expected is not None:
            tags["sha256"] = expected.sha256
        failed: StorageUnavailable | None = None
        try:
            with typed_errors(self.bucket, key, writing=True):
                self._client.put_object(
                    self.bucket,
                    key,
                    source,  # type: ignore[arg-type]  # read() is all that is used
                    -1,
                    metadata=tags,
                    part_size=self._part,
                    num_parallel_uploads=1,
                )
        except KeyTaken as error:
            found = self._look(key)
            if found is None or _metadata(found, "writer") != writer:
                return self._settle(found, source.drain(), error)
        except StorageUnavailable as error:
            if source.failure is not None:
                raise source.failure from None  # not what clearing up after it may have met
            if not source.ended:
                raise
            failed = error
        # S3 may answer 200 and report the failure in the body, and a refusal may follow a success nobody heard of.
        found = self._look(key)
        if found is not None and (found.size, _metadata(found, "writer")) == (source.size, writer):
            return source.info()
        raise failed or StorageUnavailable(f"the object store did not put the parts of {key} together")

    def _refuse_taken(self, key: str) -> None:
        """The look before an upload becomes visible."""
        if self._look(key) is not None:
            raise KeyTaken(key)

    def _look(self, key: str) -> Object | None:
        with suppress(NotFound), typed_errors(self.bucket, key):
            return self._client.stat_object(self.bucket, key)
        return None

    def _settle(self, found: Object | None, info: ObjectInfo, taken: KeyTaken | None = None) -> ObjectInfo:
        """What a put comes to when its key exists: nothing to do if the bytes are the same."""
        if found is None:
            raise StorageUnavailable(f"{info.key} is being written or deleted right now") from taken
        if found.size == info.size and (_metadata(found, "sha256") or self._digest(info.key)) == info.sha256:
            return info
        raise Conflict(f"object {info.key} exists with other bytes; objects are never overwritten") from taken

    def _digest(self, key: str) -> str:
        with self.open(key) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]

    def get_bytes(self, key: str) -> bytes:
        """Read an object whole."""
        with self.open(key) as stream:
            return stream.read()

    def open(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        """Open ``length`` bytes from ``start`` (to the end if None); a range past the end is cut short.

        A broken connection is taken up again a few times; then reading raises :class:`StorageUnavailable`.
        """
        if start < 0 or (length is not None and length < 0):
            raise ValueError("start and length must not be negative")
        if length == 0:
            self.size(key)
            return io.BytesIO()

        def ask(offset: int) -> BaseHTTPResponse:
            first, count = start + offset, 0 if length is None else length - offset
            with typed_errors(self.bucket, key):
                response = self._client.get_object(self.bucket, key, offset=first, length=count)
            if (first or count) and response.status != 206:
                response.close()
                raise StorageUnavailable(f"the object store does not serve a byte range of {key}")
            return response

        key_segments(key)
        try:
            return io.BufferedReader(ResumingBody(key, ask), CHUNK)
        except PastEnd:
            return io.BytesIO()

    def fetch(self, info: ObjectInfo, path: Path) -> None:
        """Download an object to ``path``, verifying size and SHA-256; a wrong one leaves no file."""
        with self.open(info.key) as source:
            try:
                copy_verified(source, info, path)
            except OSError as error:
                raise StorageUnavailable(f"cannot write {path.name}: {error.strerror or error}") from error

    def size(self, key: str) -> int:
        """Size in bytes."""
        key_segments(key)
        found = self._look(key)
        if found is None:
            # The answer to HEAD does not say what is missing.
            with typed_errors(self.bucket, key):
                bucket = self._client.bucket_exists(self.bucket)
            raise NotFound(f"no object {key}") if bucket else no_bucket(self.bucket)
        return found.size or 0

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with ``prefix``, in order; a page at a time."""
        with typed_errors(self.bucket, prefix):
            for found in self._client.list_objects(self.bucket, prefix=prefix or None, recursive=True):
                if found.object_name is not None:
                    yield found.object_name

    def delete(self, key: str) -> None:
        """Remove an object; a missing key is no error."""
        key_segments(key)
        with suppress(NotFound), typed_errors(self.bucket, key):
            self._client.remove_object(self.bucket, key)

    def download_url(self, key: str, *, expires_seconds: int, filename: str, sha256: str | None = None) -> str:
        """A link on the public endpoint; S3 allows seven days at most. Its entity tag is the server's own."""
        self.size(key)
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", filename)
        exact = quote(filename, safe="")
        headers: _Headers = {
            "response-content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}",
            "response-content-type": mimetypes.guess_type(filename)[0] or "application/octet-stream",
        }
        expires = timedelta(seconds=max(1, min(expires_seconds, LONGEST_LINK_SECONDS)))
        return self._signer.presigned_get_object(self.bucket, key, expires=expires, response_headers=headers)

    def direct(self) -> S3DirectUploads:
        """Presigned PUT links and multipart uploads of this bucket."""
        return S3DirectUploads(self._client, self._signer, self.bucket)


def _host(endpoint: str, name: str) -> tuple[str, bool]:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or "@" in parts.netloc:
        raise InvalidSettings(f"{name} must look like http(s)://host:port, without a path, user or password")
    return parts.netloc, parts.scheme == "https"


def _metadata(found: Object, name: str) -> str | None:
    value = (found.metadata or {}).get(f"x-amz-meta-{name}")
    return None if value is None else str(value)
