"""Uploads file by file: a folder is announced, its files go straight to the object store, and become a data set.

The service hands out signed links and looks at what arrived; no byte of it passes through here, except where the
store is a folder of this machine (``blobs``). An upload that is not completed expires.
"""

from __future__ import annotations

from datetime import UTC, datetime

import anyio
from fastapi import APIRouter, Response
from starlette.background import BackgroundTask

from cffa_core.data.object_source import ObjectFolder, StoredFile
from cffa_core.data.sources import duplicates, is_unsafe
from cffa_core.errors import Conflict, Gone, InvalidSpec, NotFound, Problem
from cffa_core.jobs import upload_sweep
from cffa_core.jobs.records import Dataset
from cffa_core.jobs.upload_rows import DONE, AnnouncedFile, Upload
from cffa_core.storage.base import UPLOADS_PREFIX, upload_key
from services.api import taking_in
from services.api.access import Backend, IdempotencyKey, Owner, TheBackend, UploadId
from services.api.dataset_schemas import PartToPut, UploadFileView, UploadList, UploadRequest, UploadView
from services.api.datasets import made
from services.api.paging import PageSize, PageToken, offset_of
from services.api.problems import documented
from services.api.schemas import DatasetView
from services.api.scratch import upload_folder
from services.api.taking_in import Wanted

HELD_SECONDS = 7200.0
NAMED = 100  # problems in one answer
MOST_PARTS = 10_000
router = APIRouter(tags=["data sets"])


@router.post(
    "/v1/uploads",
    status_code=201,
    response_model=UploadView,
    operation_id="createUpload",
    summary="Announce a folder that is sent file by file",
    responses=documented(400, 403, 409, 413, 422, 503),
)
def create_upload(
    asked: UploadRequest, backend: TheBackend, owner: Owner, response: Response, idempotency_key: IdempotencyKey = None
) -> UploadView:
    """Answers with signed links to PUT the files to: one for a small file, one per part for a large one. The rest of
    the links, and fresh ones, come from `GET /v1/uploads/{id}`. A network failure costs one part."""
    wanted = asked.wanted()
    name, options = wanted.name, wanted.options
    _judge(asked, backend)
    upload_id = backend.store.new_id("up") if idempotency_key is None else taking_in.id_of("up", owner, idempotency_key)
    try:
        upload = backend.store.get_upload(owner, upload_id)
    except NotFound:
        backend.store.require_bytes(owner, sum(file.size for file in asked.files))
        files = [
            _announced(backend, upload_id, number, file.path, file.size) for number, file in enumerate(asked.files)
        ]
        seconds = backend.settings.upload_open_seconds
        upload = backend.store.add_upload(owner, upload_id, name, files, options, seconds=seconds)
    announced = [(file.path, file.size) for file in upload.files]
    if (upload.name, upload.options, announced) != (name, options, [(file.path, file.size) for file in asked.files]):
        raise taking_in.key_reused()
    response.headers["Location"] = f"/v1/uploads/{upload_id}"
    return _view(backend, upload, 0, 50)


def _judge(asked: UploadRequest, backend: Backend) -> None:
    """Raise ``InvalidSpec`` naming every file that could never be taken in."""
    limits = taking_in.limits_of(backend.settings)
    twice = duplicates([file.path for file in asked.files])
    most = min(limits.max_member_bytes, MOST_PARTS * backend.settings.upload_part_bytes)
    problems = []
    for number, file in enumerate(asked.files):
        if is_unsafe(file.path):
            message = "a path inside the data set, without `..`, backslash or control character"
            problems.append(Problem(f"/files/{number}/path", "unsafe_name", message))
        elif file.path in twice:
            message = f"{file.path!r} is announced more than once (letter case does not count)"
            problems.append(Problem(f"/files/{number}/path", "duplicate_name", message))
        if file.size > most:
            problems.append(Problem(f"/files/{number}/size", "too_large", f"a file may have at most {most} bytes"))
    if len(asked.files) > limits.max_members:
        problems.append(Problem("/files", "too_many_members", f"at most {limits.max_members} files are taken"))
    total, room = sum(file.size for file in asked.files), backend.settings.max_upload_bytes
    if total > room:
        problems.append(Problem("/files", "too_large", f"{total} bytes in all; at most {room} are taken"))
    if problems:
        raise InvalidSpec("these files cannot be taken in; see errors", problems=tuple(problems[:NAMED]))


def _announced(backend: Backend, upload_id: str, number: int, path: str, size: int) -> AnnouncedFile:
    key, part = upload_key(upload_id, number), backend.settings.upload_part_bytes
    if size <= part:
        return AnnouncedFile(path, size, key)
    return AnnouncedFile(path, size, key, backend.objects.direct().begin_parts(key), part)


