"""How the S3 store speaks HTTP: bounded times and retries, conditional writes, bodies that resume, typed errors.

Which requests make up an operation is ``s3.py``'s part. The client under it is minio's, which signs and parses.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree.ElementTree import ParseError

import urllib3
from minio.error import MinioException, S3Error, ServerError
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, MaxRetryError

from cffa_core.errors import NotFound, StorageUnavailable

RETRIES = 3
RESUMES = 3
_BACKOFF_SECONDS = 0.2
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_EXISTS = {"PreconditionFailed", "ConditionalRequestConflict"}
_REFUSED = {
    "AccessDenied",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
    "ExpiredToken",
}


class KeyTaken(Exception):
    """The server refused a conditional write because the key exists, or is being written right now."""


class PastEnd(Exception):
    """A byte range was asked for that begins at or after the end."""


class WriteOncePool(urllib3.PoolManager):
    """Connections that ask the server to create objects and never to replace them.

    ``If-None-Match: *`` goes with every request that makes an object visible. The minio client cannot send it; S3
    lets headers outside the signature pass. A server that answers 501 (not implemented) is not asked again.
    Retries, also of writes, are safe: the body is held in memory, and a write that had landed without our hearing of
    it is refused as existing and then compared.
    """

    def __init__(self, *, connect_seconds: float, read_seconds: float, retries: int = RETRIES) -> None:
        super().__init__(
            num_pools=4,
            maxsize=32,
            timeout=urllib3.Timeout(connect=connect_seconds, read=read_seconds),
            retries=urllib3.Retry(
                total=retries,
                redirect=False,  # a signature holds for one host
                status_forcelist=_TRANSIENT,
                allowed_methods=None,
                backoff_factor=_BACKOFF_SECONDS,
                backoff_max=5.0,
                respect_retry_after_header=False,  # it may name an hour
                raise_on_status=False,
            ),
        )
        self._conditional = True

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, redirect: bool = True, **options: Any
    ) -> BaseHTTPResponse:
        """Send one signed request, conditional if it creates an object."""
        if not (self._conditional and _creates_object(method, url)):
            return super().urlopen(method, url, redirect, **options)
        headers = options["headers"].copy()
        headers["If-None-Match"] = "*"
        response = super().urlopen(method, url, redirect, **{**options, "headers": headers})
        if response.status != 501:
            return response
        response.drain_conn()
        self._conditional = False
        return super().urlopen(method, url, redirect, **options)


def _creates_object(method: str, url: str) -> bool:
    """PutObject and CompleteMultipartUpload; not parts, buckets or their settings."""
    parts = urlsplit(url)
    if "/" not in parts.path.strip("/"):
        return False
    asked = set(parse_qs(parts.query, keep_blank_values=True))
    return (method == "PUT" and not asked) or (method == "POST" and asked == {"uploadId"})


class ResumingBody(io.RawIOBase):
    """The bytes of a response; a connection that breaks is replaced by one that goes on where it ended.

    ``ask(offset)`` requests the bytes from ``offset`` (counted from the start of this body) to its end. Objects never
    change, so that the pieces belong together. After ``RESUMES`` breaks :class:`StorageUnavailable`: a body that is
    too short never looks complete.
    """

    def __init__(self, key: str, ask: Callable[[int], BaseHTTPResponse]) -> None:
        self._key = key
        self._ask = ask
        self._at = 0
        self._breaks = 0
        self._response = ask(0)
        self._left = _length(key, self._response)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while self._left and len(view):
            try:
                data = self._response.read(min(len(view), self._left), decode_content=False)
                if not data:
                    raise StorageUnavailable(f"object {self._key} was cut off {self._left} bytes before its end")
            except (HTTPError, StorageUnavailable) as error:
                self._resume(error)
                continue
            view[: len(data)] = data
            self._at += len(data)
            self._left -= len(data)
            return len(data)
        return 0

    def close(self) -> None:
        if not self.closed:
            _drop(self._response)
        super().close()

    def _resume(self, broken: Exception) -> None:
        self._breaks += 1
        if self._breaks > RESUMES:
            raise StorageUnavailable(
                f"object {self._key} was cut off {self._left} bytes before its end, {self._breaks} times"
            ) from broken
        _drop(self._response)
        try:
            self._response = self._ask(self._at)
        except PastEnd:
            raise StorageUnavailable(f"object {self._key} changed while it was read") from broken
        if _length(self._key, self._response) != self._left:
            raise StorageUnavailable(f"object {self._key} changed while it was read") from broken


def _length(key: str, response: BaseHTTPResponse) -> int:
    try:
        return int(response.headers["content-length"])
    except (KeyError, ValueError) as error:
        _drop(response)
        raise StorageUnavailable(f"the object store does not say how long object {key} is") from error


def _drop(response: BaseHTTPResponse) -> None:
    """Close a response: its connection is kept if it was read to the end."""
    response.close()
    response.release_conn()


@contextmanager
def typed_errors(bucket: str, key: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what the client raises into typed errors; ``writing``: nothing may be missing, as nothing was asked for.

    Messages say neither host nor keys: some reach users. A missing bucket is :class:`StorageUnavailable`, never
    :class:`NotFound`, as the objects may well exist.
    """
    try:
        yield
    except S3Error as error:
        if error.code in _EXISTS:
            raise KeyTaken(key) from error
        if error.code == "InvalidRange":
            raise PastEnd(key) from error
        if error.code == "NoSuchKey" and not writing:
            raise NotFound(f"no object {key}") from error
        if error.code == "NoSuchBucket":
            raise no_bucket(bucket) from error
        raise StorageUnavailable(_explained(error)) from error
    except MaxRetryError as error:
        reason = type(error.reason or error).__name__
        raise StorageUnavailable(f"the object store cannot be reached ({reason}); {key} was asked for") from error
    except (MinioException, HTTPError, ParseError, UnicodeDecodeError) as error:
        what = f"HTTP {error.status_code}" if isinstance(error, ServerError) else type(error).__name__
        raise StorageUnavailable(
            f"the object store gave no answer to work with ({what}); {key} was asked for"
        ) from error


def no_bucket(bucket: str) -> StorageUnavailable:
    """The error of a bucket that is not there."""
    return StorageUnavailable(
        f"the object store has no bucket {bucket}: run the set-up that makes it, or correct CFFA_S3_BUCKET"
    )


def _explained(error: S3Error) -> str:
    if error.code in _REFUSED:
        return (
            f"the object store refused the keys or their rights ({error.code}); check CFFA_S3_ACCESS_KEY and its secret"
        )
    return f"the object store refused a request ({error.code}, HTTP {error.response.status})"
