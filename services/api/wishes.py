"""What a running training does when it is asked to, and what it draws: checkpoint now, sample now, and the pictures.

Pictures are not products of their own: they are files of the checkpoints (and, once a training is done, of its
products), and are served from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cffa_core.errors import Conflict
from cffa_core.jobs.records import Wish
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import UnitKind
from cffa_core.jobs.wishes import SAMPLE
from cffa_core.storage.base import ObjectInfo
from services.api.access import Backend, JobId, Owner, TheBackend
from services.api.missing_products import refuse_expired
from services.api.problems import documented
from services.api.product_schemas import StoredFileView
from services.api.schemas import JobView

router = APIRouter()
_PREVIEW = re.compile(r"step_(\d+)_random_pairs/(.+)")


class PreviewView(BaseModel):
    """Pairs that a training drew at one step; ``asked`` says that its owner wanted them then.

    ``sheet.png`` shows all of them: a row for two pairs, each as CF and FA.
    """

    step: int
    asked: bool
    files: list[StoredFileView]


class PreviewList(BaseModel):
    """Previews and samples of a training by step; the links are signed and expire."""

    items: list[PreviewView]
    expires_at: datetime


def _ask(backend: Backend, owner: str, job_id: str, wish: Wish) -> JSONResponse:
    job = backend.store.ask(owner, job_id, wish)
    return JSONResponse(JobView.of(job).model_dump(mode="json"), status_code=202)


@router.post(
    "/v1/jobs/{job_id}:checkpoint",
    tags=["jobs"],
    status_code=202,
    response_model=JobView,
    operation_id="checkpointJob",
    summary="Ask a running training for a checkpoint now",
    responses=documented(403, 404, 409, 503),
)
def checkpoint_job(job_id: JobId, backend: TheBackend, owner: Owner) -> JSONResponse:
    """Made after the step in hand; the event `checkpoint` then names it in `fulfilled`. The trained weights do not
    depend on it. Asking again before it is made changes nothing; if the training ends first, the event `not_done`
    says so."""
    return _ask(backend, owner, job_id, "checkpoint")


@router.post(
    "/v1/jobs/{job_id}:sample",
    tags=["jobs"],
    status_code=202,
    response_model=JobView,
    operation_id="sampleJob",
    summary="Ask a running training for pictures now",
    responses=documented(403, 404, 409, 503),
)
def sample_job(job_id: JobId, backend: TheBackend, owner: Owner) -> JSONResponse:
    """The preview pairs, drawn after the step in hand and kept with a checkpoint of it; see the job's previews. The
    trained weights do not depend on it."""
    return _ask(backend, owner, job_id, "sample")


@router.get(
    "/v1/jobs/{job_id}/previews",
    tags=["results"],
    operation_id="listPreviews",
    summary="Pictures that a training drew",
    responses=documented(404, 409, 410, 503),
)
def list_previews(job_id: JobId, backend: TheBackend, owner: Owner) -> PreviewList:
    """Regular previews of all steps so far, as of the newest checkpoint, and the samples that were asked for and whose
    checkpoints are kept (the newest three)."""
    job = backend.store.get_job(owner, job_id)
    if job.kind is not Kind.TRAINING:
        raise Conflict(f"job {job_id} is a {job.kind} job; only a training of pairs draws previews")
    refuse_expired(job)
    found: dict[tuple[int, bool], dict[str, ObjectInfo]] = {}
    for saved in backend.store.checkpoints(owner, job_id):
        _add(found, saved.stored.files, saved.step)
    for unit in backend.store.parts(owner, job_id, kind=UnitKind.TRAIN):
        _add(found, unit.stored.files, None)
    seconds = backend.settings.blob_url_ttl
    expires = datetime.now(UTC) + timedelta(seconds=seconds)
    items = [
        PreviewView(step=step, asked=asked, files=[_view(backend, *file, seconds) for file in sorted(files.items())])
        for (step, asked), files in sorted(found.items())
    ]
    return PreviewList(items=items, expires_at=expires)


def _add(
    found: dict[tuple[int, bool], dict[str, ObjectInfo]], files: Mapping[str, ObjectInfo], step: int | None
) -> None:
    """Sort the pictures among stored files by step; a later source of the same picture counts."""
    for name, info in files.items():
        if match := _PREVIEW.fullmatch(name):
            found.setdefault((int(match[1]), False), {})[match[2]] = info
        elif step is not None and name.startswith(SAMPLE):
            found.setdefault((step, True), {})[name.removeprefix(SAMPLE)] = info


def _view(backend: Backend, name: str, info: ObjectInfo, seconds: int) -> StoredFileView:
    filename = PurePosixPath(name).name
    url = backend.objects.download_url(info.key, expires_seconds=seconds, filename=filename, sha256=info.sha256)
    return StoredFileView(name=name, bytes=info.size, sha256=info.sha256, url=url)
