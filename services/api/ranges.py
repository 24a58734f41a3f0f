"""Serving stored bytes: single byte ranges, entity tags and streaming (RFC 9110, sections 13 and 14).

Works on anything that opens a range of a stored object; knows neither tokens nor jobs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import BinaryIO
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from services.api.problems import RangeNotSatisfiable

CHUNK = 1 << 18
_ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.IGNORECASE)

Opener = Callable[[int, int], BinaryIO]


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and length that ``header`` asks for, or None to send everything.

    Malformed and multiple ranges are ignored, as RFC 9110 allows. Raises :class:`RangeNotSatisfiable` for a range
    that holds no byte of the object.
    """
    match = _ONE_RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.group(1) == match.group(2) == "":
        return None
    if match.group(1) == "":
        length = min(int(match.group(2)), size)
        if length == 0:
            raise RangeNotSatisfiable(size)
        return size - length, length
    first = int(match.group(1))
    last = int(match.group(2)) if match.group(2) else size - 1
    if match.group(2) and last < first:
        return None
    if first >= size:
        raise RangeNotSatisfiable(size)
    return first, min(last, size - 1) - first + 1


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether an ``If-None-Match`` header names ``etag`` (weak comparison)."""
    if header is None:
        return False
    named = {part.strip().removeprefix("W/") for part in header.split(",")}
    return "*" in named or etag.removeprefix("W/") in named


def serve(
    request: Request,
    opener: Opener,
    *,
    size: int,
    sha256: str | None,
    media_type: str,
    filename: str,
    inline: bool = False,
    immutable: bool = True,
) -> Response:
    """Answer GET or HEAD for ``size`` bytes that ``opener(start, length)`` streams; memory stays at one chunk."""
    disposition = "inline" if inline else "attachment"
    ascii_name = re.sub(r"[^A-Za-z0-9._-]", "_", filename)
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"{disposition}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(filename, safe='')}",
        "Cache-Control": "private, max-age=31536000, immutable" if immutable else "private, no-cache",
    }
    etag = f'"{sha256}"' if sha256 else None
    if etag is not None:
        headers["ETag"] = etag
        if etag_matches(request.headers.get("if-none-match"), etag):
            return Response(status_code=304, headers=headers)
    if_range = request.headers.get("if-range")
    wanted = parse_range(request.headers.get("range"), size) if if_range is None or if_range == etag else None
    start, length = wanted or (0, size)
    status = 200
    if wanted is not None:
        status = 206
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    headers["Content-Length"] = str(length)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    return StreamingResponse(_chunks(opener(start, length)), status_code=status, headers=headers, media_type=media_type)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    with stream:
        while block := stream.read(CHUNK):
            yield block
