"""The page at ``/`` and its files. They are a closed list, read once; nothing else below the folder is served."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cffa_core.errors import NotFound
from services.api.ranges import etag_matches

FOLDER = Path(__file__).resolve().parent.parent / "web"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "report.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
router = APIRouter(include_in_schema=False)


@cache
def _content(name: str) -> tuple[bytes, str]:
    data = (FOLDER / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()}"'


@router.get("/")
def index(request: Request) -> Response:
    """The page."""
    return web_file(request, "index.html")


@router.get("/web/{name}")
def web_file(request: Request, name: str) -> Response:
    """One file of the page; revalidated on each load, so that an upgrade shows at once."""
    if name not in TYPES:
        raise NotFound(f"the page has no file {name!r}")
    data, etag = _content(name)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=TYPES[name])
