"""Working folders of one machine: a cache of verified inputs that all its workers share, and one folder per worker.

A worker's folder is locked for as long as its process lives, so what dead workers left can be told apart and removed.
Everything here may be deleted when nothing runs. Nothing here knows the record.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cffa_core.disk_files import sha256_of
from cffa_core.errors import StorageUnavailable
from cffa_core.jobs.records import StoredFiles
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.manifest import fetch_files

LOCK = "lock"
NEW = ".new-"
BIRTH_SECONDS = 600.0
KEEP_CACHED_SECONDS = 14 * 86_400.0


class Scratch:
    """This worker's own folder below ``root``; locked until :meth:`close` or the end of the process."""

    def __init__(self, root: Path, worker_id: str) -> None:
        self.cache = root / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        self._workers = root / "workers"
        self._workers.mkdir(exist_ok=True)
        self._own = self._workers / worker_id
        # Locked before it has its name, so that no other worker takes it for a dead one's.
        unnamed = Path(tempfile.mkdtemp(prefix=NEW, dir=self._workers))
        self._lock = _locked(unnamed / LOCK)
        unnamed.rename(self._own)
        self._remove_dead()
        prune_cache(self.cache, KEEP_CACHED_SECONDS)

    def unit_folder(self, unit_id: str, attempt: int) -> Path:
        """A new, empty folder for one attempt; those of earlier units of this worker are removed."""
        for old in self._own.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
        folder = self._own / f"{unit_id}-a{attempt}"
        folder.mkdir()
        return folder

    def close(self) -> None:
        """Remove the worker's folder."""
        shutil.rmtree(self._own, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def _remove_dead(self) -> None:
        for other in self._workers.iterdir():
            if other == self._own or (other.name.startswith(NEW) and _age(other) < BIRTH_SECONDS):
                continue
            lock = _locked(other / LOCK)
            if lock is not None:
                with lock:
                    shutil.rmtree(other, ignore_errors=True)


def cached(
    objects: ObjectStore, stored: StoredFiles, cache: Path, kind: str, on_file: Callable[[int, int], None]
) -> Path:
    """Folder holding exactly ``stored``, fetched and verified, or found in the cache and verified again.

    The folder is named by the digest of names and contents, appears by one rename, and is shared by all workers of
    the machine; nobody writes into it. ``on_file(done, total)`` is called per file. Raises ``CorruptArtifact`` when
    stored bytes are not what the record says.
    """
    folder = cache / kind / files_digest(stored)
    if folder.is_dir():
        if _is_intact(folder, stored, on_file):
            os.utime(folder)
            return folder
        _remove_aside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _cleared(Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))) as staging:
        fetch_each(objects, stored, staging, on_file)
        try:
            staging.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise StorageUnavailable(f"cannot keep {folder.name} in the cache: {error}") from error
            if not _is_intact(folder, stored, on_file):
                raise StorageUnavailable(f"the cached {kind} {folder.name} changed while it was fetched") from error
    return folder


def fetch_each(objects: ObjectStore, stored: StoredFiles, folder: Path, on_file: Callable[[int, int], None]) -> None:
    """Fetch and verify ``stored`` below ``folder``, reporting after each file."""
    for done, (name, info) in enumerate(sorted(stored.files.items()), start=1):
        fetch_files(objects, StoredFiles({name: info}), folder)
        on_file(done, len(stored.files))


def files_digest(stored: StoredFiles) -> str:
    """SHA-256 (hex) over names and digests of ``stored``: equal for equal content, wherever it is kept."""
    listing = "".join(f"{name}\0{info.sha256}\n" for name, info in sorted(stored.files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def prune_cache(cache: Path, keep_seconds: float) -> None:
    """Remove cached inputs that nobody has asked for within ``keep_seconds``, and fetches that never ended."""
    for entry in cache.glob("*/*"):
        if _age(entry) > keep_seconds:
            _remove_aside(entry)


def _is_intact(folder: Path, stored: StoredFiles, on_file: Callable[[int, int], None]) -> bool:
    found = sum(1 for path in folder.rglob("*") if path.is_file())
    if found != len(stored.files):
        return False
    for done, (name, info) in enumerate(sorted(stored.files.items()), start=1):
        path = folder / name
        if not path.is_file() or path.stat().st_size != info.size:
            return False
        if sha256_of(path) != info.sha256:
            return False
        on_file(done, len(stored.files))
    return True


def _age(path: Path) -> float:
    """Seconds since ``path`` was last changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_aside(folder: Path) -> None:
    """Remove a folder such that nobody sees it half removed."""
    aside = folder.with_name(f".gone-{os.getpid()}-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _cleared(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path) -> IO[bytes] | None:
    """The file, open and exclusively locked, or None if a living process holds it."""
    try:
        file = path.open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
