"""All files of an export to disk: its archives in order, then its manifest; each is resumed and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath

import httpx

from cffa_core.errors import Conflict, CorruptArtifact
from services.client import download
from services.client.resources import Archive, Archives

OnBytes = Callable[[int, int], None]


def fetch_export(
    http: httpx.Client,
    listing: Callable[[], Archives],
    archive: Callable[[int], Archive],
    folder: Path,
    on_bytes: OnBytes | None,
) -> Archives:
    """Download what ``listing()`` names into ``folder`` and return it; ``archive(n)`` gives a fresh link for each try.

    ``on_bytes`` counts all files together. Raises ``Conflict`` for an export that has not succeeded, and
    ``CorruptArtifact`` also for names that would leave the folder.
    """
    found = listing()
    if found.manifest is None:
        raise Conflict("the export has not succeeded, so there is nothing to download; wait for it, or see why")
    files = [(file.filename, file.sha256, file.bytes, _link(archive, file.number)) for file in found.parts]
    files.append((found.manifest.name, found.manifest.sha256, found.manifest.bytes, lambda: _manifest_link(listing)))
    total, before = sum(size for _, _, size, _ in files), 0
    for name, sha256, size, url in files:
        if PurePath(name).name != name or name in ("", ".", ".."):
            raise CorruptArtifact(f"{name!r} is no name for a file; nothing was written to it")
        count = _from(before, total, on_bytes) if on_bytes is not None else None
        download.fetch(http, url, folder / name, sha256=sha256, size=size, on_bytes=count)
        before += size
    return found


def _link(archive: Callable[[int], Archive], number: int | None) -> Callable[[], str]:
    return lambda: archive(number or 0).url


def _manifest_link(listing: Callable[[], Archives]) -> str:
    manifest = listing().manifest
    if manifest is None:
        raise CorruptArtifact("the export has lost its manifest; post it again")
    return manifest.url


def _from(before: int, total: int, on_bytes: OnBytes) -> OnBytes:
    return lambda done, size: on_bytes(before + done, total)
