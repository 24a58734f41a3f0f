"""The report of a job: as JSON with links to its files, and each file under an address of this server.

Evaluations, attention jobs and jobs of the captioned model make one; what is in it is the matter of their recipes.
"""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import BinaryIO

from fastapi import APIRouter, Request, Response

from cffa_core.errors import Conflict, CorruptArtifact, NotFound
from cffa_core.jobs.spec import REPORTS, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.manifest import read_verified
from services.api.access import Backend, JobId, Owner, TheBackend
from services.api.missing_products import not_made, refuse_expired
from services.api.problems import Answers, documented
from services.api.product_schemas import ReportView, StoredFileView
from services.api.ranges import serve

REPORT = "report.json"
TYPES = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown; charset=utf-8",
    ".png": "image/png",
    ".zip": "application/zip",
}
MAX_SHOWN = 32 * 2**20
"""Larger files are not read into memory to be shown; they are downloaded by their links."""
router = APIRouter(tags=["results"])
_FILE: Answers = {
    200: {
        "description": "The file.",
        "content": {
            media_type.partition(";")[0]: {"schema": {"type": "string", "format": "binary"}}
            for media_type in TYPES.values()
        },
    }
}


@router.get(
    "/v1/jobs/{job_id}/report",
    operation_id="getReport",
    summary="The report of a job",
    responses=documented(404, 409, 410, 503),
)
def get_report(job_id: JobId, backend: TheBackend, owner: Owner) -> ReportView:
    """What was found, and all files of the report with their digests. URLs are fresh, and expire."""
    files = _files(backend, owner, job_id)
    try:
        report = json.loads(read_verified(backend.objects, files[REPORT]))
    except (ValueError, KeyError) as error:
        raise CorruptArtifact(f"the report of job {job_id} is not readable") from error
    seconds = backend.settings.blob_url_ttl
    expires = datetime.now(UTC) + timedelta(seconds=seconds)

    def view(name: str, info: ObjectInfo) -> StoredFileView:
        url = backend.objects.download_url(info.key, expires_seconds=seconds, filename=name, sha256=info.sha256)
        return StoredFileView(name=name, bytes=info.size, sha256=info.sha256, url=url)

    return ReportView(
        report=report, files=[view(name, info) for name, info in sorted(files.items())], expires_at=expires
    )


def get_report_file(request: Request, job_id: JobId, name: str, backend: TheBackend, owner: Owner) -> Response:
    """One file of the report, to be shown in place; checked before it is sent, its ETag is its SHA-256."""
    files = _files(backend, owner, job_id)
    if name not in files:
        raise NotFound(f"the report of job {job_id} has no file {name!r}; it has {', '.join(sorted(files))}")
    info = files[name]
    if info.size > MAX_SHOWN:
        raise Conflict(f"{name} has {info.size} bytes and is not shown in place; download it by its link in the report")

    def opened(start: int, length: int) -> BinaryIO:
        return io.BytesIO(read_verified(backend.objects, info)[start : start + length])

    return serve(
        request,
        opened,
        size=info.size,
        sha256=info.sha256,
        media_type=TYPES.get(PurePosixPath(name).suffix, "application/octet-stream"),
        filename=f"{job_id}-{name}",
        inline=True,
    )


for _method in ("GET", "HEAD"):
    router.add_api_route(
        "/v1/jobs/{job_id}/report/{name:path}",
        get_report_file,
        methods=[_method],
        response_class=Response,
        operation_id=f"{_method.lower()}ReportFile",
        summary="One file of a report" if _method == "GET" else "Size and ETag of one file of a report",
        responses=_FILE | documented(404, 409, 410, 416, 422, 503),
    )


def _files(backend: Backend, owner: str, job_id: str) -> dict[str, ObjectInfo]:
    """Files of the report of a succeeded job; raises ``Conflict``, ``Expired`` or ``NotFound``."""
    job = backend.store.get_job(owner, job_id)
    if job.kind not in REPORTS:
        raise Conflict(f"job {job_id} is a {job.kind} job; only {', '.join(REPORTS)} jobs make a report")
    refuse_expired(job)
    if job.state is not JobState.SUCCEEDED:
        raise not_made(job, "the report")
    kind = UnitKind.EVALUATE if job.kind is Kind.EVALUATION else UnitKind.COMPUTE
    (unit,) = backend.store.parts(owner, job_id, kind=kind)
    return unit.stored.files
