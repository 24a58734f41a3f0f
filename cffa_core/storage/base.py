"""The object-store protocol and the one place that builds and checks keys.

Objects are immutable: a key is written once. Keys of job products carry the attempt that wrote them, so a stale
worker can never overwrite a newer one's work; readers follow only what the record points to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from cffa_core.errors import NotFound

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\/]")
DATASETS_PREFIX = "datasets/"
UPLOADS_PREFIX = "uploads/"
_SEGMENT_BYTES = 240
_KEY_BYTES = 1024


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes and SHA-256 (hex) of a stored object."""

    key: str
    size: int
    sha256: str


class ObjectStore(Protocol):
    """Plain put/get by key; every implementation passes tests/contract/test_object_store.py.

    All methods raise :class:`cffa_core.errors.StorageUnavailable` when the store cannot be reached or is full, and
    :class:`cffa_core.errors.NotFound` for a missing key.
    """

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Store a file; visible under ``key`` only when complete and durable.

        An existing key raises :class:`cffa_core.errors.Conflict` unless its bytes are the same.
        """

    def put_stream(self, key: str, stream: BinaryIO) -> ObjectInfo:
        """Store a stream of unknown length with bounded memory; visible only when complete and durable."""

    def put_bytes(self, key: str, data: bytes) -> ObjectInfo:
        """Store a small object."""

    def get_bytes(self, key: str) -> bytes:
        """Read a small object whole."""

    def open(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        """Open a byte range for streaming; the caller closes it."""

    def fetch(self, info: ObjectInfo, path: Path) -> None:
        """Download to ``path``, verifying size and SHA-256; raises ``CorruptArtifact`` and leaves no file if wrong."""

    def size(self, key: str) -> int:
        """Size in bytes."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys below ``prefix``, in order."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing key is no error."""

    def download_url(self, key: str, *, expires_seconds: int, filename: str, sha256: str | None = None) -> str:
        """A URL that lets anyone who has it GET the object (with Range) until it expires.

        ``sha256`` is served as its entity tag, where the store can do that.
        """

    def direct(self) -> DirectUploads:
        """How users send files straight to this store."""


class DirectUploads(Protocol):
    """Links under which users PUT files into the store themselves, whole or in parts; none passes through the caller.

    Nobody vouches for what arrives: :meth:`sizes` and :meth:`parts` say how many bytes it is. Raises as
    :class:`ObjectStore` does.
    """

    def put_url(self, key: str, *, size: int, expires_seconds: int) -> str:
        """A URL that lets anyone who has it PUT an object of ``size`` bytes until it expires."""

    def begin_parts(self, key: str) -> str:
        """Begin an object that comes in parts; returns the id of this upload."""

    def part_url(self, key: str, multipart_id: str, number: int, *, size: int, expires_seconds: int) -> str:
        """A URL for part ``number`` (from 1) of ``size`` bytes; each but the last has at least 5 MiB."""

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys below ``prefix`` and their sizes in bytes, in order of key."""

    def parts(self, key: str, multipart_id: str) -> dict[int, int]:
        """Sizes of the parts that arrived, by number; none once they were joined or given up."""

    def join(self, key: str, multipart_id: str) -> None:
        """Make the object of the parts that arrived; harmless if it was done. ``NotFound`` if none arrived."""

    def abort(self, key: str, multipart_id: str) -> None:
        """Give an upload in parts up and remove what arrived; harmless if it is over."""


def key_segments(key: str) -> list[str]:
    """The segments of a key; raises :class:`NotFound` for one that no store may hold.

    No segment is empty, begins with a dot or holds a control character or backslash, so that no key can leave a
    local folder or hide in it; the lengths fit every file system and S3 (240 bytes a segment, 1024 in all).
    """
    segments = key.split("/")
    try:
        for part in segments:
            if not part or part.startswith(".") or _UNSAFE.search(part) or len(part.encode()) > _SEGMENT_BYTES:
                raise NotFound(f"{key!r} is not an object key")
        if len(key.encode()) > _KEY_BYTES:
            raise NotFound(f"{key[:80]!r}... is longer than {_KEY_BYTES} bytes")
    except UnicodeEncodeError as error:
        raise NotFound(f"{key!r} is not an object key") from error
    return segments


def dataset_key(dataset_id: str, name: str) -> str:
    """Key of one file of a checked data set, e.g. ``cf/m024.png``."""
    return f"{DATASETS_PREFIX}{dataset_id}/{name}"


def upload_key(upload_id: str, number: int) -> str:
    """Key under which a file of an upload arrives: by its number, never by the name that its owner gave it."""
    return f"{UPLOADS_PREFIX}{upload_id}/f{number:05d}"


def part_key(job_id: str, part: int, attempt: int, name: str) -> str:
    """Key of one file of a generation part."""
    return f"jobs/{job_id}/parts/{part:05d}/a{attempt}/{name}"


def checkpoint_key(job_id: str, step: int, attempt: int, name: str) -> str:
    """Key of one file of a training checkpoint."""
    return f"jobs/{job_id}/checkpoints/{step:08d}/a{attempt}/{name}"


def result_key(job_id: str, unit: str, attempt: int, name: str) -> str:
    """Key of one file of a unit's result (archive, model, report, log)."""
    return f"jobs/{job_id}/{unit}/a{attempt}/{name}"
