"""Data sets: an upload is streamed to disk, checked as a whole, and taken in only if nothing is wrong with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cffa_core.data import ingest
from cffa_core.errors import CffaError, Conflict, CorruptArtifact, InvalidSpec, NotFound, Problem
from cffa_core.jobs.records import Dataset, StoredFiles
from cffa_core.storage.base import ObjectInfo, dataset_key
from cffa_core.storage.manifest import read_verified
from services.api import uploads
from services.api.access import Backend, DatasetId, IdempotencyKey, Owner, TheBackend
from services.api.paging import PageSize, PageToken, offset_of
from services.api.problems import documented
from services.api.schemas import DatasetList, DatasetPair, DatasetPairList, DatasetView
from services.api.scratch import upload_folder

PUTS_AT_ONCE = 4
MAX_NAME = 200
MAX_PATTERN = 200
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
router = APIRouter(tags=["data sets"])
_log = logging.getLogger("cffa.api")
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "name"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "Zip in one of the three layouts.",
                        },
                        "name": {"type": "string", "maxLength": MAX_NAME},
                        "eye_pattern": {
                            "type": "string",
                            "maxLength": MAX_PATTERN,
                            "description": "Regular expression; pairs whose names give the same match are one eye.",
                        },
                    },
                }
            }
        },
    }
}


@router.post(
    "/v1/datasets",
    status_code=201,
    response_model=DatasetView,
    operation_id="uploadDataset",
    summary="Upload a data set",
    openapi_extra=_FORM,
    responses=documented(400, 403, 409, 413, 422, 503),
)
async def upload_dataset(
    request: Request, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Take a zip of registered pairs in. Every problem of every file is named at once, with the file as its pointer; if
    there is one, nothing is taken in."""
    held = contextlib.ExitStack()
    folder = await anyio.to_thread.run_sync(held.enter_context, upload_folder(backend.settings.scratch_dir))
    try:
        source = folder / "upload.zip"
        upload = await uploads.receive(
            request,
            source,
            fields={"name": True, "eye_pattern": False},
            max_bytes=backend.settings.max_upload_bytes,
        )
        name, eye_pattern = _form(upload.fields)
        dataset = await anyio.to_thread.run_sync(
            _take_in, backend, owner, source, name, eye_pattern, idempotency_key, limiter=backend.checks
        )
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(held.close)
    return JSONResponse(
        DatasetView.of(dataset).model_dump(mode="json"),
        status_code=201,
        headers={"Location": f"/v1/datasets/{dataset.id}"},
    )


def _form(fields: dict[str, str]) -> tuple[str, str | None]:
    """The checked text fields; raises ``InvalidSpec`` naming each bad one."""
    name, pattern = fields["name"].strip(), fields.get("eye_pattern") or None
    problems = []
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        problems.append(Problem("/name", "bad_name", f"give a name of 1 to {MAX_NAME} printable characters"))
    if pattern is not None and len(pattern) > MAX_PATTERN:
        problems.append(Problem("/eye_pattern", "too_long", f"a pattern has at most {MAX_PATTERN} characters"))
    if problems:
        raise InvalidSpec("the upload form is not valid; see errors", problems=tuple(problems))
    return name, pattern


def _take_in(
    backend: Backend, owner: str, source: Path, name: str, eye_pattern: str | None, key: str | None
) -> Dataset:
    """Check, write, store, and only then make it visible. What a failed attempt stored is removed again."""
    settings = backend.settings
    limits = ingest.Limits(
        max_members=settings.max_archive_members,
        max_total_bytes=settings.max_unpacked_bytes,
        max_ratio=settings.max_archive_ratio,
        max_pixels=settings.max_image_pixels,
    )
    checked = ingest.check(source, limits, eye_pattern=eye_pattern)
    folder = source.parent / "checked"
    index = ingest.write(checked, folder)
    prefix = backend.store.new_id("ds")
    dataset_id = prefix if key is None else _id_of(owner, key)
    replayed = key and _replayed(backend, owner, dataset_id, checked.digest, name)
    if replayed:
        return replayed
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    try:
        stored = _store(backend, prefix, files)
        return backend.store.add_dataset(
            owner,
            dataset_id=dataset_id,
            name=name,
            digest=checked.digest,
            pairs=len(index["pairs"]),
            report=checked.report(),
            stored=StoredFiles(stored),
        )
    except BaseException as error:
        _remove(backend, [dataset_key(prefix, name) for name in files])
        # The same upload, sent twice at once: the other one was first.
        if isinstance(error, Conflict) and (made := _replayed(backend, owner, dataset_id, checked.digest, name)):
            return made
        raise


