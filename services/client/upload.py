"""A data-set folder as a zip that is made while it is sent: stored, never compressed, never whole in memory or on disk.

Reads files and yields bytes; which route takes them is the client's business.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cffa_core.errors import NotFound

BLOCK = 1 << 18
OnBytes = Callable[[int, int], None]
EARLIEST = (1980, 1, 1, 0, 0, 0)


class _Outlet:
    """The unseekable end that ``zipfile`` writes to; what was written since the last look is taken by :meth:`take`."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._blocks.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing to close."""

    def take(self) -> bytes:
        """All bytes written since the last call."""
        data, self._blocks = b"".join(self._blocks), []
        return data


def files_below(folder: Path) -> list[Path]:
    """Regular files below ``folder`` in name order, without hidden ones; links are not followed."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(root) / name for name in sorted(names) if not name.startswith("."))
        found.extend(path for path in paths if path.is_file() and not path.is_symlink())
    return found


def zip_folder(folder: Path, on_bytes: OnBytes | None = None) -> Iterator[bytes]:
    """Yield a stored zip of ``folder``, about 256 KiB at a time; ``on_bytes(read, total)`` counts file bytes."""
    files = files_below(folder)
    total = sum(path.stat().st_size for path in files)
    read = 0
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            member = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EARLIEST)
            with path.open("rb") as source, archive.open(member, "w", force_zip64=True) as target:
                while block := source.read(BLOCK):
                    target.write(block)
                    read += len(block)
                    if on_bytes is not None:
                        on_bytes(read, total)
                    yield outlet.take()
    yield outlet.take()


def read_file(path: Path, on_bytes: OnBytes | None = None) -> Iterator[bytes]:
    """Yield a file's bytes; ``on_bytes(read, total)`` counts them."""
    total, read = path.stat().st_size, 0
    with path.open("rb") as source:
        while block := source.read(BLOCK):
            read += len(block)
            if on_bytes is not None:
                on_bytes(read, total)
            yield block


class Body:
    """Upload body of a folder or zip: an iterator over bytes that can also be ``read`` in pieces.

    Raises ``NotFound`` if ``source`` does not exist.
    """

    def __init__(self, source: Path, on_bytes: OnBytes | None = None) -> None:
        if not source.exists():
            raise NotFound(f"{source} does not exist; name a folder or zip file of pairs")
        self._blocks = zip_folder(source, on_bytes) if source.is_dir() else read_file(source, on_bytes)
        self._rest = b""

    def __iter__(self) -> Iterator[bytes]:
        return (block for block in self._blocks if block)

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; empty only at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
