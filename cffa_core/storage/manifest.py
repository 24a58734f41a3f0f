"""Published files as JSON, and the way folders enter and leave an object store.

Publishing stores every file first and returns their digests; only the caller's write to the record makes them
visible. Fetching verifies every byte. Nothing here knows about jobs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.records import StoredFiles
from cffa_core.storage.base import ObjectInfo, ObjectStore


def stored_to_json(stored: StoredFiles) -> dict[str, Any]:
    """``{name: {"key", "size", "sha256"}}``, as kept in the record."""
    return {
        name: {"key": info.key, "size": info.size, "sha256": info.sha256} for name, info in sorted(stored.files.items())
    }


def stored_from_json(raw: Mapping[str, Any] | None) -> StoredFiles:
    """Inverse of :func:`stored_to_json`; None gives no files. Raises :class:`CorruptArtifact` on any other shape."""
    try:
        return StoredFiles(
            {
                str(name): ObjectInfo(str(item["key"]), int(item["size"]), str(item["sha256"]))
                for name, item in (raw or {}).items()
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifact(f"a list of stored files is not readable: {error}") from error


def publish_folder(store: ObjectStore, folder: Path, key_of: Callable[[str], str]) -> StoredFiles:
    """Store every regular file below ``folder`` under ``key_of(relative name)``.

    Names use ``/``. Raises :class:`CorruptArtifact` for a symbolic link: what it points to is not the folder's.
    """
    files: dict[str, ObjectInfo] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise CorruptArtifact(f"{name} is a symbolic link; only regular files are published")
        if path.is_file():
            files[name] = store.put_file(key_of(name), path)
    return StoredFiles(files)


def fetch_files(store: ObjectStore, stored: StoredFiles, folder: Path) -> None:
    """Write all files below ``folder``, verifying size and SHA-256 of each.

    Raises :class:`CorruptArtifact` that names the first bad file (an unsafe name counts), or :class:`NotFound`.
    """
    for name, info in sorted(stored.files.items()):
        pure = PurePosixPath(name)
        if pure.is_absolute() or not pure.parts or ".." in pure.parts or "\\" in name or "\0" in name:
            raise CorruptArtifact(f"{name!r} is not a relative file name")
        path = folder / pure
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            store.fetch(info, path)
        except CorruptArtifact as error:
            raise CorruptArtifact(f"{name}: {error.message}", problems=error.problems) from error


def read_verified(store: ObjectStore, info: ObjectInfo) -> bytes:
    """Read a small object whole; raises :class:`CorruptArtifact` unless its bytes are the recorded ones."""
    data = store.get_bytes(info.key)
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise CorruptArtifact(f"object {info.key} does not match its recorded sha256 {info.sha256}")
    return data
