"""Files that users send straight to the local store: signed PUT links of the API, and parts that are joined later.

The counterpart of S3's presigned and multipart uploads (``s3_direct``); the route behind the links is the API's.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

from cffa_core.errors import NotFound

if TYPE_CHECKING:
    from cffa_core.storage.local import LocalStore


class LocalDirectUploads:
    """A :class:`~cffa_core.storage.base.DirectUploads` of a :class:`LocalStore`.

    Part ``n`` of ``KEY`` is an object of its own below ``KEY-ID/``. Unlike a server of S3 the API behind the links
    takes exactly as many bytes as were announced.
    """

    def __init__(self, store: LocalStore, base_url: str) -> None:
        self._store = store
        self._base_url = base_url

    def put_url(self, key: str, *, size: int, expires_seconds: int) -> str:
        """See :class:`DirectUploads`."""
        token = self._store.token(key, "PUT", "", expires_seconds, size=size)
        return f"{self._base_url}/v1/blobs/{quote(token)}"

    def begin_parts(self, key: str) -> str:
        """See :class:`DirectUploads`."""
        return secrets.token_hex(8)

    def part_url(self, key: str, multipart_id: str, number: int, *, size: int, expires_seconds: int) -> str:
        """See :class:`DirectUploads`."""
        return self.put_url(_part(key, multipart_id, number), size=size, expires_seconds=expires_seconds)

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`DirectUploads`."""
        for key in self._store.list(prefix):
            yield key, self._store.size(key)

    def parts(self, key: str, multipart_id: str) -> dict[int, int]:
        """See :class:`DirectUploads`."""
        return {int(name.rpartition("/p")[2]): size for name, size in self.sizes(f"{key}-{multipart_id}/")}

    def join(self, key: str, multipart_id: str) -> None:
        """See :class:`DirectUploads`."""
        numbers = sorted(self.parts(key, multipart_id))
        if not numbers:
            self._store.size(key)  # joined before, or NotFound
            return
        parts = (self._store.open(_part(key, multipart_id, number)) for number in numbers)
        with io.BufferedReader(_Chain(parts)) as whole:
            self._store.put_stream(key, whole)
        self.abort(key, multipart_id)

    def abort(self, key: str, multipart_id: str) -> None:
        """See :class:`DirectUploads`."""
        for name, _ in list(self.sizes(f"{key}-{multipart_id}/")):
            self._store.delete(name)


def _part(key: str, multipart_id: str, number: int) -> str:
    if number < 1:
        raise NotFound(f"{key} has no part {number}")
    return f"{key}-{multipart_id}/p{number:05d}"


class _Chain(io.RawIOBase):
    """Several streams, one after the other; each is closed at its end."""

    def __init__(self, streams: Iterator[BinaryIO]) -> None:
        self._streams = streams
        self._now: BinaryIO | None = next(streams, None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self._now is not None:
            data = self._now.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._now.close()
            self._now = next(self._streams, None)
        return 0

    def close(self) -> None:
        if self._now is not None:
            self._now.close()
        super().close()
