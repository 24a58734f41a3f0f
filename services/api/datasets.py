"""Data sets: an upload is streamed to disk, checked as a whole, and taken in only if nothing is wrong with it.

The other ways in are ``folder_uploads`` and the import below; how files become a data set is in ``taking_in``.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from cffa_core.data.object_source import below_prefix
from cffa_core.errors import CorruptArtifact, InvalidSpec, NotFound, Problem
from cffa_core.jobs.dataset_rows import SURVEY
from cffa_core.jobs.records import Dataset
from cffa_core.storage.manifest import read_verified, stored_from_json
from services.api import taking_in, uploads
from services.api.access import Backend, DatasetId, IdempotencyKey, Owner, TheBackend
from services.api.dataset_schemas import ImportRequest
from services.api.paging import PageSize, PageToken, offset_of
from services.api.problems import documented
from services.api.schemas import DatasetList, DatasetPair, DatasetPairList, DatasetView
from services.api.scratch import upload_folder
from services.api.taking_in import MAX_NAME, MAX_PATTERN, Wanted

router = APIRouter(tags=["data sets"])
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
                        "patient_pattern": {
                            "type": "string",
                            "maxLength": MAX_PATTERN,
                            "description": "Regular expression; eyes whose pairs' names give the same match are of one "
                            "patient, and no split divides them.",
                        },
                        "auto_register": {
                            "type": "string",
                            "enum": ["true", "false"],
                            "description": "Register pairs that come without landmarks; those that cannot be are left "
                            "out, and the report says so.",
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
    responses=documented(400, 403, 409, 413, 415, 422, 503),
)
async def upload_dataset(
    request: Request, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Take a zip of registered pairs in. Every problem of every file is named at once, with the file as its pointer; if
    there is one, nothing is taken in."""
    declared = uploads.declared_bytes(request)
    await anyio.to_thread.run_sync(_require_room, backend, owner, declared, idempotency_key)
    held = contextlib.ExitStack()
    folder = await anyio.to_thread.run_sync(held.enter_context, upload_folder(backend.settings.scratch_dir))
    try:
        source = folder / "upload.zip"
        upload = await uploads.receive(
            request,
            source,
            fields={"name": True, "eye_pattern": False, "patient_pattern": False, "auto_register": False},
            max_bytes=backend.settings.max_upload_bytes,
        )
        wanted = _form(upload.fields, idempotency_key)
        dataset = await anyio.to_thread.run_sync(
            taking_in.take_in, backend, owner, source, wanted, folder / "checked", limiter=backend.checks
        )
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(held.close)
    return made(dataset)


def made(dataset: Dataset) -> Response:
    """The answer to a request that made a data set."""
    return JSONResponse(
        DatasetView.of(dataset).model_dump(mode="json"),
        status_code=201,
        headers={"Location": f"/v1/datasets/{dataset.id}"},
    )


def _require_room(backend: Backend, owner: str, more: int, key: str | None) -> None:
    """Refuse by its length what would be too much, unless the key has made its data set already."""
    if key is not None:
        with contextlib.suppress(NotFound):
            backend.store.get_dataset(owner, taking_in.id_of("ds", owner, key))
            return
    backend.store.require_bytes(owner, more)


def _form(fields: dict[str, str], key: str | None) -> Wanted:
    """The checked text fields; raises ``InvalidSpec`` naming each bad one."""
    patterns = fields.get("eye_pattern"), fields.get("patient_pattern")
    wanted = Wanted(fields["name"], *patterns, key=key).checked()
    asked = fields.get("auto_register", "false")
    if asked not in ("true", "false"):
        problem = Problem("/auto_register", "bool_parsing", "say true or false")
        raise InvalidSpec("the upload form is not valid; see errors", problems=(problem,))
    return replace(wanted, auto_register=asked == "true")


@router.post(
    "/v1/datasets:import",
    status_code=201,
    response_model=DatasetView,
    operation_id="importDataset",
    summary="Import a data set from the object store",
    responses=documented(400, 403, 404, 409, 413, 422, 503),
)
async def import_dataset(
    asked: ImportRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Take pairs in that lie in the service's bucket below `imports/OWNER/PREFIX` (the first part is a setting). They
    go through the same check as an upload, and stay where they are."""
    wanted = asked.wanted(idempotency_key)

    def take_in() -> Dataset:
        limits = taking_in.limits_of(backend.settings)
        root = f"{backend.settings.import_prefix.strip('/')}/{owner}/"
        source = below_prefix(backend.objects, root, asked.prefix, limits)
        with upload_folder(backend.settings.scratch_dir) as folder:
            return taking_in.take_in(backend, owner, source, wanted, folder / "checked")

    return made(await anyio.to_thread.run_sync(take_in, limiter=backend.checks))


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
    """Layout, counts, each pair with its registration, and warnings; and, some time after the data set was made (its
    `survey.state` is `done` then), what was found in the pairs: misregistration, duplicates, vessel overlap, valid
    regions. `pictures` are signed links to contact sheets."""
    dataset = backend.store.get_dataset(owner, dataset_id)
    pictures = stored_from_json(dataset.report.get("pictures"))
    seconds = backend.settings.blob_url_ttl
    links = {
        name.removeprefix("report/"): backend.objects.download_url(
            info.key, expires_seconds=seconds, filename=name.rpartition("/")[2], sha256=info.sha256
        )
        for name, info in pictures.files.items()
    }
    return {SURVEY: {"state": "none"}, **dataset.report, "pictures": links, "split": dataset.split}


@router.delete(
    "/v1/datasets/{dataset_id}",
    status_code=204,
    operation_id="deleteDataset",
    summary="Delete a data set",
    responses=documented(403, 404, 409, 503),
)
def delete_dataset(dataset_id: DatasetId, backend: TheBackend, owner: Owner) -> Response:
    """Remove a data set that no unfinished job uses. Images that other versions share stay with those; models that
    were trained on it stay."""
    keys = backend.store.delete_dataset(owner, dataset_id)
    return Response(status_code=204, background=BackgroundTask(taking_in.remove, backend, list(keys)))


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
    part_of = {name: part for part, names in (dataset.split or {}).items() for name in names}

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
                patient=pair.get("patient"),
                original_name=pair.get("original_name"),
                part=part_of.get(pair["name"]),
                cf_url=link(pair["cf"]),
                fa_url=link(pair["fa"]),
            )
            for pair in pairs[first:last]
        ],
        next_page_token=str(last) if last < len(pairs) else None,
    )
