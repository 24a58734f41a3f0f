"""What is being stored, as it is read: measured and hashed on the way, one part at a time.

Sending it is ``s3.py``'s part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from cffa_core.errors import StorageUnavailable
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.verified import CHUNK


class UploadSource:
    """A stream that is hashed as it is read, and looks around once more before it ends."""

    def __init__(self, key: str, stream: BinaryIO, expected: ObjectInfo | None, before_end: Callable[[], None]) -> None:
        self._key, self._stream, self._expected, self._before_end = key, stream, expected, before_end
        self._pending = b""
        self._digest = hashlib.sha256()
        self.size = 0
        self.ended = False
        self.failure: Exception | None = None

    def peek(self, count: int) -> bytes:
        """The first ``count`` bytes, or all if there are fewer; the next :meth:`read` gives them again."""
        self._pending = self._take(count)
        return self._pending

    def read(self, count: int) -> bytes:
        """Exactly ``count`` bytes, fewer only at the end; what the stream raises is also kept as ``failure``."""
        pending, self._pending = self._pending[:count], self._pending[count:]
        data = pending if len(pending) == count else pending + self._take(count - len(pending))
        if len(data) < count and not self.ended:
            if self._expected is not None and self.info() != self._expected:
                raise StorageUnavailable(f"the file to be stored as {self._key} changed while it was read")
            self._before_end()
            self.ended = True
        return data

    def drain(self) -> ObjectInfo:
        """Read the rest only for its digest."""
        while self._take(CHUNK):
            pass
        return self.info()

    def info(self) -> ObjectInfo:
        """Size and digest of what was read."""
        return ObjectInfo(self._key, self.size, self._digest.hexdigest())

    def _take(self, count: int) -> bytes:
        chunks: list[bytes] = []
        try:
            with readable_source(self._key):
                while count and (chunk := self._stream.read(count)):
                    chunks.append(chunk)
                    self._digest.update(chunk)
                    self.size += len(chunk)
                    count -= len(chunk)
        except Exception as error:
            self.failure = error
            raise
        return b"".join(chunks)


@contextmanager
def readable_source(key: str) -> Iterator[None]:
    """Turn an error of the stream or file that is being stored into :class:`StorageUnavailable`."""
    try:
        yield
    except OSError as error:
        raise StorageUnavailable(f"cannot read what is to be stored as {key}: {error.strerror or error}") from error