@router.get(
    "/v1/uploads",
    operation_id="listUploads",
    summary="List uploads file by file, newest first",
    responses=documented(422, 503),
)
def list_uploads(
    backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> UploadList:
    """One page of uploads, without their files."""
    page = backend.store.list_uploads(owner, page_size, page_token)
    return UploadList(items=[_summary(item, [], None) for item in page.items], next_page_token=page.next_token)


@router.get(
    "/v1/uploads/{upload_id}",
    operation_id="getUpload",
    summary="What of an upload is there, and links for the rest",
    responses=documented(404, 422, 503),
)
def get_upload(
    upload_id: UploadId, backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> UploadView:
    """One page of the announced files: how many bytes of each arrived, and a fresh link for every part that did not.
    This is how an upload goes on after a break."""
    return _view(backend, backend.store.get_upload(owner, upload_id), offset_of(page_token), page_size)


@router.post(
    "/v1/uploads/{upload_id}:complete",
    status_code=201,
    response_model=DatasetView,
    operation_id="completeUpload",
    summary="Make a data set of the files that were sent",
    responses=documented(400, 403, 404, 409, 410, 413, 422, 503),
)
async def complete_upload(upload_id: UploadId, backend: TheBackend, owner: Owner) -> Response:
    """Put parts together, check all files as an upload of a zip is checked, and take them in. Repeating it answers with
    the same data set. After a refusal the upload stays open, so that files may be sent anew."""

    def complete() -> Dataset:
        upload = backend.store.hold_upload(owner, upload_id, seconds=HELD_SECONDS)
        if upload.state == DONE:
            return _made_before(backend, upload)
        source = _arrived(backend, upload)
        wanted = Wanted(upload.name, key=f"upload {upload.id}", **upload.options)
        with upload_folder(backend.settings.scratch_dir) as folder:
            dataset = taking_in.take_in(backend, owner, source, wanted, folder / "checked")
        backend.store.finish_upload(owner, upload_id, dataset.id)
        upload_sweep.remove_objects(backend.objects, upload)
        return dataset

    return made(await anyio.to_thread.run_sync(complete, limiter=backend.checks))


def _made_before(backend: Backend, upload: Upload) -> Dataset:
    try:
        return backend.store.get_dataset(upload.owner, upload.dataset_id or "")
    except NotFound as error:
        raise Gone("the data set that this upload became has been deleted") from error


def _arrived(backend: Backend, upload: Upload) -> ObjectFolder:
    """The files of an upload that is all there; raises ``Conflict`` naming those that are not.

    A file of another size than announced is removed, so that it can be sent again.
    """
    direct = backend.objects.direct()
    prefix = f"{UPLOADS_PREFIX}{upload.id}/"
    sizes = dict(direct.sizes(prefix))
    for file in upload.files:
        if file.multipart_id is not None and file.key not in sizes:
            received = direct.parts(file.key, file.multipart_id)
            if received == _parts(file):
                direct.join(file.key, file.multipart_id)
    sizes = dict(direct.sizes(prefix))
    problems = []
    for file in upload.files:
        if file.key not in sizes:
            problems.append(Problem(file.path, "missing", f"not all of its {file.size} bytes arrived; send the rest"))
        elif sizes[file.key] != file.size:
            backend.objects.delete(file.key)
            message = f"{sizes[file.key]} bytes arrived, {file.size} were announced; send the file again"
            problems.append(Problem(file.path, "wrong_size", message))
    if problems:
        count = len(problems)
        raise Conflict(f"{count} of {len(upload.files)} files are not there yet", problems=tuple(problems[:NAMED]))
    return ObjectFolder(
        upload.name, backend.objects, {file.path: StoredFile(file.key, file.size) for file in upload.files}
    )


@router.delete(
    "/v1/uploads/{upload_id}",
    status_code=204,
    operation_id="deleteUpload",
    summary="Give an upload up",
    responses=documented(403, 404, 409, 503),
)
def delete_upload(upload_id: UploadId, backend: TheBackend, owner: Owner) -> Response:
    """Remove an upload that has not become a data set, with everything that arrived of it."""
    upload = backend.store.remove_upload(owner, upload_id)
    return Response(status_code=204, background=BackgroundTask(upload_sweep.remove_objects, backend.objects, upload))


def _parts(file: AnnouncedFile) -> dict[int, int]:
    """Sizes of all parts of a large file by number, from 1."""
    part = file.part_bytes or file.size
    return {number + 1: min(part, file.size - number * part) for number in range(-(-file.size // part))}


def _view(backend: Backend, upload: Upload, first: int, count: int) -> UploadView:
    chosen = upload.files[first : first + count]
    more = str(first + count) if first + count < len(upload.files) else None
    if upload.state == DONE:
        return _summary(upload, [], None)
    sizes = dict(backend.objects.direct().sizes(f"{UPLOADS_PREFIX}{upload.id}/"))
    left = (upload.expires_at - datetime.now(UTC)).total_seconds()
    seconds = int(max(1, min(left, backend.settings.blob_url_ttl)))
    return _summary(upload, [_file(backend, file, sizes, seconds) for file in chosen], more)


def _file(backend: Backend, file: AnnouncedFile, sizes: dict[str, int], seconds: int) -> UploadFileView:
    direct = backend.objects.direct()
    multipart = file.multipart_id
    if sizes.get(file.key) == file.size:
        return UploadFileView(path=file.path, size=file.size, received=file.size, complete=True, puts=[])
    if multipart is None:
        url = direct.put_url(file.key, size=file.size, expires_seconds=seconds)
        puts = [PartToPut(number=None, offset=0, size=file.size, url=url)]
        return UploadFileView(path=file.path, size=file.size, received=0, complete=False, puts=puts)
    arrived, parts = direct.parts(file.key, multipart), _parts(file)
    good = {number for number, size in parts.items() if arrived.get(number) == size}
    puts = [
        PartToPut(
            number=number,
            offset=(number - 1) * (file.part_bytes or 0),
            size=size,
            url=direct.part_url(file.key, multipart, number, size=size, expires_seconds=seconds),
        )
        for number, size in parts.items()
        if number not in good
    ]
    received = sum(parts[number] for number in good)
    return UploadFileView(path=file.path, size=file.size, received=received, complete=not puts, puts=puts)


def _summary(upload: Upload, files: list[UploadFileView], more: str | None) -> UploadView:
    here = f"/v1/uploads/{upload.id}"
    return UploadView(
        id=upload.id,
        name=upload.name,
        state=upload.state,
        bytes=upload.bytes,
        dataset_id=upload.dataset_id,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        files=files,
        next_page_token=more,
        links={"self": here, "complete": f"{here}:complete"},
    )
