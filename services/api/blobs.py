"""Stored bytes behind signed, expiring links: what an S3 server does in a cluster, done here for the local store.

These routes exist in embedded mode only. The token is the whole permission, so no owner is asked for. Uploading
through tokens (PUT) is not offered yet.
"""

from __future__ import annotations

import mimetypes
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Depends, Request, Response

from cffa_core.errors import Gone, NotFound
from cffa_core.storage.local import LocalStore
from services.api.access import TheBackend
from services.api.problems import Answers, documented
from services.api.ranges import serve

router = APIRouter(tags=["blobs"])
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_ANSWERS: Answers = {
    200: {"description": "The whole object."} | _BYTES,
    206: {"description": "The byte range that was asked for."} | _BYTES,
    304: {"description": "The object named in If-None-Match; objects never change."},
}


def local_store(backend: TheBackend) -> LocalStore:
    """The store whose tokens these routes serve."""
    if not isinstance(backend.objects, LocalStore):
        raise NotFound("the object store serves its links itself")
    return backend.objects


def get_blob(request: Request, token: str, objects: Annotated[LocalStore, Depends(local_store)]) -> Response:
    """The object a signed link names. Supports one byte range, If-Range, If-None-Match; the ETag is its SHA-256."""
    grant = objects.read_token(token)
    if grant.method != "GET":
        raise NotFound("no such blob")
    try:
        size = objects.size(grant.key)
    except NotFound as error:
        raise Gone("what this link names has been deleted") from error

    def opened(start: int, length: int) -> BinaryIO:
        return objects.open(grant.key, start, length)

    return serve(
        request,
        opened,
        size=size,
        sha256=grant.sha256,
        media_type=mimetypes.guess_type(grant.filename)[0] or "application/octet-stream",
        filename=grant.filename,
    )


for _method in ("GET", "HEAD"):
    router.add_api_route(
        "/v1/blobs/{token}",
        get_blob,
        methods=[_method],
        response_class=Response,
        operation_id=f"{_method.lower()}Blob",
        summary="Download through a signed link" if _method == "GET" else "Size and ETag of a signed link",
        responses=_ANSWERS | documented(404, 410, 416, 503),
    )
