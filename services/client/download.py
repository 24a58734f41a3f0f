"""Files from the service to disk: resumed where they broke off, checked by SHA-256, in place only when whole.

The part that was received lies beside the target as ``NAME.<digest>.part``; its name carries the expected digest, so
the rest of another file is never appended to it. Knows ranges and digests, not jobs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from cffa_core.disk_files import sha256_of
from cffa_core.errors import CorruptArtifact, StorageUnavailable
from services.client.problems import ApiError, ServiceUnreachable, from_response

TRIES = 6
OnBytes = Callable[[int, int], None]


def fetch(
    http: httpx.Client,
    url: Callable[[], str],
    target: Path,
    *,
    sha256: str,
    size: int,
    on_bytes: OnBytes | None = None,
) -> Path:
    """Download to ``target`` and return it; ``url()`` gives a fresh address for each try, since signed ones expire.

    Raises ``CorruptArtifact`` (and removes what it received) if size or digest are wrong, ``ServiceUnreachable`` when
    the connection breaks six times without a byte of progress, and the service's own errors.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file() and target.stat().st_size == size and sha256_of(target) == sha256:
        return target
    part = target.with_name(f"{target.name}.{sha256[:16]}.part")
    part.touch()
    failures = 0
    while (have := part.stat().st_size) < size:
        try:
            _receive(http, url(), part, have, size, on_bytes)
            broken: Exception | None = None  # an answer that ended too early
        except httpx.TransportError as error:
            broken = error
        except ApiError as error:
            if not error.may_retry:
                raise
            broken = error
        failures = 0 if part.stat().st_size > have else failures + 1
        if failures >= TRIES:
            why = str(broken or f"answers end before the last of its {size} bytes")
            raise ServiceUnreachable(f"the download of {target.name} keeps breaking off: {why}") from broken
        if failures:
            time.sleep(min(8.0, 0.25 * 2**failures))
    found = sha256_of(part)
    if part.stat().st_size != size or found != sha256:
        part.unlink()
        raise CorruptArtifact(
            f"{target.name}: received bytes have SHA-256 {found}, expected {sha256}; they were removed, download again"
        )
    with part.open("rb") as whole:
        os.fsync(whole.fileno())
    part.replace(target)
    return target


def _receive(http: httpx.Client, url: str, part: Path, have: int, size: int, on_bytes: OnBytes | None) -> None:
    """Append what is missing; a server that ignores the range starts the file anew."""
    headers = {"Accept-Encoding": "identity"}
    if have:
        # Without If-Range: an object store's entity tag is not the digest, and the digest is checked at the end.
        headers["Range"] = f"bytes={have}-"
    with http.stream("GET", url, headers=headers, follow_redirects=True) as response:
        if response.is_error:
            response.read()
            raise from_response(response)
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        received = have if resumed else 0
        try:
            with part.open("ab" if resumed else "wb") as file:
                for block in response.iter_raw():
                    file.write(block)
                    received += len(block)
                    if received > size:
                        break
                    if on_bytes is not None:
                        on_bytes(received, size)
        except OSError as error:
            raise StorageUnavailable(f"cannot write {part}: {error.strerror}") from error
