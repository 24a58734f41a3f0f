"""Stored bytes behind signed, expiring links: what an S3 server does in a cluster, done here for the local store.

These routes exist in embedded mode only. The token is the whole permission, so no owner is asked for. A token to PUT
brings exactly as many bytes as were announced, once, and only while its upload is open.
"""

from __future__ import annotations

import contextlib
import mimetypes
from pathlib import Path
from typing import Annotated, BinaryIO

import anyio
from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from cffa_core.errors import Gone, NotFound, StorageUnavailable
from cffa_core.storage.base import UPLOADS_PREFIX
from cffa_core.storage.local import LocalStore
from services.api.access import TheBackend
from services.api.problems import Answers, BadRequest, PayloadTooLarge, documented
from services.api.ranges import serve
from services.api.scratch import upload_folder

router = APIRouter(tags=["blobs"])
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
# An object is served as what its name says it is: an archive, an image, a card.
_OBJECT = {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
_STORED: Answers = {200: {"description": "Stored; the ETag is the SHA-256."}}
_ANSWERS: Answers = {
    200: {"description": "The whole object."} | _OBJECT,
    206: {"description": "The byte range that was asked for."} | _OBJECT,
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


@router.put(
    "/v1/blobs/{token}",
    operation_id="putBlob",
    summary="Upload through a signed link",
    response_class=Response,
    openapi_extra={"requestBody": {"required": True, **_BYTES}},
    responses=_STORED | documented(400, 403, 404, 409, 410, 413, 503),
)
async def put_blob(
    request: Request, token: str, backend: TheBackend, objects: Annotated[LocalStore, Depends(local_store)]
) -> Response:
    """Store one file, or one part of one, that a signed link of an upload was made for."""
    grant = objects.read_token(token)
    if grant.method != "PUT" or grant.size is None:
        raise NotFound("no such blob")
    upload_id = grant.key.removeprefix(UPLOADS_PREFIX).partition("/")[0]
    if not await run_in_threadpool(backend.store.upload_is_open, upload_id):
        raise Gone("the upload that this link belongs to is over")
    held = contextlib.ExitStack()
    folder = await run_in_threadpool(held.enter_context, upload_folder(backend.settings.scratch_dir))
    try:
        await _receive(request, folder / "body", grant.size)
        info = await run_in_threadpool(objects.put_file, grant.key, folder / "body")
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(held.close)
    return Response(headers={"ETag": f'"{info.sha256}"'})


async def _receive(request: Request, path: Path, size: int) -> None:
    """Write the body to ``path``; raises unless it has exactly ``size`` bytes."""
    received = 0
    try:
        with path.open("xb") as out:
            async for block in request.stream():
                received += len(block)
                if received > size:
                    raise PayloadTooLarge(f"this link takes {size} bytes; announce the file anew if it has changed")
                await run_in_threadpool(out.write, block)
    except ClientDisconnect as error:
        raise BadRequest("the connection closed before the file was complete") from error
    except OSError as error:
        raise StorageUnavailable(f"no room for the upload: {error.strerror}") from error
    if received < size:
        raise BadRequest(f"{received} bytes came, this link takes {size}")


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