def _store(backend: Backend, prefix: str, files: dict[str, Path]) -> dict[str, ObjectInfo]:
    """Put ``files`` (name -> path) below ``prefix``, a few at a time: most of a small put is waiting for the store."""
    pool = ThreadPoolExecutor(PUTS_AT_ONCE, thread_name_prefix="put")
    try:
        puts = {name: pool.submit(backend.objects.put_file, dataset_key(prefix, name), files[name]) for name in files}
        return {name: put.result() for name, put in puts.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, those not begun; waits for the others


def _remove(backend: Backend, keys: list[str]) -> None:
    """Take back what was stored; what cannot be deleted now is named in the log, and the first error stays the one."""
    for number, key in enumerate(keys):
        try:
            backend.objects.delete(key)
        except CffaError:
            _log.exception("%d objects of a refused upload are still stored: %s ...", len(keys) - number, key)
            return


def _id_of(owner: str, key: str) -> str:
    """The data set that an idempotency key makes; objects lie under an id of their own, so two tries never mix."""
    number = int.from_bytes(hashlib.sha256(json.dumps([owner, key]).encode()).digest(), "big")
    digits = [_ALPHABET[(number // 36**place) % 36] for place in range(20)]
    return f"ds_{''.join(digits)}"


def _replayed(backend: Backend, owner: str, dataset_id: str, digest: str, name: str) -> Dataset | None:
    """What this key made before, or None; raises ``Conflict`` if that was from another upload."""
    try:
        made = backend.store.get_dataset(owner, dataset_id)
    except NotFound:
        return None
    if (made.digest, made.name) != (digest, name):
        problem = Problem("header:idempotency-key", "idempotency_key_reused", "use a new key for another upload")
        raise Conflict("this Idempotency-Key was used for another upload", problems=(problem,))
    return made


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@router.get(
    "/v1/datasets",
    operation_id="listDatasets",
    summary="List data sets, newest first",
    responses=documented(422, 503),
)
def list_datasets(
    backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> DatasetList:
    """One page of data sets."""
    page = backend.store.list_datasets(owner, page_size, page_token)
    return DatasetList(items=[DatasetView.of(item) for item in page.items], next_page_token=page.next_token)


@router.get(
    "/v1/datasets/{dataset_id}",
    operation_id="getDataset",
    summary="Get a data set",
    responses=documented(404, 503),
)
def get_dataset(dataset_id: DatasetId, backend: TheBackend, owner: Owner) -> DatasetView:
    """One data set."""
    return DatasetView.of(backend.store.get_dataset(owner, dataset_id))


@router.get(
    "/v1/datasets/{dataset_id}/report",
    operation_id="getDatasetReport",
    summary="What the check of a data set found",
    responses=documented(404, 503),
)
def get_report(dataset_id: DatasetId, backend: TheBackend, owner: Owner) -> dict[str, Any]:
    """Layout, counts, each pair with its registration, and warnings."""
    return backend.store.get_dataset(owner, dataset_id).report


@router.get(
    "/v1/datasets/{dataset_id}/pairs",
    operation_id="listDatasetPairs",
    summary="Pairs of a data set",
    responses=documented(404, 422, 503),
)
def list_dataset_pairs(
    dataset_id: DatasetId, backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> DatasetPairList:
    """Pairs as they were taken in, with signed links to both images."""
    dataset = backend.store.get_dataset(owner, dataset_id)
    try:
        pairs = json.loads(read_verified(backend.objects, dataset.stored.files["dataset.json"]))["pairs"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"the index of data set {dataset_id} is not readable") from error
    first = offset_of(page_token)
    last = first + page_size

    def link(name: str) -> str:
        info = dataset.stored.files[name]
        seconds = backend.settings.blob_url_ttl
        return backend.objects.download_url(
            info.key, expires_seconds=seconds, filename=name.replace("/", "-"), sha256=info.sha256
        )

    return DatasetPairList(
        items=[
            DatasetPair(
                **{key: pair[key] for key in ("name", "eye", "width", "height", "registration", "residual_px")},
                cf_url=link(pair["cf"]),
                fa_url=link(pair["fa"]),
            )
            for pair in pairs[first:last]
        ],
        next_page_token=str(last) if last < len(pairs) else None,
    )
