"""Object storage in a folder of this machine (embedded mode), and the signed tokens its blobs are served under.

An object appears by one rename of a complete, synced file and never changes. Serving the tokens over HTTP is the
API's part; nothing here knows about jobs.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import io
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from cffa_core.disk_files import flush, sha256_of
from cffa_core.errors import Conflict, Gone, NotFound, StorageUnavailable
from cffa_core.storage.base import ObjectInfo, key_segments
from cffa_core.storage.local_direct import LocalDirectUploads
from cffa_core.storage.verified import CHUNK, copy_verified

_INCOMING = ".incoming"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class BlobGrant:
    """What a blob token allows: one method on one key until ``expires`` (seconds since 1970).

    ``sha256`` is the object's digest where the signer knew it: the entity tag that a broken download resumes by.
    ``size`` is how many bytes a PUT must bring.
    """

    key: str
    method: str
    filename: str
    expires: int
    sha256: str | None = None
    size: int | None = None


class LocalStore:
    """An :class:`~cffa_core.storage.base.ObjectStore` below ``root``.

    ``secret`` signs blob tokens; ``base_url`` is the address of the API that serves them. Several processes may use
    one folder.
    """

    def __init__(self, root: Path, *, secret: bytes, base_url: str) -> None:
        self.root = Path(root)
        self._secret = secret
        self._base_url = base_url.rstrip("/")

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Store a file; see :class:`ObjectStore`. An existing key raises :class:`Conflict` unless bytes are equal."""
        with path.open("rb") as stream:
            return self.put_stream(key, stream)

    def put_bytes(self, key: str, data: bytes) -> ObjectInfo:
        """Store a small object; see :meth:`put_file`."""
        return self.put_stream(key, io.BytesIO(data))

    def put_stream(self, key: str, stream: BinaryIO) -> ObjectInfo:
        """Store a stream with bounded memory; see :meth:`put_file`."""
        target = self._path(key)
        digest, size = hashlib.sha256(), 0
        with _typed_errors(key), self._incoming() as (handle, temporary):
            while chunk := stream.read(CHUNK):
                handle.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            handle.flush()
            os.fsync(handle.fileno())
            info = ObjectInfo(key, size, digest.hexdigest())
            try:
                self._place(temporary, target)
            except FileExistsError as error:
                if not target.is_file() or (target.stat().st_size, sha256_of(target)) != (info.size, info.sha256):
                    raise Conflict(f"object {key} exists with other bytes; objects are never overwritten") from error
            flush(target.parent)
        return info

    def get_bytes(self, key: str) -> bytes:
        """Read an object whole."""
        with self.open(key) as stream:
            return stream.read()

    def open(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        """Open ``length`` bytes from ``start`` (to the end if None); a range past the end is cut short."""
        if start < 0 or (length is not None and length < 0):
            raise ValueError("start and length must not be negative")
        with _typed_errors(key):
            stream = self._path(key).open("rb")
            stream.seek(start)
        return stream if length is None else io.BufferedReader(_Range(stream, length))

    def fetch(self, info: ObjectInfo, path: Path) -> None:
        """Copy an object to ``path``, verifying size and SHA-256; a wrong one leaves no file."""
        with self.open(info.key) as source, _typed_errors(info.key):
            copy_verified(source, info, path)

    def size(self, key: str) -> int:
        """Size in bytes."""
        with _typed_errors(key):
            path = self._path(key)
            if not path.is_file():
                raise FileNotFoundError(path)
            return path.stat().st_size

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with ``prefix``, in order; read lazily, folder by folder."""
        # Folders outside the prefix are skipped, so that listing one job does not walk all of them.
        yield from self._walk(self.root, "", prefix)

    def delete(self, key: str) -> None:
        """Remove an object and the folders it leaves empty; a missing key is no error."""
        path = self._path(key)
        with _typed_errors(key):
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.root:
                    break
                try:
                    folder.rmdir()
                except OSError:  # not empty: something else lives there
                    break

    def remove_abandoned(self, older_than_seconds: float = 86_400.0) -> int:
        """Remove what killed writers left half-written, once nobody has written to it for so long; returns how many."""
        removed = 0
        for path in (self.root / _INCOMING).glob("*"):
            try:
                if time.time() - path.stat().st_mtime > older_than_seconds:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:  # its writer finished just now
                continue
        return removed

    def download_url(self, key: str, *, expires_seconds: int, filename: str, sha256: str | None = None) -> str:
        """A URL of the API that lets anyone GET the object until it expires."""
        self.size(key)
        return f"{self._base_url}/v1/blobs/{quote(self.token(key, 'GET', filename, expires_seconds, sha256))}"

    def direct(self) -> LocalDirectUploads:
        """Links of the API under which users PUT files themselves."""
        return LocalDirectUploads(self, self._base_url)

    def token(
        self,
        key: str,
        method: str,
        filename: str,
        expires_seconds: int,
        sha256: str | None = None,
        *,
        size: int | None = None,
    ) -> str:
        """Sign a grant: URL-safe text, HMAC-SHA256 over method, key, file name, expiry, digest and size."""
        key_segments(key)
        grant = {"k": key, "m": method, "f": filename, "e": int(time.time()) + expires_seconds, "h": sha256, "n": size}
        body = json.dumps(grant, separators=(",", ":"), sort_keys=True).encode()
        return f"{_encode(body)}.{_encode(self._sign(body))}"

    def read_token(self, token: str) -> BlobGrant:
        """Check a token; raises :class:`NotFound` unless this store signed it, :class:`Gone` once it expired."""
        try:
            body, signature = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split("."))
        except ValueError as error:
            raise NotFound("no such blob") from error
        if not hmac.compare_digest(signature, self._sign(body)):
            raise NotFound("no such blob")
        grant = json.loads(body)
        if grant["e"] <= time.time():
            raise Gone("this download link has expired; ask for a fresh one")
        return BlobGrant(
            key=grant["k"],
            method=grant["m"],
            filename=grant["f"],
            expires=grant["e"],
            sha256=grant["h"],
            size=grant.get("n"),
        )

    def _sign(self, body: bytes) -> bytes:
        return hmac.new(self._secret, b"cffa-blob/1\0" + body, hashlib.sha256).digest()

    def _path(self, key: str) -> Path:
        """File of a key; refuses any key that could leave the root or hide in it."""
        return self.root.joinpath(*key_segments(key))

    @contextmanager
    def _incoming(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A temporary file in the same file system, gone when the block ends."""
        folder = self.root / _INCOMING
        self._make_folder(folder)
        path = folder / secrets.token_hex(16)
        try:
            with path.open("xb") as handle:
                yield handle, path
        finally:
            path.unlink(missing_ok=True)

    def _place(self, temporary: Path, target: Path) -> None:
        """Make a complete file visible; its folder may be taken away meanwhile by a :meth:`delete` next to it."""
        for _ in range(20):
            try:
                self._make_folder(target.parent)
                link_new(temporary, target)
            except FileNotFoundError:
                continue
            return
        raise StorageUnavailable(f"the folder of {target.name} keeps vanishing")

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents so that they survive a power cut."""
        missing = [folder, *folder.parents]
        for path in reversed([path for path in missing if not path.exists()]):
            path.mkdir(exist_ok=True)
            flush(path.parent)

    def _walk(self, folder: Path, at: str, prefix: str) -> Iterator[str]:
        try:
            entries = [
                (entry.name + "/" * is_folder, is_folder)
                for entry in os.scandir(folder)
                for is_folder in (entry.is_dir(follow_symlinks=False),)
            ]
        except (FileNotFoundError, NotADirectoryError):
            return
        # With its "/" a folder sorts where its keys belong: "a-b" < "a/b" < "a0".
        for name, is_folder in sorted(entries):
            key = at + name
            if name.startswith(".") or not (key.startswith(prefix) or (is_folder and prefix.startswith(key))):
                continue
            if is_folder:
                yield from self._walk(folder / name[:-1], key, prefix)
            else:
                yield key


def link_new(source: Path, target: Path) -> None:
    """Give a complete file its final name; raises FileExistsError rather than replace another.

    A hard link is the one atomic "create unless it exists". Where a file system has none, a rename after a look comes
    next to it; keys carry the attempt that wrote them, so that two writers of one key are of one mind.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        source.rename(target)


class _Range(io.RawIOBase):
    """The next ``length`` bytes of an open file."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self._stream = stream
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@contextmanager
def _typed_errors(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise NotFound(f"no object {key}") from error
    except OSError as error:
        raise StorageUnavailable(f"local storage cannot serve {key}: {error.strerror or error}") from error
