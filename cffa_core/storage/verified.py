"""Copying an object to a file with every byte checked: the one way in which bytes leave a store for work.

What the source is (a file, a response) is the stores' business, and so is the meaning of its errors.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import BinaryIO

from cffa_core.errors import CorruptArtifact
from cffa_core.storage.base import ObjectInfo

CHUNK = 1 << 20


def copy_verified(source: BinaryIO, info: ObjectInfo, path: Path) -> None:
    """Copy ``source`` to ``path``, which appears only once size and SHA-256 are those of ``info``.

    Raises :class:`CorruptArtifact`; then an older file at ``path`` stays, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    digest, size = hashlib.sha256(), 0
    try:
        with partial.open("xb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        if size != info.size:
            raise CorruptArtifact(f"object {info.key} has {size} bytes, {info.size} were recorded")
        if digest.hexdigest() != info.sha256:
            raise CorruptArtifact(f"object {info.key} does not match its recorded sha256 {info.sha256}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
